"""What a plan would be beside itself: other batches, other rates and promises, its operators on the roofline.

Not a level of the compilation: nothing is chosen from it. Reports draw it and explanations quote it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeplan.planner.ir.machine import LevelName
from moeplan.planner.ir.roofline import Roofline

Excluded = Literal["", "SLO", "memory", "requests"]  # why a batch was not to be had


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPoint:
    """A replica with `batch` sequences in flight in each copy: generated tokens/s of the whole replica.

    `excluded` says what forbids it: the latency that is promised, memory (or vLLM's own limit), or that there
    are not so many requests.
    """

    batch: int
    tokens_per_s: float
    ttft_s: float
    itl_s: float
    excluded: Excluded


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorPoint:
    """One operator of one phase where its data lie and where it runs, on the hierarchical roofline.

    `flops_per_byte` counts the bytes it reads and writes at `level`; `fetched_flops_per_byte` those that
    cross the link to get there, infinite where none do. `flops_per_s` is what the roofs allow, the knee not
    rounded, and `bound` the roof that does: the link where `fetched_flops_per_byte` lies below
    `link_bound_below`, P2 of this call (HRM, Eq. 10), 0 where nothing is fetched.
    """

    name: str
    level: LevelName
    flops_per_byte: float
    fetched_flops_per_byte: float
    flops_per_s: float
    bound: Literal["compute", "memory", "link"]
    link_bound_below: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """The cheapest fleet at one value of an input, solved anew; no fleet where `fleet` is empty."""

    factor: float
    value: float
    usd_per_hour: float
    fleet: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """Cost against one input; `unit` is of the values: `/s` or `s`."""

    name: str
    unit: str
    points: tuple[FrontierPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaAnalysis:
    """One replica's batches and operators, and the roofline as its kernels reach it, with the turning points
    of its own calls."""

    name: str
    batches: tuple[BatchPoint, ...]
    operators: tuple[OperatorPoint, ...]
    roofline: Roofline


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Something that was chosen, and what its alternative would have come to: `other` instead of `value`."""

    chosen: str
    alternative: str
    unit: Literal["USD", "USD/h", "tokens/s", "s per decode pass"]
    value: float
    other: float

    @property
    def times_worse(self) -> float:
        """How many times dearer or slower the alternative is; below 1 where it is better."""
        return self.value / self.other if self.unit == "tokens/s" else self.other / self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelinePart:
    """A stretch of a replay: mean ready replicas on spot and on-demand machines, the share of its time with
    as many ready as wanted, and spot replicas lost."""

    begin_s: float
    end_s: float
    on_spot: float
    on_demand: float
    enough_share: float
    preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A spot site over the trace that placed it; `wanted` are its replicas. `columns` are short and equal,
    for a chart, `rows` of whole days, for a table."""

    column: str
    wanted: int
    source: str
    columns: tuple[TimelinePart, ...]
    rows: tuple[TimelinePart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where facts come from: `what` was taken from them, and the citation with its date."""

    what: str
    citation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Of a whole plan; no frontiers where nothing is rented or where the search for a fleet takes long."""

    decisions: tuple[Decision, ...]
    replicas: tuple[ReplicaAnalysis, ...]
    frontiers: tuple[Frontier, ...]
    timelines: tuple[Timeline, ...]
    sources: tuple[Source, ...]
