"""A replica with other numbers of sequences in flight: what it would do, and what forbids it."""

from __future__ import annotations

from collections.abc import Iterable

from moeplan.planner.ir.analysis import BatchPoint, Excluded
from moeplan.planner.ir.plan import Replica
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.strategies.common import keeps_slo, mixed_rate
from moeplan.planner.strategies.figures import figures_at, fits_at


def batch_points(workload: Workload, replica: Replica, batches: Iterable[int]) -> tuple[BatchPoint, ...]:
    """The replica's policy, its placement kept, with each of `batches` in flight on each copy."""
    return tuple(_point(workload, replica, batch) for batch in batches)


def _point(workload: Workload, replica: Replica, batch: int) -> BatchPoint:
    policy = replica.policy
    requests = workload.request_class(policy.serves)
    inside = [(bucket, _share(replica, n, batch)) for n, bucket in enumerate(requests.buckets)]
    figures = [
        figures_at(workload, replica.roofline, policy, requests, bucket, own) for bucket, own in inside
    ]
    rate = mixed_rate(requests, (figure.requests_per_s for figure in figures)) * policy.data_parallel
    held = all(fits_at(workload, replica.roofline, policy, requests, bucket, own) for bucket, own in inside)
    return BatchPoint(
        batch=batch,
        tokens_per_s=rate * requests.mean_output_tokens(),
        ttft_s=max(figure.ttft_s for figure in figures),
        itl_s=max(figure.itl_s for figure in figures),
        excluded=_excluded(requests, batch * policy.data_parallel, held, figures),
    )


def _share(replica: Replica, bucket: int, batch: int) -> int:
    """What `batch` means for a bucket: long requests run in smaller batches than the replica's, and do so
    with any."""
    policy = replica.policy
    return max(1, round(batch * min(1.0, policy.rates[bucket].batch / policy.sequences)))


def _excluded(requests: RequestClass, in_flight: int, held: bool, figures: list[Figures]) -> Excluded:
    if requests.name == "batch" and in_flight > requests.requests:
        return "requests"
    if not held:
        return "memory"
    kept = all(bool(keeps_slo(requests, figure.ttft_s, figure.itl_s)) for figure in figures)
    return "" if kept else "SLO"
