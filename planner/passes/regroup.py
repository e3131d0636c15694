"""Policy -> Policy: an offloaded batch in the micro-batches that suit its schedule best, as the simulator has
it.

HRM takes lanes to overlap; how well they do depends on how many micro-batches there are. A few more or fewer
are tried where HRM predicts about the same rate.
"""

from __future__ import annotations

from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.passes.schedule import fastest_schedule
from moeplan.planner.strategies.common import run_seconds
from moeplan.planner.strategies.offload import regrouped

_WORTH = 0.01  # other micro-batches must make the run shorter by this share
_AS_FAST = 0.02  # and HRM may predict so much less for them
_FEW = 3  # micro-batches more or fewer


def regroup(workload: Workload, roofline: Roofline, policy: Policy) -> Policy:
    """Return the policy whose whole run is shortest, decode passes simulated; others than ours as they
    are."""
    requests = workload.request_class(policy.serves)
    if policy.engine != "runtime_min" or not policy.gpus or requests.name != "batch":
        return policy
    least = (1.0 - _AS_FAST) * policy.generated_tokens_per_s.value
    n = policy.micro_batches
    counts = sorted({*range(max(1, n - _FEW), n + _FEW + 1), 2 * n, -(-n // 2)} - {n})
    made = (regrouped(workload, requests, roofline, policy, count) for count in counts)
    others = [other for other in made if other and other.generated_tokens_per_s.value >= least]
    best, before = policy, _run_s(workload, requests, roofline, policy)
    shortest = (1.0 - _WORTH) * before
    for other in others:
        seconds = _run_s(workload, requests, roofline, other)
        if seconds < shortest:
            best, shortest = other, seconds
    return best


def _run_s(workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy) -> float:
    """Seconds for all requests: prefill as predicted, decode passes as simulated."""
    decode_s = fastest_schedule(workload, requests, roofline, policy).seconds
    flying = policy.sequences * policy.data_parallel
    return float(run_seconds(requests, flying, policy.prefill.seconds, decode_s))
