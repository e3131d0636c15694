"""Seconds of every task of an offloaded pass: the lanes' seconds of `offload_lanes`, shared out to their
tasks.

Nothing is estimated anew: the tasks of a pass sum to the seconds that its lanes were predicted to take, or to
more where DRAM is slower than they are.
Beside its seconds a task has the share of DRAM bandwidth that it uses while it runs, for the simulator's
contention.
"""

from __future__ import annotations

import numpy as np

from moeplan.planner import costs
from moeplan.planner.ir.schedule import OffloadConstants
from moeplan.planner.strategies.offload_lanes import STAGED_TOUCHES, Costs, Point
from moeplan.planner.strategies.task_costs import TaskCost, TaskCosts, sharing

_PRE_ATTENTION_LAUNCHES = (
    1 / 3
)  # of a layer's operators: norm, projections and rotation come before attention


def decode_tasks(problem: Costs, point: Point, constants: OffloadConstants) -> TaskCosts:
    """The tasks of a decode pass of a one-element point, by operation; attention wherever it may run."""
    u, layers = point.units, problem.workload.model.layers
    n, gpus = float(u.micro_batches[0]), float(u.gpus[0])
    lanes = {lane: float(s[0]) for lane, s in problem.decode_lanes(point).items()}
    dram, per_layer = problem.roofline.roof("dram"), 1.0 / layers
    link = dram.up_bytes_per_s * gpus
    cache = float(u.cache_bytes[0]) * per_layer
    cpu_s = float(u.cpu_attention_s[0]) * per_layer
    attention_s = float(u.gpu_attention_s[0]) * per_layer
    on_gpu = float((point.on_gpu + point.cache_up)[0])
    head_s, projection_s, other_s = _gpu_split(problem, point)
    before_s = (projection_s + _PRE_ATTENTION_LAUNCHES * other_s) * per_layer
    gpu_s = (lanes["gpu"] - on_gpu * float(u.gpu_attention_s[0])) / n - head_s
    cpu_experts_s = (
        max(0.0, lanes["cpu"] - float(point.cpu_micro_batches[0]) * cpu_s * layers) / n * per_layer
    )
    routed_s = gpus * float(u.routed_bytes[0]) * per_layer / link
    held = cache * float(problem.cache_copies(u.gpus)[0])
    up_s = held / (dram.up_pageable_bytes_per_s * gpus)
    return _page_tasks(problem, point, constants, decode=True) | {
        "embed": TaskCost(seconds=0.0),
        "pre_attention": TaskCost(seconds=before_s),
        "gpu_attention": TaskCost(seconds=before_s + attention_s),
        "post_attention": TaskCost(seconds=gpu_s * per_layer - before_s),
        "head": TaskCost(seconds=head_s),
        "offload_qkv": TaskCost(seconds=float(u.qkv_bytes[0]) * per_layer / link),
        "load_hidden": TaskCost(seconds=float(u.attended_bytes[0]) * per_layer / link),
        "cpu_attention": sharing(cpu_s, held / dram.bytes_per_s),
        "load_kv": sharing(up_s, STAGED_TOUCHES * cache / dram.bytes_per_s),
        "store_kv": TaskCost(seconds=cache / problem.context / link),
        "offload_routed": TaskCost(seconds=routed_s),
        "load_partial": TaskCost(seconds=routed_s),
        "cpu_experts": sharing(cpu_experts_s, cpu_experts_s),
    }


def _gpu_split(problem: Costs, point: Point) -> tuple[float, float, float]:
    """Of one micro-batch, all layers: seconds of the LM head, of the projections before attention, and of
    launches and all-reduces."""
    workload, u = problem.workload, point.units
    a, micro, gpus = workload.model.attention, u.micro_batch, float(u.gpus[0])

    def seconds(name: str) -> float:
        named = [op for op in workload.operators if op.name == name]
        return float(np.asarray(costs.call_seconds(workload, named, problem.gpu_roof, micro, 0.0))[0]) / gpus

    outward = a.heads * a.value_dim
    if a.kind == "mla":
        outward, before = outward * workload.model.hidden, workload.model.parameters.attention
        before = before // workload.model.layers - outward
    else:
        before = a.heads * a.head_dim + 2 * a.kv_heads * a.head_dim
    share = before / (before + outward)
    launches = problem.launches_s + float(problem.all_reduce_s(micro, u.gpus)[0])
    return seconds("lm_head"), share * seconds("attention_projections"), launches


def _page_tasks(problem: Costs, point: Point, c: OffloadConstants, decode: bool) -> dict[str, TaskCost]:
    """Copies of weight pages: all pages of a pass together take what the link and the disk were predicted
    to."""
    if not c.pages:
        return {}
    layers = problem.workload.model.layers
    link_s, disk_s, dram_s = (float(s[0]) / (layers * c.pages) for s in problem.weight_seconds(point, decode))
    read_s = disk_s * c.pages / c.disk_pages if c.disk_pages else 0.0
    copied = 1 / STAGED_TOUCHES if c.slots else 1.0  # of a page's traffic in DRAM, the copy's part
    return {
        "copy_page": sharing(link_s, copied * dram_s),
        "stage_page": sharing(link_s, (1 - copied) * dram_s),
        "read_page": TaskCost(seconds=read_s),
    }


def prefill_tasks(problem: Costs, point: Point, constants: OffloadConstants) -> TaskCosts:
    """The tasks of a pass that prefills the point's sequences in `constants.pieces` pieces."""
    lanes = {lane: float(s[0]) for lane, s in problem.prefill_lanes(point, point.units.prompts).items()}
    sizes = problem.prefill_bytes(point, point.units.prompts)
    count = problem.workload.model.layers * constants.pieces
    link = problem.roofline.roof("dram").up_bytes_per_s * float(point.units.gpus[0])
    parked_s, routed_s, cache_s = (float(size[0]) / link / count for size in sizes)
    return _page_tasks(problem, point, constants, decode=False) | {
        "embed": TaskCost(seconds=0.0),
        "load_piece": TaskCost(seconds=parked_s),
        "prefill_layer": TaskCost(seconds=lanes["gpu"] / count),
        "store_piece": TaskCost(seconds=parked_s),
        "store_piece_kv": TaskCost(seconds=cache_s),
        "offload_piece": TaskCost(seconds=routed_s),
        "piece_experts": TaskCost(seconds=lanes["cpu"] / count),
        "piece_partial": TaskCost(seconds=routed_s),
        "piece_head": TaskCost(seconds=0.0),
    }
