"""Workload, policies, offers -> Fleet: the cheapest replicas that serve every class (MILP, pulp and CBC).

Source: Mélange (arXiv 2404.14527) in its aggregated form: routing shares are continuous, replicas integer,
and a column is a replica configuration, not a GPU type. Offloaded columns are
chosen on a market only where nothing else can do the work: the runtime has never run on a GPU.
Online work minimises USD per hour; batch work minimises the whole bill, within its deadline if it has one.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.fleet import Choice, Fleet
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.policy import Policy, Rejection
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import ClassName, RequestClass, Workload
from moeplan.planner.packing.batch import Batch, solve_batch
from moeplan.planner.packing.columns import find_columns, require_columns
from moeplan.planner.packing.common import Answer, Limits
from moeplan.planner.packing.online import solve_online

# How full replicas may be planned: throughputs are estimates, and an optimiser picks the over-estimated ones.
_TARGET_UTILISATION = {"datasheet": 0.7, "analytic": 0.7, "calibrated": 0.8, "measured": 0.85}


def choose_fleet(
    spec: Spec,
    workload: Workload,
    policies: Sequence[Policy],
    rejections: Sequence[Rejection],
    offers: Sequence[Offer],
    headroom: float = 1.0,
) -> Fleet:
    """Return the cheapest fleet; online work with `headroom` times the usual target utilisation, at most 1.

    Raises InfeasibleError naming the constraint that binds.
    """
    columns = find_columns(policies, offers, spec.market)
    require_columns(spec, workload, policies, columns, rejections)
    usual = min(_TARGET_UTILISATION[c.policy.generated_tokens_per_s.provenance] for c in columns)
    online = any(requests.name == "online" for requests in workload.classes)
    target = min(1.0, headroom * usual) if online else usual
    limits = Limits(quota=dict(spec.market.quota), budget_usd_per_hour=spec.market.budget_usd_per_hour)
    answers: list[Answer] = []
    for requests in sorted(workload.classes, key=lambda r: r.name != "online"):
        own = [column for column in columns if column.policy.serves == requests.name]
        if requests.name == "online":
            answer = solve_online(spec, requests, own, target, limits)
        else:
            answer = solve_batch(spec, Batch(workload, requests, usual), own, limits)
        limits = limits.less(answer.choices)
        answers.append(answer)
    choices = tuple(choice for answer in answers for choice in answer.choices)
    return Fleet(
        choices=choices,
        routes=tuple(route for answer in answers for route in answer.routes),
        alternatives=tuple(other for answer in answers for other in answer.alternatives),
        usd_per_hour=sum(choice.replicas * choice.column.usd_per_hour for choice in choices),
        usd_per_million_tokens=tuple(_token_price(requests, choices) for requests in workload.classes),
        target_utilisation=target,
        solver_status="optimal" if all(answer.status == "optimal" for answer in answers) else "incumbent",
    )


def _token_price(requests: RequestClass, choices: Sequence[Choice]) -> tuple[ClassName, Estimate]:
    """USD per million generated tokens; for online work at the spec's rate, not at full load."""
    own = [choice for choice in choices if choice.column.policy.serves == requests.name]
    basis = own[0].column.policy.generated_tokens_per_s
    if requests.name == "online":
        usd = sum(choice.replicas * choice.column.usd_per_hour for choice in own)
        tokens = requests.rate_per_s * requests.mean_output_tokens() * 3600
        return requests.name, Estimate(value=usd / tokens * 1e6, sigma=0.0, provenance=basis.provenance)
    usd = sum(choice.usd for choice in own)
    tokens = requests.requests * requests.mean_output_tokens()
    return requests.name, Estimate(value=usd / tokens * 1e6, sigma=basis.sigma, provenance=basis.provenance)
