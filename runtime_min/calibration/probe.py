"""A model of any shape with made-up weights in memory, to time the runtime's own operations on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.lanes import (
    ATTENTION,
    COMPUTE,
    EMBED,
    EXPERTS,
    HEAD,
    LANES,
    ROUTE,
    Block,
    Blocks,
    Lanes,
    Row,
)
from moeplan.runtime_min.layers import Routing, sort_by_expert
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.models.tensors import tensor_shapes
from moeplan.runtime_min.operations import DTYPES
from moeplan.runtime_min.paged import decode_batch, prompt_batch
from moeplan.runtime_min.plan_file import (
    KV_BLOCK_TOKENS,
    BatchPlan,
    ModelPlan,
    PagePlan,
    RuntimePlan,
    kv_blocks,
)
from moeplan.runtime_min.sampling import Sampling
from moeplan.runtime_min.stream import Pass, Stream, StreamModel

_MANY_ROWS, _FULL_ROWS = 16, 256
GREEDY = Sampling(0.0, 1.0, 0)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Mixtral; its experts lie one to a page."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    vocab: int

    @property
    def attention_weights(self) -> int:
        """Of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def expert_weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.inner

    @property
    def attention_values(self) -> int:
        """Of one token: its hidden state, queries, keys and values."""
        return self.hidden + (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass(frozen=True, slots=True)
class _InMemory:
    resident: dict[str, Tensor]

    def view(self, layer: int, page: int, slot: int) -> Mapping[str, Tensor]:
        return self.resident


class Probe:
    """The model of `shape`, computing in `dtype`, for up to `sequences` of `context` tokens and for passes of
    up to `tokens`."""

    def __init__(self, shape: Shape, dtype: str, sequences: int, tokens: int, context: int) -> None:
        self.shape = shape
        self._plan = _plan(shape, dtype, sequences, tokens, context)
        config = ModelConfig(norm_eps=1e-5, rope_theta=1e4, tied=False, eos=frozenset())
        shapes = tensor_shapes(self._plan.model, config)
        weights = {name: _weight(sizes, DTYPES[dtype]) for name, sizes in shapes.items()}
        self._model = StreamModel(self._plan, config, _InMemory(weights))
        self._take_blocks()

    def _take_blocks(self) -> None:
        for number in range(self._plan.batch.sequences):
            self._model.cache.take(number, self._plan.batch.context_tokens)

    def prefill(self, sequences: int, prompt: int) -> dict[int, float]:
        """Seconds of attention and of routing in a prefill, summed over layers; experts are left out."""
        batch = prompt_batch(0, [(self._model.cache.table(n), 0, prompt) for n in range(sequences)])
        tokens = torch.randint(self.shape.vocab, (sequences * prompt,))
        step = Pass(tokens, (batch,), 0, torch.arange(1, sequences + 1) * prompt - 1)
        return self._timed(step, (EMBED, ATTENTION, ROUTE))

    def decode(self, sequences: int, context: int) -> dict[int, float]:
        """The same of a decode pass, whose experts run: they drive the other weights out of the caches."""
        tables = [self._model.cache.table(n) for n in range(sequences)]
        batch = decode_batch(0, tables, [context] * sequences)
        tokens = torch.randint(self.shape.vocab, (sequences,))
        step = Pass(tokens, (batch,), 1, torch.arange(sequences))
        return self._timed(step, (EMBED, ATTENTION, ROUTE, EXPERTS))

    def experts(self, rows: int) -> tuple[float]:
        """Mean seconds of an expert that gets `rows` tokens, where they are many only on average.

        Many rows need one layer only; of few, all: each expert then finds its weights out of the caches.
        """
        shape = self.shape
        count = max(1, rows * shape.experts // shape.experts_per_token)
        tokens = torch.zeros(count, dtype=torch.int64)
        self._model.begin(Pass(tokens, (), 0, tokens[-1:]))
        self._model.route_as(self._routing(rows, count))
        layers = 1 if rows >= _FULL_ROWS else shape.layers
        start = time.perf_counter()
        for row in self._order:
            if row[0] == EXPERTS and row[2] < layers:
                self._model.execute(row)
        return ((time.perf_counter() - start) / (layers * shape.experts),)

    def _routing(self, rows: int, tokens: int) -> Routing:
        """Random choices, or, of few rows, the same number for each expert."""
        experts, top = self.shape.experts, self.shape.experts_per_token
        if rows >= _MANY_ROWS:
            chosen = torch.rand(tokens, experts).topk(top).indices
            return sort_by_expert(torch.full((tokens, top), 1 / top), chosen, experts)
        starts = list(range(0, rows * experts + 1, rows))
        return Routing(torch.arange(rows * experts) % tokens, torch.full((rows * experts,), 1 / top), starts)

    def generate(self, sequences: int, passes: int) -> tuple[float, ...]:
        """Of decode passes: mean seconds outside the rows of their schedule, in its first and last one
        (embeddings and scores), and between two rows."""
        lanes = _TimedLanes(self._schedule())
        batches = Stream(self._plan, self._model, lanes, lambda *_: ())
        for number in range(self._plan.batch.sequences):
            self._model.cache.give_back(number)
        batches.run([Generation([1], 1 + passes, GREEDY) for _ in range(sequences)])
        self._take_blocks()
        stats = batches.stats
        outside = stats.decode_s - lanes.inside_s - lanes.between_s
        rows = len(self._order) - 1
        return tuple(s / stats.decode_passes for s in (outside, lanes.ends_s, lanes.between_s / rows))

    def _timed(self, step: Pass, ops: tuple[int, ...]) -> dict[int, float]:
        """Execute the rows of `ops`; seconds of each."""
        taken = dict.fromkeys(ops, 0.0)
        self._model.begin(step)
        for row in self._order:
            if row[0] in taken:
                start = time.perf_counter()
                self._model.execute(row)
                taken[row[0]] += time.perf_counter() - start
        return taken

    @property
    def _order(self) -> list[Row]:
        """The rows of a pass of one micro-batch, as schedule.py issues them where nothing is read."""
        ops = [(EMBED, 0, 0)]
        for layer in range(self.shape.layers):
            ops += [(ATTENTION, layer, 0), (ROUTE, layer, 0)]
            ops += [(EXPERTS, layer, 1 + e) for e in range(self.shape.experts)]
        ops.append((HEAD, self.shape.layers - 1, 0))
        return [(op, COMPUTE, layer, item, -1, 0, 0) for op, layer, item in ops]

    def _schedule(self) -> Any:
        """What `Lanes` asks of a schedule module."""
        rows = np.array(self._order, dtype=np.int64)
        return SimpleNamespace(LANES=LANES, new_clock=lambda: None, issue=lambda *_: rows)


class _TimedLanes(Lanes):
    """Lanes without a disk that add up what the rows of decode passes take, the first and last of them, and
    what lies between them."""

    inside_s = ends_s = between_s = 0.0
    _decode = 0
    _last = 0.0

    def issue(self, decode: int, prefill: int, following: int) -> list[Row]:
        self._decode = decode
        return super().issue(decode, prefill, following)

    def run(self, rows: Sequence[Row], work: Sequence[Blocks]) -> None:
        if self._decode:
            work = [partial(self._timed, row, blocks) for row, blocks in zip(rows, work, strict=True)]
        super().run(rows, work)

    def _timed(self, row: Row, blocks: Blocks) -> Sequence[Block]:
        (block,) = blocks()

        def timed() -> None:
            start = time.perf_counter()
            block()
            end = time.perf_counter()
            if row[0] != EMBED:
                self.between_s += start - self._last
            self.inside_s += end - start
            if row[0] in (EMBED, HEAD):
                self.ends_s += end - start
            self._last = end

        return (timed,)


def _weight(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if len(sizes) == 1:
        return torch.ones(sizes, dtype=dtype)
    return torch.randn(sizes).mul_(1 / math.sqrt(sizes[-1])).to(dtype)


def _plan(shape: Shape, dtype: str, sequences: int, tokens: int, context: int) -> RuntimePlan:
    """As much of a plan as the model looks at."""
    return _zeros(
        RuntimePlan,
        threads=torch.get_num_threads(),
        model=_zeros(
            ModelPlan,
            architecture="mixtral",
            compute_dtype=dtype,
            layers=shape.layers,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab=shape.vocab,
            experts=shape.experts,
            experts_per_token=shape.experts_per_token,
            expert_intermediate=shape.inner,
            moe_layers=shape.layers,
            attention_parameters=shape.attention_weights,
            expert_parameters=shape.expert_weights,
            packing="none",
        ),
        batch=BatchPlan(
            sequences=sequences,
            micro_batch=sequences,
            prefill_tokens=tokens,
            prompt_tokens=context,
            context_tokens=context,
            pass_tokens=tokens,
            kv_tokens=sequences * kv_blocks(context) * KV_BLOCK_TOKENS,
            kv_cache="same",
        ),
        pages=_zeros(
            PagePlan,
            pages_per_layer=1 + shape.experts,
            experts_per_page=1,
            resident_pages=1 + shape.experts,
        ),
    )


def _zeros(record: type[_T], **given: Any) -> _T:
    """A record with the fields that are `given`; the others are 0, whatever their type."""
    return record(**{f.name: given.get(f.name, 0) for f in fields(record)})  # type: ignore[arg-type]
