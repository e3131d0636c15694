"""Offloaded replicas under continuous batching: the largest request rate that keeps the SLO.

Requests enter between passes. A pass takes all N sequences one token further and the prompts of those that
enter: N/o on average, whose experts stream, or are read from disk, with those of decode. So ITL = t(N, N/o),
a first token waits for the pass under way and its own, and the machine serves N/(o·ITL) requests a second.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import TypeVar

import numpy as np

from moeplan.planner.ir.policy import BucketRate, Policy, Rejection
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.workload import Bucket, RequestClass
from moeplan.planner.strategies.common import AS_PREDICTED, Slower, estimate, keeps_slo, mixed_rate, too_slow
from moeplan.planner.strategies.offload_lanes import Array, Costs, Lanes, Layout, Point, Shapes, flat, take
from moeplan.planner.strategies.offload_search import (
    best_cpu_experts,
    every_shape,
    extremes,
    most_on_gpu,
    sharings,
)

_L = TypeVar("_L", bound=Layout)
_MICRO_BATCHES = (1, 2, 4, 8, 16)
_SHARED: tuple[str, ...] = ("h2d", "disk")  # lanes on which prefill and decode wait for the same experts


def fastest_online(problem: Costs) -> Point | None:
    """The point with the highest rate of the class's mix of sizes that keeps the SLO for each; if none does,
    the one that comes nearest; None where nothing fits."""
    requests, mean = problem.requests, _of_one_size(problem, problem.requests.mean_bucket())
    units = every_shape(mean, sharings(mean), _MICRO_BATCHES)
    ends = extremes(mean, units, most_on_gpu(mean, units))
    fits = ends.most_resident >= 0
    points, shape = _with_cpu_experts(mean, flat(_entering(mean, ends), fits)), np.nonzero(fits)[-1]
    points, shape = take(points, points.feasible), shape[points.feasible]
    if not shape.size:
        return None

    def itl_s(bucket: Bucket) -> Array:
        own = _of_one_size(problem, bucket)
        theirs = every_shape(own, sharings(own), _MICRO_BATCHES)
        return _itl_s(own, _entering(own, replace(points, units=take(theirs, shape))))

    itls = [itl_s(bucket) for bucket in requests.buckets]
    late = reduce(np.maximum, [_lateness(requests, 2.0 * itl, itl) for itl in itls])
    load = sum(b.share * b.output_tokens * itl for b, itl in zip(requests.buckets, itls, strict=True))
    rate = points.sequences / load
    best = int(np.argmax(np.where(late <= 1.0, rate, 0.0))) if (late <= 1.0).any() else int(np.argmin(late))
    found = take(points, slice(best, best + 1))
    return replace(found, units=take(units, shape[[best]]))


def _with_cpu_experts(problem: Costs, layout: Layout) -> Point:
    """The layout with the shares of experts on the CPU that make passes shortest."""

    def lanes(point: Point) -> Lanes:
        return _lanes(problem, point)

    def seconds(point: Point) -> Array:
        return np.where(point.feasible, _itl_s(problem, point), np.inf)

    none_s = seconds(problem.point(layout, np.zeros_like(layout.on_gpu)))
    counts, _ = best_cpu_experts(problem, layout, lanes, seconds, none_s)
    return problem.point(layout, counts)


def _of_one_size(problem: Costs, bucket: Bucket) -> Costs:
    """The problem as if all requests had the bucket's size; memory is still for the longest."""
    return replace(problem, requests=replace(problem.requests, buckets=(replace(bucket, share=1.0),)))


def _again(problem: Costs, layout: Layout) -> Layout:
    """The layout with the times of another size of requests."""
    u = layout.units
    units = problem.units(Shapes(u.gpus, u.whole, u.micro_batch, u.micro_batches))
    return problem.layout(units, layout.on_gpu, layout.cache_up, layout.streams)


def _entering(problem: Costs, layout: _L) -> _L:
    """The layout whose prompts are those that enter with a pass."""
    units = layout.units
    entering = units.micro_batch * units.micro_batches / problem.requests.mean_output_tokens()
    return replace(layout, units=replace(units, prompts=problem.prompts(entering, units)))


def _itl_s(problem: Costs, point: Point) -> Array:
    """Seconds of a pass that also takes the prompts that enter."""
    return problem.pass_s(point, _lanes(problem, point))


def _lanes(problem: Costs, point: Point) -> Lanes:
    """Each lane's seconds in such a pass."""
    decode, prefill = problem.decode_lanes(point), problem.prefill_lanes(point, point.units.prompts)
    return {
        lane: np.maximum(seconds, prefill[lane]) if lane in _SHARED else seconds + prefill[lane]
        for lane, seconds in decode.items()
    }


def _lateness(requests: RequestClass, ttft: Array, itl: Array) -> Array:
    """The larger part of its promise that a point takes; above 1 it is broken."""
    slo = requests.slo
    if slo is None:
        return np.zeros_like(itl)
    return np.maximum(ttft / slo.ttft_s, itl / slo.itl_s)


def online_figures(problem: Costs, point: Point, bucket: Bucket, slower: Slower) -> Figures:
    """What one copy does with requests of the bucket's size, as many in flight as `point` has."""
    own = _of_one_size(problem, bucket)
    one = own.point(_again(own, point), point.cpu_experts)
    sequences = float(one.sequences[0])
    alone = own.prompts(np.ones(1), one.units)
    prefill = float(own.pass_s(one, own.prefill_lanes(one, alone))[0]) * slower.prefill
    decode = float(own.pass_s(one, own.decode_lanes(one))[0]) * slower.decode
    itl = float(_itl_s(own, _entering(own, one))[0]) * slower.decode
    return Figures(
        prefill_tokens_per_s=bucket.prompt_tokens / prefill,
        decode_tokens_per_s=sequences / decode,
        requests_per_s=sequences / (bucket.output_tokens * itl),
        ttft_s=2.0 * itl,
        itl_s=itl,
    )


def online_policy(problem: Costs, point: Point, base: Policy) -> Policy | Rejection:
    """`base`, a point's record as for batch work, with the rates of an online class; or why it is late."""
    requests, roofline, gpus = problem.requests, problem.roofline, base.gpus
    found = [online_figures(problem, point, bucket, AS_PREDICTED) for bucket in requests.buckets]
    for bucket, figures in zip(requests.buckets, found, strict=True):
        if not keeps_slo(requests, figures.ttft_s, figures.itl_s):
            return too_slow(roofline.machine.name, requests, bucket, figures.ttft_s, figures.itl_s)
    mean = online_figures(problem, point, requests.mean_bucket(), AS_PREDICTED)
    mixed = mixed_rate(requests, (figures.requests_per_s for figures in found))
    return replace(
        base,
        prefill_tokens_per_s=estimate(roofline, mean.prefill_tokens_per_s, gpus),
        decode_tokens_per_s=estimate(roofline, mean.decode_tokens_per_s, gpus),
        generated_tokens_per_s=estimate(roofline, mixed * requests.mean_output_tokens(), gpus),
        rates=tuple(
            BucketRate(
                bucket=number,
                requests_per_s=estimate(roofline, figures.requests_per_s, gpus),
                batch=base.sequences,
                ttft_s=figures.ttft_s,
                itl_s=figures.itl_s,
            )
            for number, figures in enumerate(found)
        ),
        bottleneck=base.decode.bottleneck("decode"),
    )
