"""What online and batch packing share: limits, the solver, and why there is no solution."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pulp

from moeplan.planner.diagnostics import Diagnostic, InfeasibleError, Span
from moeplan.planner.ir.fleet import Alternative, Choice, Column, Route, SolverStatus
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import ClassName

TIE_BREAK = 1e-6
MOST_ALTERNATIVES = 8
PREDICTED_ONLY = "; predicted only, runtime_min has never run on a GPU"
_LEAST_SHARE = 1e-6  # less is the solver's noise
_MOST_NODES = 20_000


def executable(columns: Sequence[Column]) -> list[Column]:
    """The columns that an engine has executed, or all where none has."""
    return [column for column in columns if not column.policy.rehearsed_only] or list(columns)


@dataclass(frozen=True, slots=True)
class Limits:
    """What may still be bought."""

    quota: dict[str, int]
    budget_usd_per_hour: float | None

    def less(self, choices: Sequence[Choice]) -> Limits:
        """What is left after buying `choices`."""
        quota, budget = dict(self.quota), self.budget_usd_per_hour
        for choice in choices:
            machine = choice.column.policy.machine
            if machine.gpu in quota:
                quota[machine.gpu] -= choice.replicas * machine.gpus
            if budget is not None:
                budget -= choice.replicas * choice.column.usd_per_hour
        return Limits(quota=quota, budget_usd_per_hour=budget)


@dataclass(frozen=True, slots=True)
class Answer:
    """One class's part of the fleet."""

    choices: tuple[Choice, ...]
    routes: tuple[Route, ...]
    alternatives: tuple[Alternative, ...]
    status: SolverStatus


def add_limits(
    problem: pulp.LpProblem,
    columns: Sequence[Column],
    bought: dict[str, pulp.LpAffineExpression],
    limits: Limits,
) -> None:
    """Constrain what is `bought` (replicas of each column, by name) to quota and budget."""
    for gpu, most in sorted(limits.quota.items()):
        own = [c for c in columns if c.policy.machine.gpu == gpu]
        problem += pulp.lpSum(c.policy.machine.gpus * bought[c.name] for c in own) <= most
    if limits.budget_usd_per_hour is not None:
        problem += pulp.lpSum(c.usd_per_hour * bought[c.name] for c in columns) <= limits.budget_usd_per_hour


def whole(raw: Mapping[str, float]) -> dict[str, float]:
    """The solver's shares of one whole, its noise removed: they sum to 1."""
    kept = {name: share if share > _LEAST_SHARE else 0.0 for name, share in raw.items()}
    total = sum(kept.values())
    return {name: share / total for name, share in kept.items()}


def solve(problem: pulp.LpProblem) -> SolverStatus | None:
    """Solve; None where there is no solution. One thread and a limit in nodes: the same answer every time.

    After a limit pulp's `status` still reads "Optimal"; `sol_status` tells an incumbent. Raises
    InfeasibleError where the limit left neither a solution nor a proof that there is none.
    """
    problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, options=[f"maxNodes {_MOST_NODES}"]))
    if problem.status == pulp.LpStatusNotSolved:
        message = f"the solver found no fleet within {_MOST_NODES:,} nodes"
        raise InfeasibleError(
            Diagnostic(code="unsolved", span=Span("moeplan"), message=message, hint="allow fewer GPU types")
        )
    found: dict[int, SolverStatus] = {
        pulp.LpSolutionOptimal: "optimal",
        pulp.LpSolutionIntegerFeasible: "incumbent",
    }
    return found.get(problem.sol_status)


def binding_limit(
    spec: Spec, limits: Limits, solvable: Callable[[Limits], object]
) -> tuple[Span, str, str] | None:
    """The quota or the budget, whichever alone makes the problem infeasible: (place, name, hint)."""
    budget = limits.budget_usd_per_hour
    if limits.quota and solvable(Limits(quota={}, budget_usd_per_hour=budget)):
        return spec.span("market.quota"), "the GPU quota", "raise the quota or allow other GPUs"
    if budget is not None and solvable(Limits(quota=limits.quota, budget_usd_per_hour=None)):
        return spec.span("market.budget"), "the budget", "raise the budget or allow cheaper GPUs"
    if limits.quota and budget is not None and solvable(Limits(quota={}, budget_usd_per_hour=None)):
        return spec.span("market"), "GPU quota and budget together", "raise both"
    return None


def infeasible(serves: ClassName, span: Span, what: str, hint: str) -> InfeasibleError:
    """The answer where no fleet exists: the limit that binds, where it stands, and what would help."""
    message = f"{what} leaves no fleet for the {serves} work"
    return InfeasibleError(Diagnostic(code="infeasible", span=span, message=message, hint=hint))
