"""Policy -> Schedule: the program that runs the policy's passes, with its constants and its size."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from moeplan.planner import programs
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.schedule import LANES, Schedule, ScheduleKind
from moeplan.planner.ir.workload import Workload

_LOOKAHEAD = 2  # MoE-Lightning, Algorithm 1


def build_schedule(workload: Workload, policy: Policy) -> Schedule:
    """Return the schedule of an offloaded policy: CGOPipe on a GPU machine, a page stream without a GPU."""
    kind: ScheduleKind = "cgopipe" if policy.gpus else "stream"
    pages = policy.pages
    draft = Schedule(
        kind=kind,
        layers=workload.model.layers,
        micro_batches=policy.micro_batches,
        pages_per_layer=pages.pages_per_layer,
        resident_pages=pages.resident_pages,
        slots=pages.slots,
        lookahead=min(_LOOKAHEAD, policy.micro_batches - 1) if kind == "cgopipe" else 0,
        staged=policy.staged,
        gpu_attended=round(policy.kv_gpu_share * policy.micro_batches),
        cache_up=round((policy.attention_gpu_share - policy.kv_gpu_share) * policy.micro_batches),
        decode_cpu_experts=kind == "cgopipe" and policy.experts_cpu_share > 0,
        prefill_cpu_experts=kind == "cgopipe" and policy.experts_cpu_share > 0 and not pages.pages_per_layer,
        disk_pages=_disk_pages(policy) if kind == "cgopipe" else 0,
        tasks_per_decode_pass=0,
        lane_tasks=(),
        waits_per_decode_pass=0,
    )
    return _measured(draft)


def _disk_pages(policy: Policy) -> int:
    """Pages that hold experts from disk, among those of all experts that are not resident."""
    outside = 1.0 - policy.resident_share
    share = policy.experts_disk_share / outside if outside else 0.0
    return math.ceil(policy.pages.pages_per_layer * share - 1e-9)


def _measured(draft: Schedule) -> Schedule:
    """`draft` with the sizes of one decode pass in the steady state."""
    first = len(programs.passes(draft, ["prefill"]))
    tasks = programs.passes(draft, ["prefill", "decode"])
    counts = Counter(task.lane for task in tasks[first:])
    return replace(
        draft,
        tasks_per_decode_pass=len(tasks) - first,
        lane_tasks=tuple((lane, counts[lane]) for lane in LANES[draft.kind]),
        waits_per_decode_pass=sum(bool(n) for row in programs.waits(draft.kind, tasks)[first:] for n in row),
    )
