"""Workload, Machine -> Roofline: effective roofs and turning points of the Hierarchical Roofline Model.

Source: MoE-Lightning (ASPLOS'25), section 3, Eq. 4-11.
"""

from __future__ import annotations

import itertools
import math

from moeplan.planner.ir.machine import Level, Machine
from moeplan.planner.ir.model import Model
from moeplan.planner.ir.roofline import Roof, Roofline, TurningPoint
from moeplan.planner.ir.spec import Dtype
from moeplan.planner.ir.workload import BYTES_PER_VALUE, Workload

# Copies from pageable memory reach this share of pinned ones (14.4 of 26.2 GB/s on a Gen4 x16 box).
PAGEABLE_SHARE = 0.55
# Where a processor lacks a dtype, what it computes in instead, same bytes first (a T4 has no bf16).
# The first level computes in a dtype of the wanted size; a host beside a GPU may widen.
_STAND_INS: dict[Dtype, tuple[Dtype, ...]] = {
    "bf16": ("bf16", "fp16"),
    "fp16": ("fp16", "bf16"),
    "float32": ("float32",),
}
_REFERENCE_MICRO_BATCH = 128


def find_roofline(workload: Workload, machine: Machine) -> Roofline:
    """Return what `machine` really gives for `workload`'s dtype, and where offloading pays."""
    dtype = computed_dtype(machine.levels[0], workload.dtype) or workload.dtype
    roofs: list[Roof] = []
    for level in machine.levels:
        widened = "float32" if roofs else ""
        fastest = roofs[-1].bytes_per_s if roofs else math.inf
        roofs.append(level_roof(level, computed_dtype(level, workload.dtype) or widened, fastest))
    points = tuple(
        turning_point(workload.model, fast, slow, workload.dtype, _REFERENCE_MICRO_BATCH)
        for fast, slow in itertools.pairwise(roofs)
        if fast.flops_per_s
    )
    return Roofline(machine=machine, dtype=dtype, roofs=tuple(roofs), turning_points=points)


def computed_dtype(level: Level, wanted: Dtype) -> Dtype | None:
    """The dtype that `level`'s processor computes in when asked for `wanted`; None where it has none."""
    return next((dtype for dtype in _STAND_INS[wanted] if dtype in level.flops_per_s), None)


def level_roof(level: Level, dtype: str, fastest: float = math.inf) -> Roof:
    """What one level gives; `fastest` is the rate of the level above, which a link into it cannot outrun."""
    peak = level.flops_per_s.get(dtype, 0.0)
    peak_8bit = max(peak, level.flops_per_s.get("fp8", 0.0))
    peak_4bit = max(peak, level.flops_per_s.get("fp4", 0.0))
    up = min(level.up_bytes_per_s * level.up_efficiency, fastest)
    return Roof(
        level=level.name,
        bytes=level.bytes,
        bytes_per_s=level.bytes_per_s * level.memory_efficiency,
        expert_bytes_per_s=level.bytes_per_s * level.expert_memory_efficiency,
        attention_bytes_per_s=level.bytes_per_s * level.attention_memory_efficiency,
        flops_per_s=peak * level.compute_efficiency,
        flops_8bit_per_s=peak_8bit * level.compute_efficiency,
        flops_4bit_per_s=peak_4bit * level.compute_efficiency,
        prefill_flops_per_s=peak * level.prefill_efficiency,
        offload_prefill_flops_per_s=peak * level.offload_prefill_efficiency,
        up_bytes_per_s=up,
        up_pageable_bytes_per_s=up * PAGEABLE_SHARE,
    )


def expert_intensity(model: Model, tokens: float, dtype: Dtype) -> float:
    """FLOP per byte of one layer's experts (of the MLP, in a dense model) over `tokens` tokens.

    MoE-Lightning's form: all experts' weights once, and the activations in and out.
    """
    inner = model.expert_intermediate or model.dense_intermediate
    experts, used = max(1, model.experts), max(1, model.experts_per_token)
    size = BYTES_PER_VALUE[dtype]
    matrices = 3 * model.hidden * inner
    return 2 * tokens * matrices * used / (size * (tokens * (model.hidden + inner) + matrices * experts))


def turning_point(model: Model, fast: Roof, slow: Roof, dtype: Dtype, micro_batch: int) -> TurningPoint:
    """P1 (Eq. 9) and P2 (Eq. 10) of the experts between two neighbouring levels."""
    intensity = expert_intensity(model, micro_batch, dtype)
    p1 = slow.flops_per_s / slow.up_bytes_per_s
    p2 = min(fast.flops_per_s, fast.bytes_per_s * intensity) / slow.up_bytes_per_s
    return TurningPoint(
        level=slow.level,
        micro_batch=micro_batch,
        p1_flops_per_byte=p1,
        p2_flops_per_byte=p2,
        tokens_at_p1=_tokens_at(model, p1, dtype),
        tokens_at_p2=_tokens_at(model, p2, dtype),
    )


def _tokens_at(model: Model, intensity: float, dtype: Dtype) -> float:
    """The inverse of `expert_intensity`."""
    inner = model.expert_intermediate or model.dense_intermediate
    experts, used = max(1, model.experts), max(1, model.experts_per_token)
    size = BYTES_PER_VALUE[dtype]
    matrices = 3 * model.hidden * inner
    rise = 2 * matrices * used - size * intensity * (model.hidden + inner)
    return size * intensity * matrices * experts / rise if rise > 0 else math.inf
