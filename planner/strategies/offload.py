"""Experts that do not all fit the GPU: streamed through it or computed by the CPU, attention on either.

The record of what `offload_search` finds, and in numbers what is short where it finds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moeplan.planner.ir.machine import LevelName
from moeplan.planner.ir.policy import (
    NO_PAGES,
    MemoryLimit,
    MemoryUse,
    Pages,
    PassTime,
    Policy,
    Rejection,
)
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Bucket, RequestClass, Workload
from moeplan.planner.strategies.common import (
    GPU_SHARE,
    HOST_SHARE,
    Slower,
    batch_figures,
    batch_rates,
    bottleneck,
    decode_rate,
    estimate,
    host_threads,
    lanes,
    too_small,
    uses,
)
from moeplan.planner.strategies.offload_lanes import (
    SPARE_SLOTS,
    Array,
    Costs,
    Items,
    Lanes,
    Point,
    Shapes,
    total,
)
from moeplan.planner.strategies.offload_online import fastest_online, online_figures, online_policy
from moeplan.planner.strategies.offload_search import Sharing, every_shape, fastest, sharings
from moeplan.planner.units import format_bytes

_ROOMY_BYTES = 1e18
_MOST_GPUS = 64


def offload_policy(
    workload: Workload, requests: RequestClass, roofline: Roofline, memory_limit_bytes: int | None
) -> Policy | Rejection:
    """Return the fastest offloading policy for a class, or what memory is short, or how late an online class
    would be."""
    limit = host_limit_bytes(roofline, memory_limit_bytes)
    problem = Costs(workload.as_one_expert(), requests, roofline, limit)
    if requests.name == "online":
        point = fastest_online(problem)
        return too_big(problem) if point is None else online_policy(problem, point, policy_of(problem, point))
    units = every_shape(problem, sharings(problem), most_sequences=max(requests.requests, 1))
    best = fastest(problem, units)
    return too_big(problem) if best is None else policy_of(problem, best)


def host_limit_bytes(roofline: Roofline, memory_limit_bytes: int | None) -> float:
    """What a plan may use of host memory."""
    return float(min(roofline.roof("dram").bytes * HOST_SHARE, memory_limit_bytes or math.inf))


def offload_policy_at(
    workload: Workload, requests: RequestClass, roofline: Roofline, micro_batch: int, micro_batches: int
) -> Policy:
    """The policy with a given μ and n_ub over all GPUs, attention on the CPU and experts on the GPU, whether
    it fits or not: to compare with what others chose."""
    problem = Costs(workload.as_one_expert(), requests, roofline, _ROOMY_BYTES)
    one = np.ones(1)
    given = Shapes(roofline.machine.gpus * one, one < 1, micro_batch * one, micro_batches * one)
    layout = problem.layout(problem.units(given), 0 * one, 0 * one, one > 0)
    return policy_of(problem, problem.point(layout, 0 * one))


def offload_figures(
    workload: Workload,
    requests: RequestClass,
    roofline: Roofline,
    policy: Policy,
    bucket: Bucket,
    sequences: int,
    slower: Slower,
) -> Figures:
    """What the policy's placement does with `sequences` of `requests` in flight. Online requests are of the
    bucket's size."""
    problem, point = point_of(workload, requests, roofline, policy, sequences)
    if requests.name == "online":
        return online_figures(problem, point, bucket, slower)
    prefill = _pass_time(problem, point, problem.prefill_lanes(point, point.units.prompts)).seconds
    decode = _pass_time(problem, point, problem.decode_lanes(point)).seconds
    return batch_figures(requests, sequences, prefill * slower.prefill, decode * slower.decode)


def point_of(
    workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy, sequences: int
) -> tuple[Costs, Point]:
    """The policy's placement as a one-element point with `sequences` of `requests` in flight."""
    limit = next(limit.bytes for limit in policy.limits if limit.level == "dram")
    problem = Costs(workload.as_one_expert(), requests, roofline, float(limit))
    count = math.ceil(sequences / policy.micro_batch)
    return problem, _placed_like(problem, policy, sequences / count, count)


def _placed_like(problem: Costs, policy: Policy, micro_batch: float, count: int) -> Point:
    """`count` micro-batches with the policy's shares of attention and experts."""
    one = np.ones(1)
    whole = np.array([policy.expert_shares == "whole"])
    shape = Shapes(policy.gpus * one, whole, micro_batch * one, count * one)
    on_gpu = round(policy.kv_gpu_share * count)
    cache_up = round(policy.attention_gpu_share * count) - on_gpu
    streams = one * (policy.pages != NO_PAGES) > 0
    layout = problem.layout(problem.units(shape), on_gpu * one, cache_up * one, streams)
    return problem.point(layout, round(policy.experts_cpu_share * problem.workload.model.experts) * one)


def regrouped(
    workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy, micro_batches: int
) -> Policy | None:
    """The policy of a batch class with as many sequences in `micro_batches` micro-batches; None where that
    does not fit, or takes more requests than there are."""
    problem, _ = point_of(workload, requests, roofline, policy, policy.sequences)
    micro_batch = math.ceil(policy.sequences / micro_batches)
    point = _placed_like(problem, policy, micro_batch, micro_batches)
    fits = point.feasible[0] and micro_batch * micro_batches <= requests.requests
    return policy_of(problem, point) if fits else None


def policy_of(problem: Costs, point: Point) -> Policy:
    """The policy record of a one-element point of a batch class."""
    roofline, requests = problem.roofline, problem.requests
    experts, u = problem.workload.model.experts, point.units
    gpus, micro, count = (int(v[0]) for v in (u.gpus, u.micro_batch, u.micro_batches))
    prefill = _pass_time(problem, point, problem.prefill_lanes(point, point.units.prompts))
    decode = _pass_time(problem, point, problem.decode_lanes(point))
    flying = micro * count
    rates = batch_rates(roofline, requests, flying, prefill, decode, gpus)
    return Policy(
        machine=roofline.machine,
        serves=requests.name,
        engine="runtime_min",
        gpus=gpus,
        expert_shares="whole" if u.whole[0] else "width",
        threads=host_threads(roofline),
        data_parallel=1,
        dtype=roofline.dtype,
        sequences=flying,
        micro_batch=micro,
        micro_batches=count,
        prefill_tokens=problem.prefill_tokens,
        attention_gpu_share=float((point.on_gpu + point.cache_up)[0]) / count,
        kv_gpu_share=float(point.on_gpu[0]) / count,
        weights_on="disk" if point.disk_experts[0] else "dram",
        resident_share=float(point.resident[0]) / experts,
        experts_cpu_share=float(point.cpu_experts[0]) / experts,
        experts_disk_share=float(point.disk_experts[0]) / experts,
        staged=bool(point.staged[0]),
        pages=_pages(problem, point),
        memory=_memory(problem, point),
        limits=(
            MemoryLimit(level="gpu", bytes=int(problem.gpu_limit_bytes(point.units.gpus)[0])),
            MemoryLimit(level="dram", bytes=int(problem.host_limit_bytes)),
        ),
        prefill=prefill,
        decode=decode,
        prefill_tokens_per_s=estimate(
            roofline, flying * requests.mean_prompt_tokens() / prefill.seconds, gpus
        ),
        decode_tokens_per_s=estimate(roofline, decode_rate(requests, flying, decode.seconds), gpus),
        generated_tokens_per_s=estimate(
            roofline, rates[0].requests_per_s.value * requests.mean_output_tokens(), gpus
        ),
        rates=rates,
        bottleneck=bottleneck(requests, prefill, decode),
        resident_experts=problem.experts.most_popular(int(point.resident[0])),
    )


def _pass_time(problem: Costs, point: Point, seconds: Lanes) -> PassTime:
    """The lanes of a one-element point that have work."""
    used = [(lane, float(s[0])) for lane, s in seconds.items() if s[0] > 0]
    return PassTime(lanes=lanes(used), serial_s=float(problem.serial_s(point, seconds)[0]))


def _memory(problem: Costs, point: Point) -> tuple[MemoryUse, ...]:
    gpu = problem.gpu_items(point) + problem.gpu_expert_items(point)
    host = problem.host_items(point) + problem.host_expert_items(point)
    return uses("gpu", _first(gpu)) + uses("dram", _first(host))


def _first(items: Items) -> list[tuple[str, float]]:
    return [(item, float(size[0])) for item, size in items]


def _pages(problem: Costs, point: Point) -> Pages:
    """The experts that a pass streams from each layer, in n_ub pages; a ring holds one layer's and two more.

    Prefill streams all that are not resident, so its pages are the largest.
    """
    count = int(point.units.micro_batches[0])
    streamed = dict(problem.gpu_expert_items(point))["weight pages"][0] / 2
    if streamed == 0:
        return NO_PAGES
    return Pages(
        pages_per_layer=count,
        experts_per_page=0,
        resident_pages=0,
        slots=count + SPARE_SLOTS,
        slot_bytes=math.ceil(streamed / count),
        readers=0,
        block_bytes=0,
    )


# Refusals


def too_big(problem: Costs) -> Rejection:
    """Which memory is short for the smallest candidate, and the changes that would each be enough."""
    roofline = problem.roofline
    point = _smallest(problem, _widest(problem))
    gpu, host = _least_bytes(problem, point)
    limit = problem.gpu_limit_bytes(point.units.gpus)[0]
    level: LevelName = "gpu" if gpu[0] > limit else "dram"
    need, may = (gpu[0], limit) if level == "gpu" else (host[0], problem.host_limit_bytes)
    model = problem.workload.model
    what = f"{model.name} with offloaded {'experts' if model.experts > 1 else 'MLPs'}"
    hints = _gpu_remedies(problem, need) if level == "gpu" else _host_remedies(problem, need)
    return too_small(roofline, problem.requests, level, float(need), float(may), what, ", or ".join(hints))


def _widest(problem: Costs) -> list[Sharing]:
    """The first way to share the model over as many GPUs as can."""
    ways = sharings(problem)
    return [next(way for way in ways if way.gpus == ways[-1].gpus)]


def _smallest(problem: Costs, ways: Sequence[Sharing]) -> Point:
    """One sequence in flight, shared in each of the ways, nothing streamed: what needs the least GPU
    memory."""
    gpus, whole = np.array([float(way.gpus) for way in ways]), np.array([way.whole for way in ways])
    one = np.ones_like(gpus)
    units = problem.units(Shapes(gpus, whole, one, one))
    streams = np.full(gpus.shape, problem.roofline.has("disk"))
    streams &= problem.layout(units, 0 * one, 0 * one, streams).most_resident >= 0
    return problem.point(problem.layout(units, 0 * one, 0 * one, streams), 0 * one)


def _least_bytes(problem: Costs, point: Point) -> tuple[Array, Array]:
    """GPU and host bytes that a point needs. Streamed experts may lie on disk; the CPU's may not."""
    at_least = replace(
        point, resident=np.where(point.streams, point.resident, np.maximum(point.resident, 0.0))
    )
    gpu = problem.gpu_items(at_least) + problem.gpu_expert_items(at_least)
    held = np.where(point.streams, 0.0, problem.workload.model.experts - at_least.resident)
    ring = np.where(point.staged, problem.ring_bytes(point.units, at_least.resident), 0.0)
    return total(gpu), total(problem.host_items(point)) + held * problem.expert_bytes + ring


def _gpu_remedies(problem: Costs, need: float) -> list[str]:
    gpus = _widest(problem)[0].gpus
    hints = [f"GPUs of {format_bytes(need / GPU_SHARE / gpus)} or more"]
    more = sharings(problem, _MOST_GPUS)
    enough = np.flatnonzero(_smallest(problem, more).most_resident >= 0)
    if enough.size:
        hints.insert(0, f"{more[enough[0]].gpus} GPUs like it")
    return hints + _shorter(problem, lambda point: bool(point.most_resident[0] >= 0))


def _host_remedies(problem: Costs, need: float) -> list[str]:
    hint = f"host memory of {format_bytes(need / HOST_SHARE)} or more"
    return [hint, *_shorter(problem, lambda point: bool(point.feasible[0]))]


def _shorter(problem: Costs, fits: Callable[[Point], bool]) -> list[str]:
    """The longest prompts with which the smallest candidate fits, where shorter ones than now do."""
    ways = _widest(problem)
    low, high = 0, problem.requests.prompt_tokens_max
    while low < high - 1:
        middle = (low + high) // 2
        shorter = replace(problem.requests, prompt_tokens_max=middle)
        if fits(_smallest(replace(problem, requests=shorter), ways)):
            low = middle
        else:
            high = middle
    return [f"prompts of at most {low} tokens"] if low else []
