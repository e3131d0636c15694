"""Workload, policies, offers -> Fleet: the cheapest replicas that serve every class (MILP, pulp and CBC).

Source: Mélange (arXiv 2404.14527) in its aggregated form: routing shares are continuous, replicas integer,
and a column is a replica configuration, not a GPU type. A replica is a whole machine with as many copies of
the model as it holds. Both kinds of work are one problem (`packing/formulate.py`); batch work with a deadline
may also fill what online replicas leave idle until then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.fleet import UNEXPLAINED, Alternative, Choice, Column, Fleet, Route
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.policy import Policy, Rejection
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import ClassName, RequestClass, Workload
from moeplan.planner.packing.alternatives import find_alternatives
from moeplan.planner.packing.columns import find_columns, require_columns
from moeplan.planner.packing.formulate import (
    INTERRUPTIONS_PER_HOUR,
    REDONE_HOURS,
    Market,
    find_market,
    formulate,
    interruption_factor,
)
from moeplan.planner.packing.headroom import headroom_of
from moeplan.planner.packing.infeasible import why_infeasible
from moeplan.planner.packing.milp import Solution, solve_fleet
from moeplan.planner.packing.problem import Problem
from moeplan.planner.packing.sensitivity import find_sensitivity


def choose_fleet(
    spec: Spec,
    workload: Workload,
    policies: Sequence[Policy],
    rejections: Sequence[Rejection],
    offers: Sequence[Offer],
    *,
    headroom: float = 1.0,
    previous: Mapping[str, int] | None = None,
    explain: bool = True,
) -> Fleet:
    """Return the cheapest fleet. Raises InfeasibleError naming the constraint that binds.

    `headroom` scales how full replicas may be planned, see `headroom_of`. `previous` counts the replicas that
    run now, by column: moving away from them must pay. Without `explain` it is not asked what would change
    the answer, nor what else there is: for fleets that are only tried.
    """
    columns = find_columns(policies, offers, spec.market)
    require_columns(spec, workload, policies, columns, rejections)
    market = find_market(workload, columns, spec.market)
    problem = formulate(market, spec.market, headroom, previous)
    solution = solve_fleet(problem)
    if solution is None:
        raise why_infeasible(spec, market, problem)
    choices = _choices(market, problem, solution)
    return Fleet(
        choices=choices,
        routes=_routes(market, solution),
        alternatives=_alternatives(spec, workload, columns, choices, headroom) if explain else (),
        usd_per_hour=sum(choice.replicas * choice.column.usd_per_hour for choice in choices),
        usd_per_million_tokens=tuple(_token_price(requests, choices) for requests in workload.classes),
        target_utilisation=min(_target(workload, choice.column, headroom) for choice in choices),
        solver_status=solution.status,
        cost=solution.usd,
        cost_unit="USD per hour" if any(problem.online) else "USD",
        cost_bound=solution.usd * (1 - solution.gap),
        gap=solution.gap,
        spot_assumption=_spot_assumption(market, choices),
        sensitivity=find_sensitivity(market, problem, solution) if explain else UNEXPLAINED,
    )


def _alternatives(
    spec: Spec, workload: Workload, columns: Sequence[Column], choices: Sequence[Choice], headroom: float
) -> tuple[Alternative, ...]:
    """Of all columns, those that are listed only included; online first."""
    everything = find_market(workload, columns, spec.market, all_columns=True)
    priced = formulate(everything, spec.market, headroom)
    pools = [(pool, everything.columns[pool.name]) for pool in priced.pools]
    names = {choice.column.name for choice in choices}
    return tuple(
        alternative
        for requests in sorted(workload.classes, key=lambda r: r.name != "online")
        for alternative in find_alternatives(everything, pools, names, requests.name)
    )


def _spot_assumption(market: Market, choices: Sequence[Choice]) -> str:
    spot = [c.column for c in choices if c.column.market == "spot" and c.column.policy.serves == "batch"]
    if not spot:
        return ""
    start = market.start_hours(spot[0])
    more = interruption_factor(spot[0], start) - 1
    return (
        f"batch work on spot machines counts {more:.0%} more hours, assuming one "
        f"interruption in {1 / INTERRUPTIONS_PER_HOUR:.0f} h, each of which costs a start and "
        f"{REDONE_HOURS * 60:.0f} minutes of work: hand out the requests in parts of about an hour"
    )


def _target(workload: Workload, column: Column, headroom: float) -> float:
    return headroom_of(column.policy, workload.request_class(column.policy.serves), headroom).target


def _choices(market: Market, problem: Problem, solution: Solution) -> tuple[Choice, ...]:
    """Online columns first, each by name."""
    pools = {pool.name: pool for pool in problem.pools}
    choices = []
    for name, count in solution.machines.items():
        column, pool = market.columns[name], pools[name]
        load = sum(pool.loads[k] * share for (k, own), share in solution.shares.items() if own == name)
        online = column.policy.serves == "online"
        hours = 0.0 if online else _hours(market, solution, column, count)
        choices.append(
            Choice(
                column=column,
                replicas=count + pool.spare,
                spare=pool.spare,
                utilisation=load / count if online else _used_time(market, hours),
                target=pool.capacity(count) / count if online else 1.0,
                hours=hours,
                usd=hours * count * column.usd_per_hour,
            )
        )
    return tuple(sorted(choices, key=lambda c: (c.column.policy.serves != "online", c.column.name)))


def _hours(market: Market, solution: Solution, column: Column, count: int) -> float:
    """How long each replica of a batch column runs."""
    work = sum(
        market.work_hours(column, market.demands[k]) * share
        for (k, name), share in solution.shares.items()
        if name == column.name
    )
    return work / count + market.start_hours(column)


def _used_time(market: Market, hours: float) -> float:
    """The share of the time to the deadline; 1 without one."""
    deadline = max(d.hours for d in market.demands if d.serves == "batch")
    return hours / deadline if math.isfinite(deadline) else 1.0


def _routes(market: Market, solution: Solution) -> tuple[Route, ...]:
    """Online demands first, by bucket, then column."""
    found = []
    for (k, name), share in solution.shares.items():
        demand = market.demands[k]
        found.append(Route(serves=demand.serves, bucket=demand.bucket, column=name, share=share))
    return tuple(sorted(found, key=lambda r: (r.serves != "online", r.bucket, r.column)))


def _token_price(requests: RequestClass, choices: Sequence[Choice]) -> tuple[ClassName, Estimate]:
    """USD per million generated tokens; for online work at the spec's rate, not at full load. What batch work
    is done in the idle time of online replicas costs it nothing."""
    own = [choice for choice in choices if choice.column.policy.serves == requests.name]
    basis = (own or choices)[0].column.policy.generated_tokens_per_s
    if requests.name == "online":
        usd = sum(choice.replicas * choice.column.usd_per_hour for choice in own)
        tokens = requests.rate_per_s * requests.mean_output_tokens() * 3600
        return requests.name, Estimate(value=usd / tokens * 1e6, sigma=0.0, provenance=basis.provenance)
    usd = sum(choice.usd for choice in own)
    tokens = requests.requests * requests.mean_output_tokens()
    return requests.name, Estimate(
        value=usd / tokens * 1e6, sigma=basis.sigma if own else 0.0, provenance=basis.provenance
    )
