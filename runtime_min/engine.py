"""Batches of sequences through the model: prefill once, then one token each per pass until all are done."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from moeplan.runtime_min.lanes import (
    Lane,
    Lanes,
)
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.plan_file import RuntimePlan
from moeplan.runtime_min.sampling import Sampling, draw, generator, greedy


@dataclass(slots=True)
class Generation:
    """A request under way. `ends` are tokens that finish it, `stopped` a test of the tokens so far."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    ends: frozenset[int] = frozenset()
    stopped: Callable[[Sequence[int]], bool] | None = None
    tokens: list[int] = field(default_factory=list)
    finish: Literal["", "stop", "length"] = ""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def accept(self, token: int) -> None:
        """Append the next token; set `finish` if it is the last."""
        self.tokens.append(token)
        if token in self.ends or (self.stopped is not None and self.stopped(self.tokens)):
            self.finish = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish = "length"


Active = Sequence[tuple[int, Generation]]  # (place in the KV cache, generation), places ascending


@dataclass(slots=True)
class Stats:
    """Sums over the passes so far; `decode_tokens` leaves out the tokens that prefill passes gave."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_tokens: int = 0
    decode_passes: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    def since(self, before: Stats) -> Stats:
        """What came to `before`."""
        return Stats(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    def plus(self, more: Stats) -> Stats:
        """Both together."""
        return Stats(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))


class Batches:
    """Runs batches of sequences, pass by pass. A subclass knows how a pass is executed.

    Use as a context manager: the lanes' threads end with it.
    """

    config: ModelConfig  # where a checkpoint is loaded

    def __init__(self, plan: RuntimePlan, lanes: Lanes) -> None:
        self.plan = plan
        self.lanes = lanes
        self.stats = Stats()
        self.batches: list[tuple[int, Stats]] = []  # sequences and sums of each batch
        self._sources: dict[int, torch.Generator] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        generations: Sequence[Generation],
        finished: Callable[[Generation], None] = lambda _: None,
        more: bool = False,
        after_pass: Callable[[], None] = lambda: None,
    ) -> None:
        """Complete a batch of at most N generations, each handed to `finished` as soon as it is.

        `more` says that another batch follows, for which weights may be read ahead.
        """
        before = replace(self.stats)
        order = pack([len(g.prompt) for g in generations], self.plan.batch.micro_batch)
        active = [(place, generations[at]) for place, at in enumerate(order)]
        self._sources = {id(g): generator(g.sampling) for g in generations}
        prefill = True
        while active:
            start = time.perf_counter()
            self._pass(active, prefill, more)
            self._count(active, prefill, time.perf_counter() - start)
            for _, generation in active:
                if generation.finish:
                    finished(generation)
            active = [(place, g) for place, g in active if not g.finish]
            prefill = False
            after_pass()
        self.batches.append((len(generations), self.stats.since(before)))

    def _pass(self, active: Active, prefill: bool, more: bool) -> None:
        """One pass over the prompts or the newest tokens of `active`; each accepts its next token."""
        raise NotImplementedError

    def _accept(self, scores: Tensor, active: Active) -> None:
        """Let `active` accept a token each from `scores` [N, vocab]."""
        for (_, generation), token in zip(active, choose(scores, active, self._sources), strict=True):
            generation.accept(token)

    def _count(self, active: Active, prefill: bool, seconds: float) -> None:
        self.stats.generated_tokens += len(active)
        if prefill:
            self.stats.prompt_tokens += sum(len(g.prompt) for _, g in active)
            self.stats.prefill_s += seconds
        else:
            self.stats.decode_tokens += len(active)
            self.stats.decode_passes += 1
            self.stats.decode_s += seconds


def goes_on(generation: Generation) -> bool:
    """Whether a pass will follow the one that gives the next token, unless that token is an end."""
    return len(generation.tokens) + 1 < generation.max_tokens


def pack(lengths: Sequence[int], micro_batch: int) -> list[int]:
    """The order of sequences in the batch: micro-batch after micro-batch, their tokens balanced.

    Longest first, each into the micro-batch with the fewest tokens that has room; ties in request order.
    Source: MoE-Lightning (ASPLOS'25), Algorithm 2.
    """
    bins: list[list[int]] = [[] for _ in range(-(-len(lengths) // micro_batch))]
    room = [(0, number) for number in range(len(bins))]
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        tokens, number = heapq.heappop(room)
        bins[number].append(at)
        if len(bins[number]) < micro_batch:
            heapq.heappush(room, (tokens + lengths[at], number))
    return [at for members in sorted(bins, key=len, reverse=True) for at in members]


def groups(lengths: Sequence[int], most: int) -> list[slice]:
    """Cut a row of sequences into groups of at most `most` tokens, or of one sequence."""
    cuts, tokens = [0], 0
    for at, length in enumerate(lengths):
        if tokens and tokens + length > most:
            cuts.append(at)
            tokens = 0
        tokens += length
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


def choose(scores: Tensor, active: Active, sources: dict[int, torch.Generator]) -> list[int]:
    """The next token of each active generation from scores [N, vocab]."""
    tokens = greedy(scores)
    for row, (_, g) in enumerate(active):
        if g.sampling.temperature > 0:
            tokens[row] = draw(scores[row], g.sampling, sources[id(g)])
    return tokens
