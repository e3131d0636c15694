"""The Roofline level: what one machine's memories, processors and links really give for one model."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.planner.ir.machine import LevelName, Machine
from moeplan.planner.ir.spec import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """Effective rates of one level: nominal times efficiency, for the dtype that it computes in.

    `bytes_per_s` is what matrix products read at; routed experts and decode attention have rates of their
    own. `flops_8bit_per_s` and `flops_4bit_per_s` are for weights stored in so few bits: the rate of the
    compute dtype where the processor has no faster one. `up_bytes_per_s` is what reaches the next faster
    level, pinned; `up_pageable_bytes_per_s` from pageable memory. A level that does not compute has
    flops_per_s 0.
    """

    level: LevelName
    bytes: int
    bytes_per_s: float
    expert_bytes_per_s: float
    attention_bytes_per_s: float
    flops_per_s: float
    flops_8bit_per_s: float
    flops_4bit_per_s: float
    prefill_flops_per_s: float
    offload_prefill_flops_per_s: float
    up_bytes_per_s: float
    up_pageable_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TurningPoint:
    """Where an operator whose data lie one level down should run, in FLOP per byte fetched (HRM, Eq. 9-11).

    `level` holds the data. Below `p1` it is faster to compute there; below `p2` the link bounds the faster
    processor, which takes `micro_batch` tokens a call. `tokens_at_p1` and `tokens_at_p2` are the tokens per
    pass at which the experts (or the dense MLP) reach those intensities; infinite where they never do.
    """

    level: LevelName
    micro_batch: int
    p1_flops_per_byte: float
    p2_flops_per_byte: float
    tokens_at_p1: float
    tokens_at_p2: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """A machine seen by one model. `roofs` run from the fastest level to the slowest."""

    machine: Machine
    dtype: Dtype
    roofs: tuple[Roof, ...]
    turning_points: tuple[TurningPoint, ...]

    def roof(self, level: LevelName) -> Roof:
        """The roof of `level`; raises KeyError where the machine has none."""
        for roof in self.roofs:
            if roof.level == level:
                return roof
        raise KeyError(level)

    def has(self, level: LevelName) -> bool:
        return any(roof.level == level for roof in self.roofs)
