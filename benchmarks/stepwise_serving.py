"""Continuous batching step by step in plain Python: slow, short, independent of the compiled simulator."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from moeplan.planner.ir.attainment import ServingLaw


@dataclass
class Request:
    """What one request is, and what became of it."""

    arrival_s: float
    prompt: int
    output: int
    prefilled: int = 0
    tokens: int = 0
    times: list[float] = field(default_factory=list)  # of the steps that made its tokens
    ttft_s: float = 0.0


def between(grid: Sequence[float], values: Sequence[float], at: float) -> float:
    """`values` at `at`, linear between the points of `grid` and level outside."""
    if at <= grid[0]:
        return values[0]
    if at >= grid[-1]:
        return values[-1]
    n = bisect_right(grid, at) - 1
    return values[n] + (values[n + 1] - values[n]) * (at - grid[n]) / (grid[n + 1] - grid[n])


class Engine:
    """One engine: its queue, its running requests, and the step under way."""

    def __init__(self, law: ServingLaw) -> None:
        self.law = law
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.entering: list[Request] = []
        self.end_s = math.inf
        self.decode_s = 0.0

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running) + len(self.entering)

    def _cache(self, request: Request) -> float:
        return between(self.law.context_tokens, self.law.cache_bytes, request.prompt + request.output / 2)

    def _step_s(self) -> float:
        if not self.running:
            return between(self.law.batch, [row[0] for row in self.law.step_s], 1)
        mean = sum(r.prompt + r.tokens for r in self.running) / len(self.running)
        rows = [between(self.law.context_tokens, row, mean) for row in self.law.step_s]
        return between(self.law.batch, rows, len(self.running))

    def begin(self, now: float) -> None:
        """Start a step, if there is anything to do."""
        budget, prefill, worked = self.law.step_tokens - len(self.running), 0.0, False
        while self.waiting and budget > 0:
            request = self.waiting[0]
            if not request.prefilled:
                held = sum(self._cache(r) for r in [*self.running, *self.entering, request])
                places = len(self.running) + len(self.entering) < self.law.sequences
                if not places or held > self.law.memory_bytes:
                    break
            tokens = min(budget, request.prompt - request.prefilled)
            whole = between(self.law.prompt_tokens, self.law.prefill_s, request.prompt)
            prefill += whole * tokens / request.prompt
            request.prefilled += tokens
            budget -= tokens
            worked = True
            if request.prefilled < request.prompt:
                break
            self.entering.append(self.waiting.popleft())
        if not (worked or self.running):
            self.end_s = math.inf
            return
        self.decode_s = self._step_s()
        self.end_s = now + self.decode_s + prefill

    def finish(self) -> None:
        """End the step: everyone running and entering has one token more."""
        now = self.end_s
        for request in self.entering:
            own = between(self.law.prompt_tokens, self.law.first_token_s, request.prompt)
            later = own + self.law.first_token_steps * self.decode_s
            request.ttft_s = now - request.arrival_s + later
        for request in (*self.running, *self.entering):
            request.tokens += 1
            request.times.append(now)
        everyone = self.running + self.entering
        self.running = [r for r in everyone if r.tokens < r.output]
        self.entering = []


def step_through(
    arrival_s: Sequence[float],
    prompt: Sequence[int],
    output: Sequence[int],
    law: ServingLaw,
    engines: int,
) -> list[Request]:
    """Serve the requests; each ends with the times of all its tokens."""
    requests = [Request(a, p, o) for a, p, o in zip(arrival_s, prompt, output, strict=True)]
    all_engines = [Engine(law) for _ in range(engines)]

    def run_to(now: float) -> None:
        for engine in all_engines:
            while engine.end_s <= now and engine.end_s < math.inf:
                engine.finish()
                engine.begin(engine.end_s)

    for request in requests:
        run_to(request.arrival_s)
        engine = min(all_engines, key=lambda e: e.unfinished)
        engine.waiting.append(request)
        if engine.end_s == math.inf:
            engine.end_s = request.arrival_s  # an empty step
    run_to(math.inf)
    return requests
