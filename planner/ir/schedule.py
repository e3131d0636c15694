"""The Schedule level: one pass over the layers as tasks on lanes, and how long its lanes take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moeplan.planner.ir.policy import LaneTime, Phase

ScheduleKind = Literal["stream", "offload"]
Buffer = tuple[str | int, ...]


class StreamConstants(NamedTuple):
    """Disk, DRAM, cores: weights pass through page slots. Integers only; the program compiles with them."""

    layers: int  # of the model
    pages: int  # per layer: page 0 is the attention, the others are experts
    resident: int  # the first pages of each layer stay in memory
    slots: int  # the others pass through this many page slots
    places: int  # per layer in decode, for the pages that routing hits; 0: all pages are read
    guesses: int  # and for pages that are read before routing
    lead: int  # pages whose reading is issued before the one in use
    across: int  # 1: the next pass's first pages are read during this one
    barrier: int  # 1: lanes meet after each layer, 2: after each task
    lean: int  # 1: without waits that others imply


class OffloadConstants(NamedTuple):
    """GPU, link, CPU, disk. Micro-batches attend on the CPU first, then with a cache copied up, then on the
    GPU.

    Integers only; the program compiles with them.
    """

    layers: int  # of the model
    micro_batches: int  # of a full decode pass
    pieces: int  # calls of a full prefill pass
    pages: int  # per layer, of the weights that do not stay on the GPU
    slots: int  # pinned pages that weights pass through; 0: all weights are pinned
    lead: int  # pages that are staged before they are copied
    disk_pages: int  # the last pages of each layer come from disk
    cpu_attended: int  # the first micro-batches attend on the CPU
    copied_up: int  # the next on the GPU, out of a cache copied up; the others out of GPU memory
    decode_cpu_experts: int  # 1: the CPU computes a part of the experts in decode
    prefill_cpu_experts: int  # 1: and in prefill
    lookahead: int  # micro-batches of attention that run ahead of the experts
    wrap: int  # 1: and go on into the next layer
    interleave: int  # 1: pages between the micro-batches, 0: a layer's at once
    across: int  # 1: the next pass's first pages are copied during this one, 2: and its attention begins
    barrier: int  # 1: lanes meet after each micro-batch of a layer, 2: after each task
    lean: int  # 1: without waits that others imply


Constants = StreamConstants | OffloadConstants


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule program's kind and constants. `name` says which schedule it is in the field's terms."""

    kind: ScheduleKind
    name: str
    constants: Constants


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work on one lane.

    `item` is a micro-batch or piece for computations and a page for copies; `slot` the page slot a copy fills
    or a computation reads, -1 for none. `reads` and `writes` name every buffer touched; all ordering follows
    from them.
    """

    op: str
    lane: str
    layer: int
    item: int
    slot: int
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTime:
    """Seconds that one operation takes in one pass, all its tasks together."""

    lane: str
    op: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A schedule that was not chosen: its simulated seconds per pass."""

    name: str
    pass_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTime:
    """When one task runs, from the end of the pass before."""

    lane: str
    op: str
    layer: int
    item: int
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The schedule of a replica and what simulating a steady-state pass of `phase` says about it.

    `busy` are the lanes' seconds at work in a pass of `pass_s`, `bubble_s` what the busiest lane idles,
    `critical` where the time of the longest chain goes. `tasks`, `waits` and `implied_waits` (those that
    others imply and that were left out) count one pass. `others` were simulated too. `window` are tasks of
    the last layers of one pass and the first of the next.
    """

    schedule: Schedule
    phase: Phase
    pass_s: float
    busy: tuple[LaneTime, ...]
    bubble_s: float
    critical: tuple[OpTime, ...]
    tasks: int
    waits: int
    implied_waits: int
    others: tuple[Alternative, ...]
    window: tuple[TaskTime, ...]
