"""A policy's configuration at any size and batch: what each strategy would predict there."""

from __future__ import annotations

from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Bucket, RequestClass, Workload
from moeplan.planner.strategies.common import AS_PREDICTED, Slower
from moeplan.planner.strategies.in_memory import in_memory_figures, in_memory_fits
from moeplan.planner.strategies.offload import offload_figures, point_of
from moeplan.planner.strategies.stream import stream_figures, stream_fits


def figures_at(
    workload: Workload,
    roofline: Roofline,
    policy: Policy,
    requests: RequestClass,
    bucket: Bucket,
    batch: int,
    slower: Slower = AS_PREDICTED,
) -> Figures:
    """Return what one copy of the model, run as `policy` runs it, does with `batch` requests in flight.

    vLLM mixes sizes freely and answers for the bucket's; the bundled runtime answers for the whole class.
    """
    if policy.engine == "vllm":
        return in_memory_figures(workload, requests, roofline, policy, bucket, batch, slower)
    if policy.gpus:
        return offload_figures(workload, requests, roofline, policy, bucket, batch, slower)
    return stream_figures(workload, requests, roofline, policy, batch, slower)


def fits_at(
    workload: Workload,
    roofline: Roofline,
    policy: Policy,
    requests: RequestClass,
    bucket: Bucket,
    batch: int,
) -> bool:
    """Whether memory holds `batch` requests in flight on one copy, placed like the policy's.

    As for the figures: vLLM's are of the bucket's size, the bundled runtime's of the whole class.
    """
    if policy.engine == "vllm":
        return in_memory_fits(workload, requests, roofline, policy, bucket, batch)
    if policy.gpus:
        return bool(point_of(workload, requests, roofline, policy, batch)[1].feasible[0])
    return stream_fits(workload, requests, roofline, policy, batch)
