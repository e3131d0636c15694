"""Batch packing: machine hours for all requests, the least bill, within the deadline if there is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pulp

from moeplan.planner import costs
from moeplan.planner.diagnostics import InfeasibleError
from moeplan.planner.ir.fleet import Alternative, Choice, Column, Route
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import RequestClass, Workload
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
from moeplan.planner.units import format_duration

_ROUND_UP = 1.006  # three printed digits may round down by half a percent


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch class as the solver sees it. A rented machine is paid from launch, so start-up counts."""

    workload: Workload
    requests: RequestClass
    target: float

    def work_hours(self, column: Column) -> float:
        """Machine hours for all requests on one column, start-up not included."""
        return self.requests.requests / column.policy.rates[0].requests_per_s.value / 3600

    def start_hours(self, column: Column) -> float:
        return 0.0 if column.market == "owned" else costs.cold_start_s(self.workload) / 3600

    def available_hours(self, column: Column) -> float:
        """Hours of one replica within the deadline, after its start; infinite without a deadline."""
        if self.requests.deadline_s is None:
            return math.inf
        return max(0.0, self.target * self.requests.deadline_s / 3600 - self.start_hours(column))

    def replicas_alone(self, column: Column) -> int | None:
        """Replicas with which this column alone meets the deadline; None where none do."""
        available, most = self.available_hours(column), _most_batch_replicas(self.requests, column)
        if available == 0.0:
            return None
        count = max(1, math.ceil(self.work_hours(column) / available - 1e-9))
        return count if most is None or count <= most else None

    def bill(self, column: Column, replicas: int, share: float = 1.0) -> float:
        """USD for `share` of the requests on `replicas`, start-up included."""
        hours = self.work_hours(column) * share + self.start_hours(column) * replicas
        return hours * column.usd_per_hour


def _most_batch_replicas(requests: RequestClass, column: Column) -> int | None:
    """One owned machine there is; and without a deadline there is no reason for a second."""
    return 1 if column.market == "owned" or requests.deadline_s is None else None


def solve_batch(spec: Spec, batch: Batch, offered: Sequence[Column], limits: Limits) -> Answer:
    """min the whole bill, all requests done; with a deadline, hours per replica stay within it.

    Columns that no engine executes yet are chosen only where there is no other, and listed as alternatives.
    """
    columns = executable(offered)
    problem, replicas, share = _batch_problem(batch, columns, limits)
    status = solve(problem)
    if status is None:
        raise _binding_batch(spec, batch, columns, limits)
    choices, routes = [], []
    parts = whole({name: variable.value() for name, variable in share.items()})
    for column in columns:
        part = parts[column.name]
        if not part:
            continue
        count = max(1, round(replicas[column.name].value()))
        hours = batch.work_hours(column) * part / count + batch.start_hours(column)
        deadline_s = batch.requests.deadline_s
        choices.append(
            Choice(
                column=column,
                replicas=count,
                utilisation=hours * 3600 / deadline_s if deadline_s else 1.0,
                hours=hours,
                usd=batch.bill(column, count, part),
            )
        )
        routes.append(Route(serves="batch", bucket=0, column=column.name, share=part))
    chosen = {choice.column.name for choice in choices}
    others = _batch_alternatives(batch, [c for c in offered if c.name not in chosen])
    return Answer(tuple(choices), tuple(routes), others, status)


def _batch_problem(
    batch: Batch, columns: Sequence[Column], limits: Limits
) -> tuple[pulp.LpProblem, dict[str, pulp.LpVariable], dict[str, pulp.LpVariable]]:
    problem = pulp.LpProblem("batch", pulp.LpMinimize)
    replicas = {
        c.name: problem.add_variable(f"x{i}", 0, _most_batch_replicas(batch.requests, c), pulp.LpInteger)
        for i, c in enumerate(columns)
    }
    share = {c.name: problem.add_variable(f"w{i}", 0, 1) for i, c in enumerate(columns)}
    # The tie-break prefers fewer machine hours, then columns earlier in the alphabet.
    problem += pulp.lpSum(
        (c.usd_per_hour + TIE_BREAK) * batch.work_hours(c) * share[c.name]
        + (c.usd_per_hour * batch.start_hours(c) + TIE_BREAK * (i + 1)) * replicas[c.name]
        for i, c in enumerate(columns)
    )
    problem += pulp.lpSum(share.values()) == 1
    for c in columns:
        # One replica's part of all requests. Scaled so: 1e-6 replicas are an integer to the solver.
        part = min(1.0, batch.available_hours(c) / batch.work_hours(c))
        problem += share[c.name] <= part * replicas[c.name]
    if batch.requests.deadline_s is None:
        problem += pulp.lpSum(replicas.values()) == 1
    add_limits(problem, columns, replicas, limits)
    return problem, replicas, share


def _batch_alternatives(batch: Batch, columns: Sequence[Column]) -> tuple[Alternative, ...]:
    """Every other column alone, as the whole bill in USD."""
    found = []
    for column in columns:
        replicas = batch.replicas_alone(column)
        if replicas is None:
            continue
        hours = batch.work_hours(column) + batch.start_hours(column) * replicas
        simulated = column.policy.rehearsed_only
        found.append(
            Alternative(
                column=column.name,
                serves="batch",
                replicas=replicas,
                cost_usd=batch.bill(column, replicas),
                note=f"USD in all, {format_duration(hours * 3600)} of machine time"
                + PREDICTED_ONLY * simulated,
            )
        )
    return tuple(sorted(found, key=lambda a: (a.cost_usd, a.column))[:MOST_ALTERNATIVES])


def _binding_batch(spec: Spec, batch: Batch, columns: Sequence[Column], limits: Limits) -> InfeasibleError:
    limit = binding_limit(spec, limits, lambda trial: solve(_batch_problem(batch, columns, trial)[0]))
    if limit is None:
        best = min((batch.work_hours(c) + batch.start_hours(c)) / batch.target for c in columns)
        hint = f"{format_duration(best * 3600 * _ROUND_UP)} is enough for one machine"
        limit = spec.span("workload.batch.deadline"), "the deadline", hint
    return infeasible("batch", *limit)
