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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_LONG = 5
_FEW_ROWS, _UNPACKED_ROWS = 4, 16
_LEAST_SHARE = 0.05  # of a time that is left when known parts are taken off: no noise makes it negative

# Scores of so many sequences over so many times the large model's vocabulary, more than a core's cache holds.
_SCORE_ROWS, _VOCABULARIES = 16, 32
_CONTEXT = 16  # of decode passes

Table = dict[int, float]
_Key = tuple[str | int, ...]


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
    decodes: tuple[int, ...] = (1, 8, 64)  # sequences in decode
    prompts: tuple[int, ...] = (16, 128, 1024)
    contexts: tuple[int, int] = (32, 512)
    near_bytes: int = NEAR_BYTES
    far_bytes: tuple[int, ...] = FAR_BYTES
    seconds: float = 0.02  # for each time and round
    rounds: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Figures of one number of threads and one dtype, under the names of the machine file.

    attention_s              one attention call beside what its size costs, its four products included
    decode_s                 by sequences: an attention call of decode likewise
    route_s                  one routing likewise, with one product
    expert_s                 one call of an expert likewise, with three products
    row_s                    one row of the schedule
    pass_s, sequence_s       one pass outside the layers, products and choice left out, and one sequence in it
    product_flops_per_s      by rows: products whose weights lie in a cache
    far_bytes_per_s          by the bytes of all weights: what each costs on top of that, if they are so many
    attention_flops_per_s    by prompt tokens: scores and values of prefill, causality not counted
    kv_bytes_per_s, head_s   decode attention: cached bytes, and one key head of one sequence
    attention_values_per_s   by tokens: norm, rotation, storing, residual sum of T · Shape.attention_values
    decode_values_per_s      the same of decode, by sequences
    route_values_per_s       by tokens: norm, choice and sorting of T · (hidden + ROUTE_VALUES)
    expert_values_per_s      by rows: gathering, gate and sum of rows · (hidden + inner)
    score_values_per_s       keeping N · vocabulary scores and taking the best of each row
    unpack_values_per_s      by packing: what products take longer where their weights are packed so
    """

    attention_s: float
    decode_s: Table
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
    decode_values_per_s: Table
    route_values_per_s: Table
    expert_values_per_s: Table
    score_values_per_s: float
    unpack_values_per_s: dict[str, float]


def seconds(work: Callable[[], object], least: float) -> float:
    """The median seconds of `work` over repetitions that fill `least` seconds, after one to warm up."""
    return repeated(_timed(work, 1), least)[0]


def repeated(measure: Callable[[], tuple[float, ...]], least: float) -> tuple[float, ...]:
    """The medians of what `measure` returns over repetitions that fill `least` seconds, after one to warm up.

    What takes `_LONG` times as long needs no warm caches and is measured once.
    """
    start = time.perf_counter()
    taken = [measure()]
    if time.perf_counter() - start > _LONG * least:
        return taken[0]
    while len(taken) < 2 or time.perf_counter() - start < least:
        taken.append(measure())
    return _medians(taken[1:])


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
def measure_kernels(
    threads: Sequence[int], dtypes: Sequence[str], sizes: Sizes
) -> dict[str, dict[int, Kernels]]:
    """The figures by dtype and number of threads; leaves the number of threads as it was.

    Rounds go over everything and a time is the median of its rounds, so that a neighbour who takes a core for
    some seconds spoils one round of a few times, not the figures.
    """
    before = torch.get_num_threads()
    benches = {(dtype, n): _Bench(dtype, sizes) for dtype in dtypes for n in threads}
    try:
        for _ in range(sizes.rounds):
            for (_, n), bench in benches.items():
                torch.set_num_threads(n)
                bench.sweep()
    finally:
        torch.set_num_threads(before)
    return {dtype: {n: benches[dtype, n].kernels() for n in threads} for dtype in dtypes}


class _Bench:
    """Measures in rounds, then solves for figures in turn: a time is what is known and one thing more."""

    def __init__(self, dtype: str, sizes: Sizes) -> None:
        self._dtype, self._sizes = DTYPES[dtype], sizes
        self._least = sizes.seconds
        rows = max(sizes.rows) * max(sizes.small.experts, sizes.large.experts)
        tokens = max(rows, max(sizes.sequences) * sizes.prompt)
        most, context = max(*sizes.sequences, *sizes.decodes), max(sizes.prompt, _CONTEXT) + 1
        self._models = tuple(
            Probe(shape, dtype, most, tokens, context) for shape in (sizes.small, sizes.large)
        )
        self._taken: dict[_Key, list[tuple[float, ...]]] = {}

    def sweep(self) -> None:
        """One round of every time."""
        for key, work in self._works():
            self._taken.setdefault(key, []).append(repeated(work, self._least))

    def _works(self) -> Iterator[tuple[_Key, Callable[[], tuple[float, ...]]]]:
        s = self._sizes
        for nbytes in (s.near_bytes, *s.far_bytes):
            yield ("weights", nbytes), self._weights(nbytes, _FEW_ROWS)
        for rows in s.rows:
            yield ("product", rows), self._weights(s.near_bytes, rows)
        for model, probe in enumerate(self._models):
            for rows in s.rows:
                yield ("expert", model, rows), partial(probe.experts, rows)
            for sequences, prompt in self._batches:
                yield ("layer", model, sequences, prompt), partial(_layer, probe, sequences, prompt)
        # Of the large model: its weights have driven all else out of the caches.
        for sequences in (1, max(s.decodes)):
            yield ("pass", sequences), partial(self._models[1].generate, sequences, 4)
        for prompt in s.prompts:
            yield ("prompt", prompt), self._prompt(prompt)
        for context in s.contexts:
            yield ("decode", context), self._decode_work(context)
        yield ("scores",), self._scores_work()
        yield from self._packed_works()

    def _median(self, *key: str | int) -> tuple[float, ...]:
        return _medians(self._taken[key])

    @property
    def _batches(self) -> list[tuple[int, int]]:
        """Sequences and prompt of the passes whose layers are timed; a prompt of one token is decode."""
        s = self._sizes
        return [*((n, 1) for n in s.decodes), *((n, s.prompt) for n in s.sequences)]

    def kernels(self) -> Kernels:
        s = self._sizes
        self._far_bytes_per_s = self._far()
        expert_s, self._products, expert_values = self._experts()
        flops = {prompt: self._prompt_flops_per_s(prompt) for prompt in s.prompts}
        self._score_values_per_s = _SCORE_ROWS * _VOCABULARIES * s.large.vocab / self._median("scores")[0]
        self._head_s, self._kv_bytes_per_s = self._decode()
        decode_s, route_s, attending, decoding, routing = self._values(flops)
        row_s, pass_s, sequence_s = self._passes()
        return Kernels(
            attention_s=decode_s[min(decode_s)],
            decode_s=decode_s,
            route_s=route_s,
            expert_s=expert_s,
            row_s=row_s,
            pass_s=pass_s,
            sequence_s=sequence_s,
            product_flops_per_s=self._products,
            far_bytes_per_s=self._far_bytes_per_s,
            attention_flops_per_s=flops,
            kv_bytes_per_s=self._kv_bytes_per_s,
            head_s=self._head_s,
            attention_values_per_s=attending,
            decode_values_per_s=decoding,
            route_values_per_s=routing,
            expert_values_per_s=expert_values,
            score_values_per_s=self._score_values_per_s,
            unpack_values_per_s=self._unpacking(),
        )

    def _unpacking(self) -> dict[str, float]:
        """Values per second by which products of some rows are slower with packed weights, in a cache."""
        values = self._sizes.large.inner * self._sizes.large.hidden
        (plain_s,) = self._median("packed", "none")
        names = (key[1] for key in self._taken if key[0] == "packed" and key[1] != "none")
        return {str(name): values / _left(self._median("packed", name)[0], plain_s) for name in names}

    def _packed_works(self) -> Iterator[tuple[_Key, Callable[[], tuple[float, ...]]]]:
        """Products of some rows with one weight, plain and packed."""
        n, k = self._sizes.large.inner, self._sizes.large.hidden
        x, weight = self._random(_UNPACKED_ROWS, k), self._random(n, k).bfloat16()
        yield ("packed", "none"), _timed(partial(linear, x, weight.to(self._dtype)), 1)
        for name, packing in PACKINGS.items():
            if fits((n, k)):
                yield ("packed", name), _timed(partial(linear, x, packed(weight, packing)), 1)

    def _far(self) -> Table:
        """What many bytes of weights in turn cost more than few: by their number, bytes per second."""
        (near,) = self._median("weights", self._sizes.near_bytes)
        size = self._dtype.itemsize
        return {n: size / _left(self._median("weights", n)[0], near) for n in self._sizes.far_bytes}

    def _weights(self, nbytes: int, rows: int) -> Callable[[], tuple[float, ...]]:
        """Seconds per weight of products of `rows` with `nbytes` of matrices in turn."""
        n, k = self._sizes.large.inner, self._sizes.large.hidden
        size = n * k * self._dtype.itemsize
        weights = [torch.full((n, k), 0.01, dtype=self._dtype) for _ in range(max(2, nbytes // size))]
        x = self._random(rows, k)
        return _timed(lambda: [linear(x, w) for w in weights], len(weights) * n * k)

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

        t = call + weights · p(rows) + rows · values · v(rows). Products are timed alone; with one row the
        last term is nothing; with more, both models together give v.
        """
        shapes = self._sizes.small, self._sizes.large
        values = sum(shape.hidden + shape.inner for shape in shapes)
        per_weight_s = {rows: self._median("product", rows)[0] for rows in self._sizes.rows}
        few = min(per_weight_s)
        call_s = _left(self._both(few)[0], shapes[0].expert_weights * per_weight_s[few])
        rest: Table = {}
        for rows, product_s in per_weight_s.items():
            pairs = zip(self._both(rows), shapes, strict=True)
            spent_s = sum(_left(s, call_s + shape.expert_weights * product_s) for s, shape in pairs)
            rest[rows] = rows * values / spent_s
        return call_s, {rows: 2 * rows / s for rows, s in per_weight_s.items()}, rest

    def _both(self, rows: int) -> tuple[float, ...]:
        """Seconds of an expert of each model, memory's part taken off."""
        return tuple(
            _left(self._median("expert", n, rows)[0], self._far_s(shape, shape.expert_weights))
            for n, shape in enumerate((self._sizes.small, self._sizes.large))
        )

    def _values(self, scores: Table) -> tuple[Table, float, Table, Table, Table]:
        """Seconds of an attention call by sequences of decode, and of a routing; by tokens, the rates of what
        else they do in prefill and decode, and in routing.

        In decode t = call + values · v, products taken off: two models, two unknowns. In prefill, and in
        routing of more than one token, the call of one is known, and both models together give v.
        """
        attending: Table = {}
        decoding: Table = {}
        routing: Table = {}
        decode_s: Table = {}
        route_s = 0.0
        for sequences, prompt in self._batches:  # decode of one sequence comes first
            tokens = sequences * prompt
            attended, routed = zip(
                *(self._layer_s(model, sequences, prompt, scores) for model in (0, 1)), strict=True
            )
            if tokens == 1:
                route_s, _ = _line(self._widths(1), routed)
            if prompt == 1:
                decode_s[tokens], value_s = _line(self._widths(0), attended)
                decoding[tokens] = tokens / value_s
            else:
                attending[tokens] = tokens * self._values_per_s(0, attended, decode_s[1])
            routing[tokens] = tokens * self._values_per_s(1, routed, route_s)
        return decode_s, route_s, attending, decoding, routing

    def _values_per_s(self, op: int, taken: Sequence[float], call_s: float) -> float:
        """Of one token in both models, where an operation took them so long and a call is known."""
        return sum(self._widths(op)) / sum(_left(seconds, call_s) for seconds in taken)

    def _widths(self, op: int) -> tuple[int, int]:
        """Values that one token has in attention (0) or routing (1) of the small and of the large model."""
        small, large = self._sizes.small, self._sizes.large
        if op == 0:
            return small.attention_values, large.attention_values
        return small.hidden + ROUTE_VALUES, large.hidden + ROUTE_VALUES

    def _layer_s(self, model: int, sequences: int, prompt: int, scores: Table) -> tuple[float, float]:
        """Of one layer's attention and routing, products and scores taken off; decode where prompt is 1."""
        shape, tokens = (self._sizes.small, self._sizes.large)[model], sequences * prompt
        attending, routing = self._median("layer", model, sequences, prompt)
        if prompt > 1:
            scores_s = 4 * tokens * prompt * shape.heads * shape.head_dim / between(scores, prompt)
        else:
            nbytes = tokens * _CONTEXT * 2 * shape.kv_heads * shape.head_dim * self._dtype.itemsize
            scores_s = tokens * shape.kv_heads * self._head_s + nbytes / self._kv_bytes_per_s
        products = self._product_s(shape, tokens, shape.attention_weights)
        router = self._product_s(shape, tokens, shape.experts * shape.hidden)
        return _left(attending, products + scores_s), _left(routing, router)

    def _passes(self) -> tuple[float, float, float]:
        """Seconds of a schedule's row, of a pass outside its layers, and of a sequence in it."""
        shape, many = self._sizes.large, max(self._sizes.decodes)
        few_s, ends_s, row_s = self._median("pass", 1)
        pass_s = few_s + _left(ends_s, self._product_s(shape, 1, shape.vocab * shape.hidden))
        scores_s = (many - 1) * shape.vocab / self._score_values_per_s
        many_s = self._median("pass", many)[0]
        return row_s, pass_s, _left(many_s, few_s + scores_s) / max(1, many - 1)

    def _decode(self) -> tuple[float, float]:
        """Seconds per key head of a sequence, and cached bytes per second: a line through two contexts."""
        heads = max(self._sizes.sequences) * self._sizes.large.kv_heads
        taken = [self._median("decode", context)[0] for context in self._sizes.contexts]
        width = 2 * heads * self._sizes.large.head_dim * self._dtype.itemsize
        nbytes = [width * context for context in self._sizes.contexts]
        rate = (nbytes[1] - nbytes[0]) / _left(taken[1], taken[0])
        return _left(taken[0], nbytes[0] / rate) / heads, rate

    def _decode_work(self, context: int) -> Callable[[], tuple[float, ...]]:
        """Of decode attention alone, one layer's cache after the other: more than the CPU's holds."""
        shape, sequences = self._sizes.large, max(self._sizes.sequences)
        tokens = sequences * kv_blocks(context) * KV_BLOCK_TOKENS
        layer_bytes = 2 * tokens * shape.kv_heads * shape.head_dim * self._dtype.itemsize
        layers = max(2, self._sizes.far_bytes[0] // layer_bytes)
        cache = PagedCache(layers, shape.kv_heads, shape.head_dim, tokens, self._dtype)
        for number in range(sequences):
            cache.take(number, context)
        q = self._random(sequences, shape.heads, shape.head_dim)
        batch = decode_batch(0, [cache.table(n) for n in range(sequences)], [context] * sequences)

        def work() -> None:
            for layer in range(layers):
                decode_attention(q, *cache.layer(layer), batch.tables, batch.lengths)

        return _timed(work, layers)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape).mul_(1 / math.sqrt(shape[-1])).to(self._dtype)

    def _prompt_flops_per_s(self, prompt: int) -> float:
        shape = self._sizes.large
        return 4 * prompt**2 * shape.heads * shape.head_dim / self._median("prompt", prompt)[0]

    def _prompt(self, prompt: int) -> Callable[[], tuple[float, ...]]:
        """Seconds of the attention of one prompt, among several."""
        shape = self._sizes.large
        count = max(1, max(self._sizes.sequences) * self._sizes.prompt // prompt)
        q = self._random(count * prompt, shape.heads, shape.head_dim)
        k = self._random(count * prompt, shape.kv_heads, shape.head_dim)
        return _timed(lambda: prompt_attention(q, k, k, prompt), count)

    def _scores_work(self) -> Callable[[], tuple[float, ...]]:
        rows, vocab = _SCORE_ROWS, _VOCABULARIES * self._sizes.large.vocab
        product, kept = self._random(rows, vocab), torch.empty(rows, vocab)

        def work() -> None:
            kept[:rows] = product
            greedy(kept)

        return _timed(work, 1)


def _timed(work: Callable[[], object], parts: int) -> Callable[[], tuple[float, ...]]:
    """Seconds of one of the `parts` of `work`."""

    def timed() -> tuple[float, ...]:
        start = time.perf_counter()
        work()
        return ((time.perf_counter() - start) / parts,)

    return timed


def _layer(probe: Probe, sequences: int, prompt: int) -> tuple[float, float]:
    """Seconds of one layer's attention and routing."""
    ops = probe.decode(sequences, _CONTEXT) if prompt == 1 else probe.prefill(sequences, prompt)
    return ops[ATTENTION] / probe.shape.layers, ops[ROUTE] / probe.shape.layers


def _medians(taken: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(statistics.median(column) for column in zip(*taken, strict=True))


def _left(whole: float, known: float) -> float:
    """What is left of a measured time, never less than a share of it."""
    return max(whole - known, _LEAST_SHARE * abs(whole))


def _line(at: Sequence[float], taken: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope through two points, neither less than a share of what is measured."""
    slope = _left(abs(taken[1] - taken[0]), 0.0) / abs(at[1] - at[0])
    return _left(min(taken), slope * min(at)), slope
