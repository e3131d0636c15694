"""How fast this runtime's own operations run here, for one number of threads and one dtype.

The planner counts calls, weights, values and cached bytes of a pass as `operations.py` executes them, and
turns each count into seconds with one of the figures below. Products, scores and attention of prompts are
timed alone; the rest is what is left of the model's operations when these are taken off, so that it holds
whatever the operations cost beside them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime_min.attention import prompt_attention
from moeplan.runtime_min.calibration.probe import Probe, Shape
from moeplan.runtime_min.decode_attention import decode_attention
from moeplan.runtime_min.formats import PACKINGS, fits
from moeplan.runtime_min.lanes import ATTENTION, ROUTE
from moeplan.runtime_min.layers import linear
from moeplan.runtime_min.operations import DTYPES
from moeplan.runtime_min.packing import packed
from moeplan.runtime_min.paged import PagedCache, decode_batch
from moeplan.runtime_min.plan_file import KV_BLOCK_TOKENS, kv_blocks
from moeplan.runtime_min.sampling import greedy

# Weights that lie in a cache between two uses, and weights that lie further and further away.
NEAR_BYTES, FAR_BYTES = 16 << 20, (64 << 20, 192 << 20, 512 << 20)
# Choosing a token's experts and sorting by them costs about as much as the norm of so many values.
ROUTE_VALUES = 256
_UNPACKED_ROWS = 16
_LEAST_SHARE = 0.05  # of a time that is left when known parts are taken off: no noise makes it negative

Table = dict[int, float]


_SMALL = Shape(
    layers=6,
    hidden=256,
    inner=512,
    heads=4,
    kv_heads=2,
    head_dim=64,
    experts=8,
    experts_per_token=2,
    vocab=8192,
)
_LARGE = Shape(
    layers=1,
    hidden=1024,
    inner=2048,
    heads=16,
    kv_heads=8,
    head_dim=64,
    experts=4,
    experts_per_token=2,
    vocab=1024,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured: two models, in which calls and work weigh differently, at some rows and tokens."""

    small: Shape = _SMALL
    large: Shape = _LARGE
    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    prompt: int = 128
    sequences: tuple[int, ...] = (1, 4, 16)  # of `prompt` tokens each, in prefill
    prompts: tuple[int, ...] = (16, 128, 1024)
    contexts: tuple[int, int] = (32, 512)
    near_bytes: int = NEAR_BYTES
    far_bytes: tuple[int, ...] = FAR_BYTES
    seconds: float = 0.06  # for each figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Figures of one number of threads and one dtype, under the names of the machine file.

    attention_s              one attention call beside what its size costs, its four products included
    route_s                  one routing likewise, with one product
    expert_s                 one call of an expert likewise, with three products
    row_s                    one row of the schedule
    pass_s, sequence_s       one pass outside the layers, and one sequence in it
    product_flops_per_s      by rows: products whose weights lie in a cache
    far_bytes_per_s          by the bytes of all weights: what each costs on top of that, if they are so many
    attention_flops_per_s    by prompt tokens: scores and values of prefill, causality not counted
    kv_bytes_per_s, head_s   decode attention: cached bytes, and one key head of one sequence
    attention_values_per_s   by tokens: norm, rotation, storing, residual sum of T · Shape.attention_values
    route_values_per_s       by tokens: norm, choice and sorting of T · (hidden + ROUTE_VALUES)
    expert_values_per_s      by rows: gathering, gate and sum of rows · (hidden + inner)
    score_values_per_s       keeping N · vocabulary scores and taking the best of each row
    unpack_values_per_s      by packing: what products take longer where their weights are packed so
    """

    attention_s: float
    route_s: float
    expert_s: float
    row_s: float
    pass_s: float
    sequence_s: float
    product_flops_per_s: Table
    far_bytes_per_s: Table
    attention_flops_per_s: Table
    kv_bytes_per_s: float
    head_s: float
    attention_values_per_s: Table
    route_values_per_s: Table
    expert_values_per_s: Table
    score_values_per_s: float
    unpack_values_per_s: dict[str, float]


def seconds(work: Callable[[], object], least: float) -> float:
    """The median seconds of `work` over repetitions that fill `least` seconds, after one to warm up."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return repeated(timed, least)


def repeated(measure: Callable[[], float], least: float) -> float:
    """The median result of `measure` over repetitions that fill `least` seconds, after one to warm up."""
    measure()
    taken: list[float] = []
    end = time.perf_counter() + least
    while len(taken) < 3 or time.perf_counter() < end:
        taken.append(measure())
    return statistics.median(taken)


def between(table: Mapping[int, float], at: float) -> float:
    """The rate at `at`, straight lines between logarithms, flat beyond the ends; as the planner reads it."""
    places = sorted(table)
    low = max((p for p in places if p <= at), default=places[0])
    high = min((p for p in places if p >= at), default=places[-1])
    if low == high:
        return table[low]
    share = math.log(at / low) / math.log(high / low)
    return math.exp((1 - share) * math.log(table[low]) + share * math.log(table[high]))


@torch.inference_mode()
def measure_kernels(threads: int, dtype: str, sizes: Sizes) -> Kernels:
    """The figures for `threads` and `dtype`; leaves the number of threads as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _Bench(dtype, sizes).kernels()
    finally:
        torch.set_num_threads(before)


class _Bench:
    """Solves for one figure after the other: each time is what is known already plus one thing more."""

    def __init__(self, dtype: str, sizes: Sizes) -> None:
        self._dtype, self._sizes = DTYPES[dtype], sizes
        self._least = sizes.seconds
        most = max(sizes.sequences)
        tokens = max(sizes.rows) * max(sizes.small.experts, sizes.large.experts)
        prompt = max(sizes.prompt, -(-tokens // most))
        self._small, self._large = (
            Probe(shape, dtype, most, prompt, max(prompt, 16) + 1) for shape in (sizes.small, sizes.large)
        )

    def kernels(self) -> Kernels:
        s = self._sizes
        self._far_bytes_per_s = self._far()
        expert_s, self._products, expert_values = self._experts()
        flops = {prompt: self._prompt_flops_per_s(prompt) for prompt in s.prompts}
        self._score_values_per_s = self._scores()
        attention_s, route_s, attending, routing = self._values(flops)
        row_s, pass_s, sequence_s = self._passes()
        head_s, kv_bytes_per_s = self._decode()
        return Kernels(
            attention_s=attention_s,
            route_s=route_s,
            expert_s=expert_s,
            row_s=row_s,
            pass_s=pass_s,
            sequence_s=sequence_s,
            product_flops_per_s=self._products,
            far_bytes_per_s=self._far_bytes_per_s,
            attention_flops_per_s=flops,
            kv_bytes_per_s=kv_bytes_per_s,
            head_s=head_s,
            attention_values_per_s=attending,
            route_values_per_s=routing,
            expert_values_per_s=expert_values,
            score_values_per_s=self._score_values_per_s,
            unpack_values_per_s=self._unpacking(),
        )

    def _unpacking(self) -> dict[str, float]:
        """Values per second by which products of some rows are slower with packed weights, in a cache."""
        n, k = self._sizes.large.inner, self._sizes.large.hidden
        x, weight = self._random(_UNPACKED_ROWS, k), self._random(n, k).bfloat16()
        plain = weight.to(self._dtype)
        plain_s = seconds(lambda: linear(x, plain), self._least)
        return {
            name: n * k / _left(seconds(partial(linear, x, packed(weight, packing)), self._least), plain_s)
            for name, packing in PACKINGS.items()
            if fits((n, k))
        }

    def _far(self) -> Table:
        """What many bytes of weights in turn cost more than few: by their number, bytes per second."""
        near = self._weights_s(self._sizes.near_bytes)
        return {n: 1 / _left(self._weights_s(n), near) for n in self._sizes.far_bytes}

    def _weights_s(self, nbytes: int) -> float:
        """Seconds per byte of products of a few rows with `nbytes` of matrices in turn."""
        n, k = self._sizes.large.inner, self._sizes.large.hidden
        size = n * k * self._dtype.itemsize
        weights = [torch.full((n, k), 0.01, dtype=self._dtype) for _ in range(max(2, nbytes // size))]
        x = self._random(4, k)
        return seconds(lambda: [linear(x, w) for w in weights], self._least) / (len(weights) * size)

    def _far_s(self, shape: Shape, weights: int) -> float:
        """The part of `weights` of a pass that is due to memory, in a model of `shape`."""
        nbytes = shape.layers * (shape.attention_weights + shape.experts * shape.expert_weights)
        extra = {self._sizes.near_bytes: 0.0, **{n: 1 / r for n, r in self._far_bytes_per_s.items()}}
        share = float(
            np.interp(math.log(nbytes * self._dtype.itemsize), np.log(list(extra)), list(extra.values()))
        )
        return share * weights * self._dtype.itemsize

    def _product_s(self, shape: Shape, rows: float, weights: int) -> float:
        """Of products that are called already, `weights` of a model of `shape`."""
        return 2 * rows * weights / between(self._products, rows) + self._far_s(shape, weights)

    def _experts(self) -> tuple[float, Table, Table]:
        """Of an expert: seconds of a call, and by rows the rates of its products and of the rest.

        Times of both models at the same rows: t = call + weights · p(rows) + rows · values · v(rows). With
        one row the last term is nothing.
        """
        taken = {rows: self._both(rows) for rows in self._sizes.rows}
        small, large = self._sizes.small, self._sizes.large
        first = taken[min(taken)]
        weights = (small.expert_weights, large.expert_weights)
        values = (small.hidden + small.inner, large.hidden + large.inner)
        call_s = _left(first[0], weights[0] * _left(first[1], first[0]) / (weights[1] - weights[0]))
        products: Table = {}
        rest: Table = {}
        for rows, (small_s, large_s) in taken.items():
            ratio = values[1] / values[0]
            per_weight_s = _left(large_s, call_s + ratio * (small_s - call_s)) / (
                weights[1] - ratio * weights[0]
            )
            products[rows] = 2 * rows / per_weight_s
            rest[rows] = rows * values[0] / _left(small_s, call_s + weights[0] * per_weight_s)
        return call_s, products, rest

    def _both(self, rows: int) -> tuple[float, float]:
        """Seconds of an expert of each model, memory's part taken off."""
        small, large = (
            _left(
                repeated(partial(probe.experts, rows), self._least),
                self._far_s(probe.shape, probe.shape.expert_weights),
            )
            for probe in (self._small, self._large)
        )
        return small, large

    def _values(self, scores: Table) -> tuple[float, float, Table, Table]:
        """Seconds of an attention call and of a routing; by tokens, the rates of what else they do.

        With one token t = call + values · v, products taken off: two models, two unknowns. With more tokens
        the call is known, and both models together give v.
        """
        attending: Table = {}
        routing: Table = {}
        calls = [0.0, 0.0]
        few = [(n, 1) for n in (1, 8) if n <= max(self._sizes.sequences)]
        for sequences, prompt in [*few, *((n, self._sizes.prompt) for n in self._sizes.sequences)]:
            tokens = sequences * prompt
            left = [self._layer_s(p, sequences, prompt, scores) for p in (self._small, self._large)]
            if tokens == 1:
                calls = [_line(self._widths(op), [s[op] for s in left])[0] for op in (0, 1)]
            for op, table in enumerate((attending, routing)):
                spent = sum(_left(seconds[op], calls[op]) for seconds in left)
                table[tokens] = tokens * sum(self._widths(op)) / spent
        return calls[0], calls[1], attending, routing

    def _widths(self, op: int) -> tuple[int, int]:
        """Values that one token has in attention (0) or routing (1) of the small and of the large model."""
        small, large = self._sizes.small, self._sizes.large
        if op == 0:
            return small.attention_values, large.attention_values
        return small.hidden + ROUTE_VALUES, large.hidden + ROUTE_VALUES

    def _layer_s(self, probe: Probe, sequences: int, prompt: int, scores: Table) -> tuple[float, float]:
        """Of one layer's attention and routing, products and scores taken off; decode where prompt is 1."""
        shape, tokens = probe.shape, sequences * prompt
        if prompt == 1:
            ops, scores_s = _ops(lambda: probe.decode(sequences, 16), self._least * 2), 0.0
        else:
            ops = _ops(lambda: probe.prefill(sequences, prompt), self._least)
            scores_s = 4 * tokens * prompt * shape.heads * shape.head_dim / between(scores, prompt)
        attending, routing = ops[ATTENTION] / shape.layers, ops[ROUTE] / shape.layers
        products = self._product_s(shape, tokens, shape.attention_weights)
        router = self._product_s(shape, tokens, shape.experts * shape.hidden)
        return _left(attending, products + scores_s), _left(routing, router)

    def _passes(self) -> tuple[float, float, float]:
        """Seconds of a schedule's row, of a pass outside its rows, and of a sequence in it."""
        many = max(self._sizes.sequences)
        few_s, _ = self._generate(self._small, 1)
        many_s, _ = self._generate(self._small, many)
        # Between the rows of the large model: its weights have driven all else out of the caches.
        _, row_s = self._generate(self._large, 1)
        scores_s = (many - 1) * self._sizes.small.vocab / self._score_values_per_s
        return row_s, few_s, _left(many_s, few_s + scores_s) / (many - 1)

    def _generate(self, probe: Probe, sequences: int) -> tuple[float, float]:
        taken = [probe.generate(sequences, 8) for _ in range(5)]
        return statistics.median(t[0] for t in taken), statistics.median(t[1] for t in taken)

    def _decode(self) -> tuple[float, float]:
        """Seconds per key head of a sequence, and cached bytes per second: a line through two contexts."""
        heads = max(self._sizes.sequences) * self._sizes.large.kv_heads
        taken = [self._decode_s(context) for context in self._sizes.contexts]
        width = 2 * heads * self._sizes.large.head_dim * self._dtype.itemsize
        nbytes = [width * context for context in self._sizes.contexts]
        rate = (nbytes[1] - nbytes[0]) / _left(taken[1], taken[0])
        return _left(taken[0], nbytes[0] / rate) / heads, rate

    def _decode_s(self, context: int) -> float:
        """Of decode attention alone, one layer's cache after the other."""
        shape, sequences, layers = self._sizes.large, max(self._sizes.sequences), 4
        tokens = sequences * kv_blocks(context) * KV_BLOCK_TOKENS
        cache = PagedCache(layers, shape.kv_heads, shape.head_dim, tokens, self._dtype)
        for number in range(sequences):
            cache.take(number, context)
        q = self._random(sequences, shape.heads, shape.head_dim)
        batch = decode_batch(0, [cache.table(n) for n in range(sequences)], [context] * sequences)

        def work() -> None:
            for layer in range(layers):
                decode_attention(q, *cache.layer(layer), batch.tables, batch.lengths)

        return seconds(work, self._least) / layers

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape).mul_(1 / math.sqrt(shape[-1])).to(self._dtype)

    def _prompt_flops_per_s(self, prompt: int) -> float:
        shape = self._sizes.large
        count = max(1, max(self._sizes.sequences) * self._sizes.prompt // prompt)
        q = self._random(count * prompt, shape.heads, shape.head_dim)
        k = self._random(count * prompt, shape.kv_heads, shape.head_dim)
        flops = 4 * count * prompt**2 * shape.heads * shape.head_dim
        return flops / seconds(lambda: prompt_attention(q, k, k, prompt), self._least)

    def _scores(self) -> float:
        rows, vocab = 16, 2 * self._sizes.large.vocab
        product, kept = self._random(rows, vocab), torch.empty(rows, vocab)

        def work() -> None:
            kept[:rows] = product
            greedy(kept)

        return rows * vocab / seconds(work, self._least)


def _ops(run: Callable[[], Mapping[int, float]], least: float) -> dict[int, float]:
    """The median seconds of each operation over passes that fill `least` seconds."""
    run()
    passes: list[Mapping[int, float]] = []
    end = time.perf_counter() + least
    while len(passes) < 3 or time.perf_counter() < end:
        passes.append(run())
    return {op: statistics.median([p[op] for p in passes]) for op in passes[0]}


def _left(whole: float, known: float) -> float:
    """What is left of a measured time, never less than a share of it."""
    return max(whole - known, _LEAST_SHARE * abs(whole))


def _line(at: Sequence[float], taken: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope through two points, neither less than a share of what is measured."""
    slope = _left(abs(taken[1] - taken[0]), 0.0) / abs(at[1] - at[0])
    return _left(min(taken), slope * min(at)), slope
