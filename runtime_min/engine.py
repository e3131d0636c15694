"""Sequences through the model, pass by pass: as some finish, others take their places."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Literal, Self

import torch
from torch import Tensor

from moeplan.runtime_min.lanes import Lane, Lanes
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.plan_file import RuntimePlan
from moeplan.runtime_min.ranks import ALONE, Ranks
from moeplan.runtime_min.report import RankReport, peak_bytes
from moeplan.runtime_min.sampling import Sampling, Scored, best_scored, draw, greedy


@dataclass(slots=True, eq=False)
class Generation:
    """A request under way. `ends` are tokens that finish it, `stopped` a test of the tokens so far.

    `top_scored` asks for the log-probability of each token and of so many of the best (None: for none);
    they come in `scored`. `cached` counts the tokens whose keys and values are kept; `since_s` is when it was
    taken in, by time.perf_counter. A generation whose scores are no numbers ends as "invalid".
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    ends: frozenset[int] = frozenset()
    stopped: Callable[[Sequence[int]], bool] | None = None
    top_scored: int | None = None
    tokens: list[int] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    finish: Literal["", "stop", "length", "invalid"] = ""
    cached: int = 0
    since_s: float = 0.0
    source: torch.Generator = field(init=False)  # of its draws

    def __post_init__(self) -> None:
        self.source = torch.Generator().manual_seed(self.sampling.seed)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def most_tokens(self) -> int:
        """The longest it may become."""
        return len(self.prompt) + self.max_tokens

    def accept(self, token: int) -> None:
        """Append the next token; set `finish` if it is the last."""
        self.tokens.append(token)
        if token in self.ends or (self.stopped is not None and self.stopped(self.tokens)):
            self.finish = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish = "length"


Active = Sequence[tuple[int, Generation]]  # (place, generation), places ascending


@dataclass(slots=True)
class Stats:
    """Sums over the passes so far. Seconds go to prefill for passes that only read prompts, to decode for
    those that read none, else to mixed; `first_tokens_s` sums over requests what passed from being taken in
    to the first token.
    """

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0  # prompt tokens of prefill passes
    decode_tokens: int = 0  # tokens of decode passes
    decode_passes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    mixed_s: float = 0.0
    first_tokens_s: float = 0.0
    shared_tokens: int = 0  # of prompts that begin like others, and were not read again

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.decode_s + self.mixed_s

    def since(self, before: Stats) -> Stats:
        """What came to `before`."""
        return Stats(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    def plus(self, more: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))


class Waiting:
    """Requests not yet taken in, made ready no earlier than needed."""

    def __init__(self, requests: Iterable[Generation]) -> None:
        self._more, self._ready = iter(requests), deque[Generation]()

    def first(self, count: int) -> list[Generation]:
        """Up to `count` of them, in order; they go on waiting."""
        self._ready.extend(islice(self._more, max(0, count - len(self._ready))))
        return list(islice(self._ready, count))

    def drop(self, count: int) -> None:
        for _ in range(count):
            self._ready.popleft()

    def __bool__(self) -> bool:
        return bool(self.first(1))


class Batches:
    """Runs sequences through the model. A subclass knows how a pass is executed, and what it has room for.

    Use as a context manager: the lanes' threads end with it.
    """

    config: ModelConfig  # where a checkpoint is loaded

    def __init__(self, plan: RuntimePlan, lanes: Lanes, ranks: Ranks = ALONE) -> None:
        self.plan = plan
        self.lanes = lanes
        self.ranks = ranks
        self.stats = Stats()
        self.batches: list[tuple[int, Stats]] = []  # from empty to empty: most sequences at once, sums

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.lanes.close()

    @property
    def disk(self) -> Lane:
        """The lane that reads weights."""
        return self.lanes.lanes["disk"]

    @torch.inference_mode()
    def run(
        self,
        requests: Iterable[Generation],
        finished: Callable[[Generation], None] = lambda _: None,
        after_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Complete all `requests`, each handed to `finished` as soon as it is; at most N are under way.

        They are taken from the iterator as places become free, so that it may be long, or lazy.
        """
        waiting = Waiting(self.ranks.requests(requests))
        active: Active = ()
        before, most = replace(self.stats), 0
        while active := self._admitted(active, waiting):
            most = max(most, len(active))
            self._timed_pass(active, bool(waiting))
            for place, generation in active:
                if generation.finish:
                    self._leave(place)
                    finished(generation)
            active = [(place, g) for place, g in active if not g.finish]
            after_pass()
            if not active:
                self.batches.append((most, self.stats.since(before)))
                before, most = replace(self.stats), 0
        self.ranks.gather(self._rank_report())

    def _rank_report(self) -> RankReport:
        return RankReport(loaded_bytes=0, bytes_read=self.disk.bytes_read, peak_bytes=peak_bytes())

    def _admitted(self, active: Active, waiting: Waiting) -> Active:
        """`active` and those for which there is room now, in the order of their places."""
        n, most = self.plan.batch.sequences, self.plan.batch.micro_batch
        room = self._room(waiting.first(n - len(active)))
        new = waiting.first(room)
        waiting.drop(room)
        places = pack([len(g.prompt) for g in new], {p: g.length for p, g in active}, n, most)
        for place, generation in sorted(zip(places, new, strict=True), key=lambda member: member[0]):
            self._enter(place, generation)
        return sorted([*active, *zip(places, new, strict=True)], key=lambda member: member[0])

    def _room(self, candidates: Sequence[Generation]) -> int:
        """How many of `candidates`, in their order, may enter."""
        return len(candidates)

    def _enter(self, place: int, generation: Generation) -> None:
        generation.since_s = time.perf_counter()

    def _leave(self, place: int) -> None:
        """The sequence at `place` is done."""

    def _pass(self, active: Active, more: bool) -> None:
        """One pass over tokens of `active` that are not cached; those that have all accept their next token.

        `more`: others wait, so that a pass follows.
        """
        raise NotImplementedError

    def _accept(self, scores: Tensor, active: Active) -> None:
        """Let `active` accept a token each from `scores` [N, vocab]; rank 0 decides."""
        if self.ranks.leads:
            self._draw(scores, active)
        self.ranks.agree([g for _, g in active])

    def _draw(self, scores: Tensor, active: Active) -> None:
        best, values = greedy(scores)
        for row, (_, g) in enumerate(active):
            if not values[row] < float("inf"):  # nor is NaN
                g.finish = "invalid"
                continue
            drawn = g.sampling.temperature > 0
            token = draw(scores[row], g.sampling, g.source) if drawn else best[row]
            if g.top_scored is not None:
                g.scored.append(best_scored(scores[row], token, g.top_scored))
            g.accept(token)

    def _timed_pass(self, active: Active, more: bool) -> None:
        new = [g for _, g in active if not g.tokens]
        cached, said = sum(g.cached for g in new), sum(len(g.tokens) for _, g in active)
        start = time.perf_counter()
        self._pass(active, more)
        end = time.perf_counter()
        stats, first = self.stats, [g for g in new if g.tokens]
        prompt = sum(g.cached for g in new) - cached
        tokens = sum(len(g.tokens) for _, g in active) - said
        stats.requests += len(first)
        stats.first_tokens_s += sum(end - g.since_s for g in first)
        stats.prompt_tokens += prompt
        stats.generated_tokens += tokens
        if len(new) == len(active):
            stats.prefilled_tokens += prompt
            stats.prefill_s += end - start
        elif not new:
            stats.decode_tokens += tokens
            stats.decode_passes += 1
            stats.decode_s += end - start
        else:
            stats.mixed_s += end - start


def goes_on(generation: Generation) -> bool:
    """Whether a pass will follow the one that gives the next token, unless that token is an end."""
    return len(generation.tokens) + 1 < generation.max_tokens


def pack(lengths: Sequence[int], taken: dict[int, int], sequences: int, micro_batch: int) -> list[int]:
    """A place for each new sequence, so that the tokens of micro-batches are balanced.

    Micro-batch j has the places from j·μ on; `taken` has the tokens at those that are not free. Longest
    first, each into the micro-batch with the fewest tokens that has room, among the first that have room for
    all; ties in request order. Source: MoE-Lightning (ASPLOS'25), Algorithm 2.
    """
    room: list[Iterator[int]] = []
    loads: list[tuple[int, int]] = []
    left = len(lengths)
    for first in range(0, sequences, micro_batch):
        places = range(first, min(first + micro_batch, sequences))
        free = [place for place in places if place not in taken]
        if free and left > 0:
            heapq.heappush(loads, (sum(taken.get(place, 0) for place in places), len(room)))
            room.append(iter(free))
            left -= len(free)
    chosen = [0] * len(lengths)
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        place = None
        while place is None:
            tokens, number = heapq.heappop(loads)
            place = next(room[number], None)
        chosen[at] = place
        heapq.heappush(loads, (tokens + lengths[at], number))
    return chosen


def groups(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Cut a row of sequences into groups of at most `most` tokens, or of one sequence."""
    start, tokens = 0, 0
    for at, length in enumerate(lengths):
        if tokens and tokens + length > most:
            yield slice(start, at)
            start, tokens = at, 0
        tokens += length
    if lengths:
        yield slice(start, len(lengths))
