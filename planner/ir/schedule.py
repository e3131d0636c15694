"""The Schedule level: one pass over the layers as tasks on lanes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["stream", "cgopipe"]
Phase = Literal["prefill", "decode"]
Buffer = tuple[str | int, ...]

# Lane and operation names, in the order of their numbers in the emitted schedule.
LANES: dict[ScheduleKind, tuple[str, ...]] = {
    "stream": ("compute", "disk"),
    "cgopipe": ("gpu", "h2d", "d2h", "cpu", "copier", "disk"),
}
OPS: dict[ScheduleKind, tuple[str, ...]] = {
    "stream": ("embed", "read", "attention", "route", "experts", "head"),
    "cgopipe": (
        "embed",
        "stage_page",
        "read_page",
        "copy_page",
        "pre_attention",
        "offload_qkv",
        "cpu_attention",
        "load_hidden",
        "load_kv",
        "gpu_attention",
        "post_attention",
        "offload_routed",
        "cpu_experts",
        "load_partial",
        "prefill_layer",
        "store_kv",
        "head",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work on one lane.

    `item` is a micro-batch for compute tasks and a page for copies; `slot` the page slot a copy fills or a
    computation reads, -1 for none. `reads` and `writes` name every buffer touched; all ordering follows
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
class Schedule:
    """The parameters that a schedule program is instantiated with.

    kind "stream" (disk, DRAM, cores): weights pass through `slots` page slots; the first `resident_pages`
    of the `pages_per_layer` pages of each layer never move.
    kind "cgopipe" (GPU, link, CPU): MoE-Lightning's Algorithm 1; pages_per_layer pages of each layer's
    streamed weights through a double buffer, `staged` through a ring of pinned pages; `lookahead`
    micro-batches of attention run ahead of the experts. The last `gpu_attended` micro-batches attend on the
    GPU, the `cache_up` before them too, out of a cache copied up from the host; the others on the CPU.
    `decode_cpu_experts` and `prefill_cpu_experts` say in which phase the CPU computes a part of the experts.
    The last `disk_pages` pages of each layer are read from disk into the ring instead of being staged.
    """

    kind: ScheduleKind
    layers: int
    micro_batches: int
    pages_per_layer: int
    resident_pages: int
    slots: int
    lookahead: int
    staged: bool
    gpu_attended: int
    cache_up: int
    decode_cpu_experts: bool
    prefill_cpu_experts: bool
    disk_pages: int
    tasks_per_decode_pass: int
    lane_tasks: tuple[tuple[str, int], ...]
    waits_per_decode_pass: int
