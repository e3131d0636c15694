"""Online packing: integer replicas, continuous routing, least USD per hour.

Source: Mélange (arXiv 2404.14527), its slices aggregated per bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pulp

from moeplan.planner.diagnostics import InfeasibleError, Span
from moeplan.planner.ir.fleet import Alternative, Choice, Column, Route
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import RequestClass
from moeplan.planner.packing.common import (
    MOST_ALTERNATIVES,
    PREDICTED_ONLY,
    TIE_BREAK,
    Answer,
    Limits,
    add_limits,
    binding_limit,
    executable,
    infeasible,
    solve,
    whole,
)

SPOT_OVERPROVISION = 1  # more spot replicas than needed while serving online: SkyServe's N_Extra


def solve_online(
    spec: Spec, requests: RequestClass, offered: Sequence[Column], target: float, limits: Limits
) -> Answer:
    """min Σ price·(replicas + spot extra), every bucket routed, no column loaded above `target`.

    Columns that no engine executes yet are chosen only where there is no other, and listed as alternatives.
    """
    columns = executable(offered)
    problem, replicas = _online_problem(requests, columns, target, limits)
    status = solve(problem)
    if status is None:
        raise _binding_online(spec, requests, columns, target, limits)
    counts = {c.name: round(replicas[c.name].value()) for c in columns}
    used = [c for c in columns if counts[c.name]]
    shares = _balanced_shares(requests, used, counts)
    choices, routes = [], []
    for column in used:
        load = sum(_load(requests, column, b) * shares[b, column.name] for b in range(len(requests.buckets)))
        extra = SPOT_OVERPROVISION if column.market == "spot" else 0
        choices.append(
            Choice(
                column=column,
                replicas=counts[column.name] + extra,
                utilisation=load / counts[column.name],
                hours=0.0,
                usd=0.0,
            )
        )
        routes += [
            Route(serves="online", bucket=b, column=column.name, share=shares[b, column.name])
            for b in range(len(requests.buckets))
            if shares[b, column.name]
        ]
    return Answer(
        tuple(choices), tuple(routes), _online_alternatives(requests, offered, used, target), status
    )


def _load(requests: RequestClass, column: Column, bucket: int) -> float:
    """Replicas that the whole of a bucket keeps busy; infinite where the column cannot serve it."""
    rate = column.policy.rates[bucket].requests_per_s.value
    wanted = requests.rate_per_s * requests.buckets[bucket].share
    return wanted / rate if rate > 0 else math.inf


def _whole_load(requests: RequestClass, column: Column) -> float:
    """Replicas that all requests keep busy on one column; infinite where it cannot serve some size."""
    return sum(_load(requests, column, b) for b in range(len(requests.buckets)))


def _online_problem(
    requests: RequestClass, columns: Sequence[Column], target: float, limits: Limits
) -> tuple[pulp.LpProblem, dict[str, pulp.LpVariable]]:
    problem = pulp.LpProblem("fleet", pulp.LpMinimize)
    replicas = {
        c.name: problem.add_variable(f"x{i}", 0, 1 if c.market == "owned" else None, pulp.LpInteger)
        for i, c in enumerate(columns)
    }
    extra = {
        c.name: problem.add_variable(f"u{i}", 0, 1, pulp.LpInteger)
        for i, c in enumerate(columns)
        if c.market == "spot"
    }
    bought = {c.name: replicas[c.name] + SPOT_OVERPROVISION * extra.get(c.name, 0) for c in columns}
    buckets = range(len(requests.buckets))
    share = {
        (b, c.name): problem.add_variable(f"y{b}_{i}", 0, 1)
        for b in buckets
        for i, c in enumerate(columns)
        if math.isfinite(_load(requests, c, b))
    }
    problem += pulp.lpSum(
        c.usd_per_hour * bought[c.name] + TIE_BREAK * (i + 1) * replicas[c.name]
        for i, c in enumerate(columns)
    )
    for b in buckets:
        problem += pulp.lpSum(share[b, c.name] for c in columns if (b, c.name) in share) == 1
    for c in columns:
        load = pulp.lpSum(_load(requests, c, b) * share[b, c.name] for b in buckets if (b, c.name) in share)
        problem += load <= target * replicas[c.name]
        # A slow trickle's loads drown in the solver's tolerance: what serves is there at least once.
        for b in buckets:
            if (b, c.name) in share:
                problem += share[b, c.name] <= replicas[c.name]
        if c.name in extra:
            problem += replicas[c.name] <= _most_replicas(requests, c, target) * extra[c.name]
    add_limits(problem, columns, bought, limits)
    return problem, replicas


def _most_replicas(requests: RequestClass, column: Column, target: float) -> int:
    loads = [_load(requests, column, b) for b in range(len(requests.buckets))]
    return math.ceil(sum(load for load in loads if math.isfinite(load)) / target) + 1


def _balanced_shares(
    requests: RequestClass, used: Sequence[Column], counts: dict[str, int]
) -> dict[tuple[int, str], float]:
    """With the replicas fixed: the routing with the lowest peak utilisation, ties by column order.

    The first solve leaves the shares free to wander between solvers; this one pins them.
    """
    buckets = range(len(requests.buckets))
    pairs = [(b, c) for b in buckets for c in used if math.isfinite(_load(requests, c, b))]
    problem = pulp.LpProblem("routing", pulp.LpMinimize)
    peak = problem.add_variable("peak", 0)
    share = {(b, c.name): problem.add_variable(f"y{n}", 0, 1) for n, (b, c) in enumerate(pairs)}
    order = {c.name: i + 1 for i, c in enumerate(used)}
    problem += peak + pulp.lpSum(1e-4 * order[name] * y for (_, name), y in share.items())
    for b in buckets:
        problem += pulp.lpSum(y for (bucket, _), y in share.items() if bucket == b) == 1
    for c in used:
        load = pulp.lpSum(_load(requests, c, b) * y for (b, name), y in share.items() if name == c.name)
        problem += load <= counts[c.name] * peak
    solve(problem)
    shares = {}
    for b in buckets:
        row = {c.name: share[b, c.name].value() if (b, c.name) in share else 0.0 for c in used}
        shares.update({(b, name): value for name, value in whole(row).items()})
    return shares


def _online_alternatives(
    requests: RequestClass, columns: Sequence[Column], used: Sequence[Column], target: float
) -> tuple[Alternative, ...]:
    """Every other column alone, in USD per hour."""
    found = []
    for column in columns:
        load = _whole_load(requests, column)
        if not math.isfinite(load) or [column] == list(used):
            continue
        replicas = math.ceil(load / target - 1e-9) + (SPOT_OVERPROVISION if column.market == "spot" else 0)
        found.append(
            Alternative(
                column=column.name,
                serves="online",
                replicas=replicas,
                cost_usd=replicas * column.usd_per_hour,
                note="USD per hour" + PREDICTED_ONLY * column.policy.rehearsed_only,
            )
        )
    return tuple(sorted(found, key=lambda a: (a.cost_usd, a.column))[:MOST_ALTERNATIVES])


def _binding_online(
    spec: Spec, requests: RequestClass, columns: Sequence[Column], target: float, limits: Limits
) -> InfeasibleError:
    limit = binding_limit(
        spec, limits, lambda trial: solve(_online_problem(requests, columns, target, trial)[0])
    )
    return infeasible("online", *(limit or _too_much(spec, requests, columns, target)))


def _too_much(
    spec: Spec, requests: RequestClass, columns: Sequence[Column], target: float
) -> tuple[Span, str, str]:
    """Why, if neither quota nor budget is to blame: one machine's rate, or the sizes."""
    if any(column.market == "owned" for column in columns):
        load = min(_whole_load(requests, column) for column in columns)
        most = requests.rate_per_s * target / load
        hint = f"one machine, loaded to {target:.0%}, serves {most:.3g}/s of this mix"
        return spec.span("workload.online.rate"), "the rate", hint
    return spec.span("workload.online"), "the mix of request sizes", "relax the SLO or drop long requests"
