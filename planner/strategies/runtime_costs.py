"""Model, Kernels -> seconds that the cores take for each operation of the bundled runtime.

Operations, and the calls within them, are those of `runtime_min/operations.py`: attention by micro-batch,
one routing per layer, three products per expert that is hit, one head per pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from moeplan.planner import costs
from moeplan.planner.ir.machine import Kernels, Table
from moeplan.planner.ir.model import Model, Packing
from moeplan.planner.ir.roofline import Roofline

# Choosing a token's experts and sorting by them costs about as much as the norm of so many values.
ROUTE_VALUES = 256
# A further group of sequences in an attention call costs this part of the call.
_SPAN_SHARE = 0.25
# So many weights of a pass lie in a cache, in which products are measured.
NEAR_BYTES = 16 << 20
# Of the bytes of cache that attention reads in a second, where it is int8: two cores of a Sapphire Rapids.
INT8_KV_SHARE = 0.58
# Of one thread, where it was not measured: what `moeplan calibrate` found on a Sapphire Rapids. Those of fp8
# and MXFP4 were never measured: they are int8's and int4's, whose blocks resemble theirs.
UNPACK_VALUES_PER_S: dict[Packing, float] = {"bf12": 9e9, "int8": 6e9, "int4": 4e9, "fp8": 6e9, "mxfp4": 4e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """One pass: `tokens` in all, of `sequences`; each attends to `context` tokens.

    In prefill `context` is the prompt's length. `calls` attention calls take them, in `spans` groups of equal
    (in decode: similar) length; no call takes more than `call_tokens`.
    """

    prefill: bool
    tokens: float
    sequences: float
    context: float
    calls: float
    spans: float
    call_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeCosts:
    """Seconds of operations, for `model` in a dtype of `value_bytes`, its cache in `kv_value_bytes` a value;
    `weights_bytes` are read in a pass."""

    model: Model
    kernels: Kernels
    value_bytes: int
    kv_value_bytes: float
    weights_bytes: float

    def attention(self, step: PassShape) -> float:
        """All attention calls of one layer."""
        k, a = self.kernels, self.model.attention
        weights = self.model.parameters.attention / self.model.layers
        rows = step.tokens / step.calls
        values = self.model.hidden + (a.heads + 2 * a.kv_heads) * a.head_dim
        call_s = k.attention_s if step.prefill or not k.decode_s else _between(k.decode_s, rows)
        fixed_s = (step.calls + _SPAN_SHARE * (step.spans - step.calls)) * call_s
        rates = k.attention_values_per_s if step.prefill else k.decode_values_per_s
        values_s = step.tokens * values / _between(rates, rows)
        return fixed_s + step.calls * self._products(rows, weights) + values_s + self._core(step)

    def _core(self, step: PassShape) -> float:
        """Scores and values: all pairs of a prompt's tokens, or what decode reads of the cache."""
        k, a = self.kernels, self.model.attention
        seen = self._seen(step.context)
        if step.prefill:
            flops = step.tokens * seen * a.prefill_flops_per_pair()
            return flops / _between(k.attention_flops_per_s, step.context)
        nbytes = step.tokens * seen * a.kv_values_per_token() * self.kv_value_bytes
        rate = k.kv_bytes_per_s * (INT8_KV_SHARE if self.kv_value_bytes < self.value_bytes else 1.0)
        return step.tokens * a.kv_heads * k.head_s + nbytes / rate

    def _seen(self, context: float) -> float:
        """Tokens that one attends to, mean over layers."""
        a, layers = self.model.attention, self.model.layers
        if not a.windowed_layers:
            return context
        share = a.windowed_layers / layers
        return (1 - share) * context + share * min(context, a.window_tokens)

    def route(self, step: PassShape) -> float:
        """Norm, choice of experts and sorting of one layer; shared experts and dense MLPs by their mean."""
        k, model, p = self.kernels, self.model, self.model.parameters
        pieces = math.ceil(step.tokens / step.call_tokens)
        rows = step.tokens / pieces
        if not p.router:  # one MLP takes all tokens: the norm is left
            return step.tokens * model.hidden / _between(k.route_values_per_s, rows)
        weights = (p.router + p.shared_experts + p.dense_mlp) / model.layers
        values_s = step.tokens * (model.hidden + ROUTE_VALUES) / _between(k.route_values_per_s, rows)
        return pieces * (self._products(rows, weights) + k.route_s) + values_s

    def experts(self, step: PassShape, experts: int) -> float:
        """`experts` routed experts of one layer, those that are hit."""
        k, model = self.kernels, self.model
        if not experts:
            return 0.0
        hit = experts * float(np.asarray(costs.touched_expert_share(model, step.tokens)))
        rows = step.tokens * model.experts_per_token * experts / model.experts  # of all of them
        pieces = math.ceil(rows / hit / step.call_tokens)
        each = rows / hit / pieces
        values_s = rows * (model.hidden + model.expert_intermediate) / _between(k.expert_values_per_s, each)
        products_s = self._products(each, model.expert_parameters(), self._held_expert_bytes, model.packing)
        return hit * pieces * (products_s + k.expert_s) + values_s

    def ends(self, step: PassShape, head_rows: int, schedule_rows: float) -> float:
        """Embedding, LM head, choice of tokens and bookkeeping of one pass, its schedule included."""
        k, model, n = self.kernels, self.model, step.sequences
        p = model.parameters
        calls = math.ceil(n / head_rows)
        head_s = calls * self._products(n / calls, p.lm_head or p.embedding)
        embedding_s = step.tokens * model.hidden / _between(k.expert_values_per_s, step.tokens)
        fixed_s = k.pass_s + n * k.sequence_s + schedule_rows * k.row_s
        return fixed_s + embedding_s + head_s + n * model.vocab / k.score_values_per_s

    @property
    def _held_expert_bytes(self) -> float:
        """Of one expert, as it lies in memory."""
        return self.model.expert_page_bytes(1, self.value_bytes)

    def _products(
        self, rows: float, weights: float, held_bytes: float | None = None, packing: Packing = "none"
    ) -> float:
        """Products of `rows` with matrices of `weights` in all, one after the other; calls not counted.

        Plain weights lie in the dtype of the arithmetic; rows of packed ones, of `held_bytes` in all, are
        unpacked once for all tokens, into a cache.
        """
        k = self.kernels
        near_s = weights * 2 * rows / _between(k.product_flops_per_s, rows)
        if packing != "none":
            near_s += weights / _unpack_values_per_s(k, packing)
        held = weights * self.value_bytes if held_bytes is None else held_bytes
        return near_s + held * self._far_s_per_byte

    @property
    def _far_s_per_byte(self) -> float:
        return _far_s_per_byte(self.kernels.far_bytes_per_s, self.weights_bytes)


def _unpack_values_per_s(kernels: Kernels, packing: Packing) -> float:
    """Measured, or as the threads of another machine do it."""
    measured = dict(kernels.unpack_values_per_s)
    return measured.get(packing) or kernels.threads * UNPACK_VALUES_PER_S[packing]


def kernels_of(roofline: Roofline) -> tuple[Kernels, ...]:
    """The measured figures for the roofline's dtype, or estimates: for one thread and one per core."""
    machine = roofline.machine
    found = tuple(k for k in machine.kernels if k.dtype == roofline.dtype)
    if found:
        return found
    cores = max(1, round(machine.cpu_cores))
    return tuple(_estimated(roofline, threads, threads / cores) for threads in sorted({1, cores}))


def _estimated(roofline: Roofline, threads: int, share: float) -> Kernels:
    """Kernels of a machine known by its peak and its memory only.

    Small operators take some bytes of memory traffic per value, and attention reaches part of the peak: round
    figures of two cores where both were measured, right within a factor of about two.
    """
    dram, launch_s = roofline.roof("dram"), roofline.machine.launch_s
    nbytes, flops = dram.bytes_per_s * share, dram.flops_per_s * share
    size = 4 if roofline.dtype == "float32" else 2
    products = []
    for rows in (1, 4, 16, 64, 256, 1024):
        knee_s = float(np.asarray(costs.knee(size / nbytes, 2 * rows / flops)))
        products.append((rows, 2 * rows / knee_s))
    return Kernels(
        threads=threads,
        dtype=roofline.dtype,
        attention_s=40 * launch_s,
        route_s=20 * launch_s,
        expert_s=15 * launch_s,
        row_s=launch_s / 3,
        pass_s=40 * launch_s,
        sequence_s=launch_s / 2,
        product_flops_per_s=tuple(products),
        far_bytes_per_s=((2 * NEAR_BYTES, math.inf),),  # memory is in the products already
        attention_flops_per_s=((64, 0.3 * flops), (1024, 0.6 * flops)),
        kv_bytes_per_s=0.5 * nbytes,
        head_s=launch_s / 2 / share / max(1, roofline.machine.cpu_cores),
        attention_values_per_s=((1, nbytes / 36),),
        decode_values_per_s=((1, nbytes / 36),),
        route_values_per_s=((1, nbytes / 36),),
        expert_values_per_s=((1, nbytes / 24),),
        score_values_per_s=nbytes / 20,
    )


@lru_cache
def _far_s_per_byte(far_bytes_per_s: Table, weights_bytes: float) -> float:
    """What weights that no cache holds cost more."""
    sizes, rates = zip(*far_bytes_per_s, strict=True)
    places, extra = [NEAR_BYTES, *sizes], [0.0, *(1 / rate for rate in rates)]
    return float(np.interp(math.log(weights_bytes), np.log(places), extra))


def _between(table: Table, at: float) -> float:
    """The rate, or the seconds, at `at`: straight lines between logarithms, flat beyond the ends."""
    places, rates = _logarithms(table)
    return float(np.exp(np.interp(math.log(max(at, 1e-9)), places, rates)))


@lru_cache
def _logarithms(table: Table) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    places, rates = zip(*table, strict=True)
    return np.log(places), np.log(rates)
