"""Workload, policies, offers -> Fleet: the cheapest replicas that serve every class (MILP, pulp and CBC).

Source: Mélange (arXiv 2404.14527) in its aggregated form: routing shares are continuous, replicas integer,
and a column is a replica configuration, not a GPU type. Offloaded columns serve batch work only.
Online work minimises USD per hour; batch work minimises the whole bill, within its deadline if it has one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pulp

from moeplan.planner import costs
from moeplan.planner.diagnostics import Diagnostic, InfeasibleError, Span
from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.fleet import Alternative, Choice, Column, Fleet, Market, Route, SolverStatus
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.policy import Policy, Rejection
from moeplan.planner.ir.spec import MarketSpec, Spec
from moeplan.planner.ir.workload import ClassName, RequestClass, Workload
from moeplan.planner.units import format_duration

# How full replicas may be planned: throughputs are estimates, and an optimiser picks the over-estimated ones.
_TARGET_UTILISATION = {"datasheet": 0.7, "analytic": 0.7, "calibrated": 0.8, "measured": 0.85}
SPOT_OVERPROVISION = 1  # more spot replicas than needed while serving online: SkyServe's N_Extra
_TIE_BREAK = 1e-6
_SOLVER_SECONDS = 20
_ALTERNATIVES = 8
_SHARE_DIGITS = 4


def choose_fleet(
    spec: Spec,
    workload: Workload,
    policies: Sequence[Policy],
    rejections: Sequence[Rejection],
    offers: Sequence[Offer],
) -> Fleet:
    """Return the cheapest fleet. Raises InfeasibleError naming the constraint that binds."""
    columns = _columns(policies, offers, spec.market)
    _require_columns(spec, workload, columns, rejections)
    target = min(_TARGET_UTILISATION[c.policy.generated_tokens_per_s.provenance] for c in columns)
    limits = _Limits(quota=dict(spec.market.quota), budget_usd_per_hour=spec.market.budget_usd_per_hour)
    answers: list[_Answer] = []
    for requests in sorted(workload.classes, key=lambda r: r.name != "online"):
        own = [column for column in columns if column.policy.serves == requests.name]
        if requests.name == "online":
            answer = _solve_online(spec, requests, own, target, limits)
        else:
            answer = _solve_batch(spec, _Batch(workload, requests, target), own, limits)
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


@dataclass(frozen=True, slots=True)
class _Limits:
    """What may still be bought."""

    quota: dict[str, int]
    budget_usd_per_hour: float | None

    def less(self, choices: Sequence[Choice]) -> _Limits:
        quota, budget = dict(self.quota), self.budget_usd_per_hour
        for choice in choices:
            machine = choice.column.policy.machine
            if machine.gpu in quota:
                quota[machine.gpu] -= choice.replicas * machine.gpus
            if budget is not None:
                budget -= choice.replicas * choice.column.usd_per_hour
        return _Limits(quota=quota, budget_usd_per_hour=budget)


@dataclass(frozen=True, slots=True)
class _Answer:
    choices: tuple[Choice, ...]
    routes: tuple[Route, ...]
    alternatives: tuple[Alternative, ...]
    status: SolverStatus


# Columns


def _columns(policies: Sequence[Policy], offers: Sequence[Offer], market: MarketSpec) -> list[Column]:
    """Each policy in each market that sells its machine, at the cheapest region; sorted by name."""
    columns = []
    for policy in policies:
        own = [offer for offer in offers if offer.machine == policy.machine.name]
        if not own:
            columns.append(_column(policy, "owned", None, 0.0))
        if own and market.purchase != "spot":
            best = min(own, key=lambda o: (o.on_demand_usd_per_hour, o.region))
            columns.append(_column(policy, "on-demand", best, best.on_demand_usd_per_hour))
        priced = [(o.spot_usd_per_hour, o.region, o) for o in own if o.spot_usd_per_hour is not None]
        if priced and market.purchase != "on-demand":
            price, _, offer = min(priced, key=lambda item: item[:2])
            columns.append(_column(policy, "spot", offer, price))
    return sorted(columns, key=lambda column: column.name)


def _column(policy: Policy, market: Market, offer: Offer | None, price: float) -> Column:
    parts = [policy.serves, policy.machine.name.replace(".", "-").replace("_", "-").lower(), market]
    if policy.engine == "runtime_min" and policy.gpus:
        parts.append("offload")
    return Column(
        name="-".join(parts),
        policy=policy,
        market=market,
        cloud=offer.cloud if offer else "",
        usd_per_hour=price,
    )


def _require_columns(
    spec: Spec, workload: Workload, columns: Sequence[Column], rejections: Sequence[Rejection]
) -> None:
    """Every class needs a column; otherwise say why each machine was refused, nearest miss first."""
    problems = []
    for requests in workload.classes:
        if any(column.policy.serves == requests.name for column in columns):
            continue
        why = [r for r in rejections if r.serves == requests.name]
        span = spec.span("machine" if spec.machine else f"workload.{requests.name}")
        if not why:
            problems.append(
                Diagnostic(
                    code="no-machine",
                    span=spec.span("market"),
                    message=f"the market offers no machine for the {requests.name} work",
                    hint="allow more clouds, regions, GPUs or both purchase kinds; `moeplan catalog offers`",
                )
            )
        for reason in _telling(why):
            problems.append(
                Diagnostic(
                    code="infeasible",
                    span=span,
                    message=f"{reason.machine}: {reason.message} ({reason.constraint})",
                    hint=reason.hint,
                )
            )
    if problems:
        raise InfeasibleError(*problems)


def _telling(rejections: Sequence[Rejection]) -> list[Rejection]:
    """At most three refusals, each for another constraint first."""
    seen: dict[str, Rejection] = {}
    for rejection in rejections:
        seen.setdefault(rejection.constraint, rejection)
    return list(seen.values())[:3]


# Online


def _solve_online(
    spec: Spec, requests: RequestClass, columns: Sequence[Column], target: float, limits: _Limits
) -> _Answer:
    """min Σ price·(replicas + spot extra), every bucket routed, no column loaded above `target`."""
    problem, replicas = _online_problem(requests, columns, target, limits)
    status = _solve(problem)
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
    return _Answer(
        tuple(choices), tuple(routes), _online_alternatives(requests, columns, used, target), status
    )


def _load(requests: RequestClass, column: Column, bucket: int) -> float:
    """Replicas that the whole of a bucket keeps busy; infinite where the column cannot serve it."""
    rate = column.policy.rates[bucket].requests_per_s.value
    wanted = requests.rate_per_s * requests.buckets[bucket].share
    return wanted / rate if rate > 0 else math.inf


def _online_problem(
    requests: RequestClass, columns: Sequence[Column], target: float, limits: _Limits
) -> tuple[pulp.LpProblem, dict[str, pulp.LpVariable]]:
    problem = pulp.LpProblem("fleet", pulp.LpMinimize)
    replicas = {c.name: problem.add_variable(f"x{i}", 0, None, pulp.LpInteger) for i, c in enumerate(columns)}
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
        c.usd_per_hour * bought[c.name] + _TIE_BREAK * (i + 1) * replicas[c.name]
        for i, c in enumerate(columns)
    )
    for b in buckets:
        problem += pulp.lpSum(share[b, c.name] for c in columns if (b, c.name) in share) == 1
    for c in columns:
        load = pulp.lpSum(_load(requests, c, b) * share[b, c.name] for b in buckets if (b, c.name) in share)
        problem += load <= target * replicas[c.name]
        if c.name in extra:
            problem += replicas[c.name] <= _most_replicas(requests, c, target) * extra[c.name]
    _add_limits(problem, columns, bought, limits)
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
    _solve(problem)
    return _rounded(buckets, used, {key: y.value() for key, y in share.items()})


def _rounded(
    buckets: range, used: Sequence[Column], raw: dict[tuple[int, str], float]
) -> dict[tuple[int, str], float]:
    """Shares in ten-thousandths that sum to exactly 1 per bucket; the largest takes the remainder."""
    shares = {}
    for b in buckets:
        row = {c.name: round(max(0.0, raw.get((b, c.name), 0.0)), _SHARE_DIGITS) for c in used}
        largest = max(row, key=lambda name: row[name])
        row[largest] = round(row[largest] + 1.0 - sum(row.values()), _SHARE_DIGITS)
        shares.update({(b, name): value for name, value in row.items()})
    return shares


def _online_alternatives(
    requests: RequestClass, columns: Sequence[Column], used: Sequence[Column], target: float
) -> tuple[Alternative, ...]:
    """Every other column alone, in USD per hour."""
    found = []
    for column in columns:
        load = sum(_load(requests, column, b) for b in range(len(requests.buckets)))
        if not math.isfinite(load) or [column] == list(used):
            continue
        replicas = math.ceil(load / target - 1e-9) + (SPOT_OVERPROVISION if column.market == "spot" else 0)
        found.append(
            Alternative(
                column=column.name,
                serves="online",
                replicas=replicas,
                cost_usd=replicas * column.usd_per_hour,
                note="alone, USD per hour",
            )
        )
    return tuple(sorted(found, key=lambda a: (a.cost_usd, a.column))[:_ALTERNATIVES])


def _binding_online(
    spec: Spec, requests: RequestClass, columns: Sequence[Column], target: float, limits: _Limits
) -> InfeasibleError:
    limit = _binding_limit(
        spec, limits, lambda trial: _solve(_online_problem(requests, columns, target, trial)[0])
    )
    sizes = (
        spec.span("workload.online"),
        "the mix of request sizes",
        "relax the SLO or drop long requests",
    )
    return _infeasible("online", *(limit or sizes))


# Batch


@dataclass(frozen=True, slots=True)
class _Batch:
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


def _solve_batch(spec: Spec, batch: _Batch, columns: Sequence[Column], limits: _Limits) -> _Answer:
    """min the whole bill, all requests done; with a deadline, hours per replica stay within it."""
    problem, replicas, share = _batch_problem(batch, columns, limits)
    status = _solve(problem)
    if status is None:
        raise _binding_batch(spec, batch, columns, limits)
    choices, routes = [], []
    for column in columns:
        part = round(share[column.name].value(), _SHARE_DIGITS)
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
    others = _batch_alternatives(batch, [c for c in columns if c.name not in chosen])
    return _Answer(tuple(choices), tuple(routes), others, status)


def _batch_problem(
    batch: _Batch, columns: Sequence[Column], limits: _Limits
) -> tuple[pulp.LpProblem, dict[str, pulp.LpVariable], dict[str, pulp.LpVariable]]:
    problem = pulp.LpProblem("batch", pulp.LpMinimize)
    replicas = {
        c.name: problem.add_variable(f"x{i}", 0, _most_batch_replicas(batch.requests, c), pulp.LpInteger)
        for i, c in enumerate(columns)
    }
    share = {c.name: problem.add_variable(f"w{i}", 0, 1) for i, c in enumerate(columns)}
    # The tie-break prefers fewer machine hours, then columns earlier in the alphabet.
    problem += pulp.lpSum(
        (c.usd_per_hour + _TIE_BREAK) * batch.work_hours(c) * share[c.name]
        + (c.usd_per_hour * batch.start_hours(c) + _TIE_BREAK * (i + 1)) * replicas[c.name]
        for i, c in enumerate(columns)
    )
    problem += pulp.lpSum(share.values()) == 1
    for c in columns:
        available = batch.available_hours(c)
        if math.isfinite(available):
            problem += batch.work_hours(c) * share[c.name] <= available * replicas[c.name]
        else:
            problem += share[c.name] <= replicas[c.name]
    if batch.requests.deadline_s is None:
        problem += pulp.lpSum(replicas.values()) == 1
    _add_limits(problem, columns, replicas, limits)
    return problem, replicas, share


def _batch_alternatives(batch: _Batch, columns: Sequence[Column]) -> tuple[Alternative, ...]:
    """Every other column alone, as the whole bill in USD."""
    found = []
    for column in columns:
        replicas = batch.replicas_alone(column)
        if replicas is None:
            continue
        hours = batch.work_hours(column) + batch.start_hours(column) * replicas
        found.append(
            Alternative(
                column=column.name,
                serves="batch",
                replicas=replicas,
                cost_usd=batch.bill(column, replicas),
                note=f"alone, USD in all, {format_duration(hours * 3600)} of machine time",
            )
        )
    return tuple(sorted(found, key=lambda a: (a.cost_usd, a.column))[:_ALTERNATIVES])


def _binding_batch(spec: Spec, batch: _Batch, columns: Sequence[Column], limits: _Limits) -> InfeasibleError:
    limit = _binding_limit(spec, limits, lambda trial: _solve(_batch_problem(batch, columns, trial)[0]))
    if limit is None:
        best = min(batch.work_hours(c) / batch.target + batch.start_hours(c) for c in columns)
        hint = f"{format_duration(best * 3600)} is enough for one machine"
        limit = spec.span("workload.batch.deadline"), "the deadline", hint
    return _infeasible("batch", *limit)


# Both


def _add_limits(
    problem: pulp.LpProblem,
    columns: Sequence[Column],
    bought: dict[str, pulp.LpAffineExpression],
    limits: _Limits,
) -> None:
    for gpu, most in sorted(limits.quota.items()):
        own = [c for c in columns if c.policy.machine.gpu == gpu]
        problem += pulp.lpSum(c.policy.machine.gpus * bought[c.name] for c in own) <= most
    if limits.budget_usd_per_hour is not None:
        problem += pulp.lpSum(c.usd_per_hour * bought[c.name] for c in columns) <= limits.budget_usd_per_hour


def _solve(problem: pulp.LpProblem) -> SolverStatus | None:
    """Solve; None where there is no solution. One thread: the same answer every time.

    After a time limit pulp's `status` still reads "Optimal"; `sol_status` tells an incumbent.
    """
    problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, timeLimit=_SOLVER_SECONDS))
    found: dict[int, SolverStatus] = {
        pulp.LpSolutionOptimal: "optimal",
        pulp.LpSolutionIntegerFeasible: "incumbent",
    }
    return found.get(problem.sol_status)


def _binding_limit(
    spec: Spec, limits: _Limits, solvable: Callable[[_Limits], object]
) -> tuple[Span, str, str] | None:
    """The quota or the budget, whichever alone makes the problem infeasible: (place, name, hint)."""
    budget = limits.budget_usd_per_hour
    if limits.quota and solvable(_Limits(quota={}, budget_usd_per_hour=budget)):
        return spec.span("market.quota"), "the GPU quota", "raise the quota or allow other GPUs"
    if budget is not None and solvable(_Limits(quota=limits.quota, budget_usd_per_hour=None)):
        return spec.span("market.budget"), "the budget", "raise the budget or allow cheaper GPUs"
    if limits.quota and budget is not None and solvable(_Limits(quota={}, budget_usd_per_hour=None)):
        return spec.span("market"), "GPU quota and budget together", "raise both"
    return None


def _infeasible(serves: ClassName, span: Span, what: str, hint: str) -> InfeasibleError:
    message = f"{what} leaves no fleet for the {serves} work"
    return InfeasibleError(Diagnostic(code="infeasible", span=span, message=message, hint=hint))


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
