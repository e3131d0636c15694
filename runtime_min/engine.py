"""Batches of sequences through the model: prefill once, then one token each per pass until all are done."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor

from moeplan.runtime_min.attention import MicroBatch, decode_batch, prefill_batch
from moeplan.runtime_min.checkpoint import find_tensors
from moeplan.runtime_min.cpu import keep_freed_memory
from moeplan.runtime_min.lanes import (
    LANES,
    OPS,
    READ,
    Block,
    Blocks,
    Lane,
    Lanes,
    Row,
    check_schedule,
    load_schedule,
    single,
)
from moeplan.runtime_min.limits import check_memory, check_numbers
from moeplan.runtime_min.model_config import ModelConfig, read_config
from moeplan.runtime_min.models.mixtral import DTYPES, Mixtral, Pass, page_names, tensor_shapes
from moeplan.runtime_min.pages import PageStore
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


Read = Callable[[int, int, int], Sequence[Block]]  # layer, page, slot


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


class Stream(Batches):
    """All tokens of a pass through page after page of the weights."""

    def __init__(self, plan: RuntimePlan, model: Mixtral, lanes: Lanes, read: Read) -> None:
        super().__init__(plan, lanes)
        self.model = model
        self._read = read

    def _pass(self, active: Active, prefill: bool, more: bool) -> None:
        step = self._prefill(active) if prefill else self._decode(active)
        following = more or any(goes_on(g) for _, g in active)
        self.execute(step, prefill, following)
        self._accept(self.model.logits, active)

    def execute(self, step: Pass, prefill: bool, following: bool) -> None:
        """One pass of the schedule; the model has its scores. `following`: another comes."""
        count = len(step.micro_batches)
        self.model.begin(step)
        rows = self.lanes.issue(0 if prefill else count, count if prefill else 0, int(following))
        self.lanes.run(rows, [self._work(row) for row in rows])

    def _work(self, row: Row) -> Blocks:
        op, _, layer, item, slot = row[:5]
        return partial(self._read, layer, item, slot) if op == READ else single(self.model.execute, row)

    def _prefill(self, active: Active) -> Pass:
        """All prompts, in micro-batches of about `prefill_tokens` tokens of whole prompts."""
        lengths = [len(g.prompt) for _, g in active]
        batches: list[MicroBatch] = []
        row = 0
        for group in groups(lengths, self.plan.batch.prefill_tokens):
            batches.append(prefill_batch(row, [place for place, _ in active[group]], lengths[group]))
            row = batches[-1].rows.stop
        tokens = torch.tensor([token for _, g in active for token in g.prompt])
        return Pass(tokens, tuple(batches), torch.tensor(lengths).cumsum(0) - 1)

    def _decode(self, active: Active) -> Pass:
        """The newest token of each sequence, in micro-batches of at most μ."""
        most = self.plan.batch.micro_batch
        batches = []
        for row in range(0, len(active), most):
            part = active[row : row + most]
            batches.append(decode_batch(row, [place for place, _ in part], [g.length for _, g in part]))
        tokens = torch.tensor([g.tokens[-1] for _, g in active])
        return Pass(tokens, tuple(batches), torch.arange(len(active)))


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


class Engine(Stream):
    """A stream plan with its checkpoint loaded."""

    def __init__(self, folder: Path, plan: RuntimePlan, checkpoint: Path) -> None:
        m, pages = plan.model, plan.pages
        check_numbers(folder / "runtime.json", plan)
        schedule = load_schedule(folder, plan)
        check_schedule(schedule, "stream", stream_constants(plan))
        self.config = read_config(checkpoint, m, plan.batch.context_tokens)
        shapes = tensor_shapes(m, self.config.tied)
        refs = find_tensors(checkpoint, shapes)
        moving = {
            name
            for layer in range(m.layers)
            for page in range(pages.resident_pages, pages.pages_per_layer)
            for name in page_names(m, pages, layer, page)
        }
        check_memory(folder / "runtime.json", plan, shapes, moving)
        torch.set_num_threads(plan.threads)
        keep_freed_memory()
        dtype = DTYPES[m.compute_dtype]
        self._pages = PageStore(refs, m.layers, pages, lambda *at: page_names(m, pages, *at), dtype)
        lanes = Lanes(schedule, pages.readers)
        super().__init__(plan, Mixtral(plan, self.config, self._pages), lanes, self._pages.blocks)

    def close(self) -> None:
        super().close()
        self._pages.close()


def stream_constants(plan: RuntimePlan) -> dict[str, object]:
    """What schedule.py has to say for a stream plan."""
    return {
        "LANES": LANES,
        "OPS": OPS,
        "layers": plan.model.layers,
        "pages": plan.pages.pages_per_layer,
        "resident": plan.pages.resident_pages,
        "slots": plan.pages.slots,
    }


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
