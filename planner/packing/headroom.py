"""How full a pool may be planned: less where throughputs are unsure, pools small, arrivals bursty.

Two limits, whichever is tighter.

An optimiser picks columns whose throughput is overestimated, the more so the less sure they are. With errors
of 5-15 % a plan at 0.85 is hardly ever overloaded, with 20-30 % one at 0.7 (30 random markets, re-routed at
best).

| throughputs are | load at most |
| --- | --- |
| measured | 0.85 |
| calibrated | 0.80 |
| analytic, from data sheets | 0.70 |

Bursts fill small pools first. The largest load with which 99 % of requests keep the SLO, by event simulation
of continuous batching (steps of 0.1):

| SLO, arrivals | 1 copy | 4 copies | 16 copies |
| --- | --- | --- | --- |
| far, Poisson | 0.9 | 1.0 | 1.0 |
| far, gaps with CV 3 | 0.6 | 0.9 | 1.0 |
| near, Poisson | 0.6 | 0.8 | 0.9 |
| near, gaps with CV 3 | below 0.6 | 0.6 | 0.8 |

A line through each row, ceiling·copies - reserve, is within 0.05 of it, and needs no size to be known
before: (1, 0.1), (1, 0.4), (0.9, 0.3), (0.867, 1.07). So where the SLO is near and arrivals are bursty, a
pool has two copies or none. Between and beyond the two CVs both are taken as linear in CV: an extrapolation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moeplan.planner.ir.machine import Provenance
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.workload import RequestClass

TARGET: Mapping[Provenance, float] = {"datasheet": 0.7, "analytic": 0.7, "calibrated": 0.8, "measured": 0.85}
_NEAR = 0.9  # a latency above this share of its SLO is near it
_LEAST_CEILING = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """x machines carry at most target·x and ceiling·x - reserve."""

    target: float
    ceiling: float
    reserve: float


def headroom_of(policy: Policy, requests: RequestClass, factor: float = 1.0) -> Headroom:
    """Return how full machines under `policy` may be planned; `factor` scales it.

    Only online work needs room for bursts. One machine is `data_parallel` copies of the model. An infinite
    `factor` fills online machines to the brim: rates are then what simulated queues leave.
    """
    if factor == math.inf:
        if requests.slo is not None:
            return Headroom(target=1.0, ceiling=1.0, reserve=0.0)
        factor = 1.0
    target = TARGET[policy.generated_tokens_per_s.provenance] * factor
    if requests.slo is None:
        return Headroom(target=target, ceiling=factor, reserve=0.0)
    burst = max(0.0, requests.arrival_cv - 1.0)
    if _is_near(policy, requests):
        ceiling, reserve = 0.9 - 0.0165 * burst, 0.3 + 0.385 * burst
    else:
        ceiling, reserve = 1.0, 0.1 + 0.15 * burst
    return Headroom(
        target=target,
        ceiling=max(_LEAST_CEILING, ceiling) * factor,
        reserve=reserve * factor / policy.data_parallel,
    )


def _is_near(policy: Policy, requests: RequestClass) -> bool:
    """Whether a full replica is close to breaking its SLO."""
    slo = requests.slo
    return slo is not None and any(
        rate.ttft_s > _NEAR * slo.ttft_s or rate.itl_s > _NEAR * slo.itl_s
        for rate in policy.rates
        if rate.requests_per_s.value > 0
    )
