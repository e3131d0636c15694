"""Policy -> its operators as points of the hierarchical roofline.

Source: MoE-Lightning (ASPLOS'25), section 3, Eq. 7-8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from moeplan.planner import costs
from moeplan.planner.ir.analysis import OperatorPoint
from moeplan.planner.ir.machine import LevelName
from moeplan.planner.ir.plan import Replica
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Operator, Workload
from moeplan.planner.strategies.offload_lanes import offloading_roof


def reached_roofline(replica: Replica) -> Roofline:
    """The machine as the replica's kernels reach it, with which its passes are predicted."""
    roofline, policy = replica.roofline, replica.policy
    if policy.engine != "runtime_min" or not policy.gpus:
        return roofline
    gpu, *others = roofline.roofs
    return replace(roofline, roofs=(offloading_roof(gpu), *others))


def with_own_turns(replica: Replica, roofline: Roofline, points: Sequence[OperatorPoint]) -> Roofline:
    """The roofline with P2 of the policy's own calls, where they fetch from below the fastest level."""
    policy = replica.policy
    fetching = next((point for point in points if point.link_bound_below), None)
    if fetching is None:
        return roofline
    first, *others = roofline.turning_points  # between the fastest level and the next
    p2 = fetching.link_bound_below
    tokens = policy.sequences * p2 / fetching.fetched_flops_per_byte
    own = replace(first, micro_batch=policy.micro_batch, p2_flops_per_byte=p2, tokens_at_p2=tokens)
    return replace(roofline, turning_points=(own, *others))


def operator_points(workload: Workload, replica: Replica) -> tuple[OperatorPoint, ...]:
    """Every operator of a decode pass of the full batch, one call of it over a micro-batch.

    Operators of which the policy gives a part to the CPU appear once for each place.
    """
    policy = replica.policy
    workload = costs.held_as(workload, policy.weights_dtype, policy.kv_dtype)
    return tuple(
        _point(workload, replica, operator, level)
        for operator in workload.operators
        for level in _levels(replica, operator)
    )


def _levels(replica: Replica, operator: Operator) -> Iterator[LevelName]:
    """Where the policy runs the operator: on the GPU, on the cores, or partly on either."""
    policy = replica.policy
    fastest = replica.roofline.roofs[0].level
    if policy.engine == "vllm" or fastest != "gpu":
        yield fastest
        return
    on_gpu = 1.0
    if costs.is_attention_core(operator):
        on_gpu = policy.attention_gpu_share
    elif operator.name == "routed_experts":
        on_gpu = 1.0 - policy.experts_cpu_share
    if on_gpu > 0.0:
        yield "gpu"
    if on_gpu < 1.0:
        yield "dram"


def _point(workload: Workload, replica: Replica, operator: Operator, level: LevelName) -> OperatorPoint:
    policy, roof = replica.policy, reached_roofline(replica).roof(level)
    context = workload.request_class(policy.serves).mean_bucket().context_tokens
    flops = _number(costs.flops(operator, policy.micro_batch, context))
    moved = (
        costs.weight_bytes(workload, operator, policy.micro_batch)
        + costs.kv_bytes_read(workload, operator, policy.micro_batch, context)
        + costs.activation_bytes(workload, operator, policy.micro_batch)
    )
    intensity = flops / _number(moved)
    fetched = _fetched_intensity(workload, replica, operator, level, context)
    link = _link_bytes_per_s(replica.roofline, level)
    roofs = {
        "compute": costs.operator_flops_per_s(operator, roof),
        "memory": costs.operator_bytes_per_s(operator, roof) * intensity,
        "link": link * fetched if math.isfinite(fetched) else math.inf,
    }
    bound = min(roofs, key=lambda name: roofs[name])
    return OperatorPoint(
        name=operator.name,
        level=level,
        flops_per_byte=intensity,
        fetched_flops_per_byte=fetched,
        flops_per_s=roofs[bound],
        bound="compute" if bound == "compute" else "memory" if bound == "memory" else "link",
        link_bound_below=min(roofs["compute"], roofs["memory"]) / link if math.isfinite(fetched) else 0.0,
    )


def _fetched_intensity(
    workload: Workload, replica: Replica, operator: Operator, level: LevelName, context: float
) -> float:
    """FLOP of all sequences per byte of weights that a pass fetches from the level below."""
    policy = replica.policy
    if (
        policy.engine == "vllm"
        or operator.name != "routed_experts"
        or level != replica.roofline.roofs[0].level
    ):
        return math.inf
    moving = 1.0 - policy.resident_share - policy.experts_cpu_share
    if not policy.gpus and policy.weights_on == "dram":
        moving = 0.0
    if moving <= 0.0:
        return math.inf
    flops = _number(costs.flops(operator, policy.sequences, context))
    return flops / (moving * _number(costs.weight_bytes(workload, operator, policy.sequences)))


def _link_bytes_per_s(roofline: Roofline, level: LevelName) -> float:
    """What reaches `level` from below."""
    levels = [roof.level for roof in roofline.roofs]
    below = levels.index(level) + 1
    return roofline.roofs[below].up_bytes_per_s if below < len(levels) else math.inf


def _number(value: costs.Quantity) -> float:
    return float(np.asarray(value))
