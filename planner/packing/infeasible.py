"""Why no fleet exists: the constraint that binds, where it stands, and the least change that would help."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import pulp

from moeplan.planner.diagnostics import Diagnostic, InfeasibleError, Span
from moeplan.planner.ir.spec import Spec
from moeplan.planner.packing.formulate import BUDGET, GPU, Demand, Market
from moeplan.planner.packing.headroom import TARGET
from moeplan.planner.packing.milp import build, solve_fleet
from moeplan.planner.packing.problem import Problem
from moeplan.planner.packing.solver import solve
from moeplan.planner.units import format_duration

_ROUND_UP = 1.006  # three printed digits may round down by half a percent
_CENT = 100.0


def why_infeasible(spec: Spec, market: Market, problem: Problem) -> InfeasibleError:
    """Return the answer to a problem without a solution, with every relaxation that is enough by itself."""
    unserved = [
        demand for k, demand in enumerate(market.demands) if not any(p.serves(k) for p in problem.pools)
    ]
    if unserved:
        return InfeasibleError(*(_unserved(spec, market, demand) for demand in unserved))
    quotas = [name for name in sorted(problem.limits) if name.startswith(GPU)]
    work = "all the work" if len(market.workload.classes) > 1 else f"the {market.demands[0].serves} work"

    def answer(key: str, what: str, hint: str) -> InfeasibleError:
        message = f"{what} leaves no fleet for {work}"
        diagnostic = Diagnostic(code="infeasible", span=spec.span(key), message=message, hint=hint)
        return InfeasibleError(diagnostic)

    if hints := [_raised(problem, more) for name in quotas if (more := relaxed(problem, [name]))]:
        return answer("market.quota", "the GPU quota", f"{', or '.join(hints)}, or allow other GPUs")
    if len(quotas) > 1 and (more := relaxed(problem, quotas)):
        return answer("market.quota", "the GPU quota", f"{_raised(problem, more)}, or allow other GPUs")
    if BUDGET in problem.limits and (more := relaxed(problem, [BUDGET])):
        hint = f"{_raised(problem, more)}, or allow cheaper GPUs"
        return answer("market.budget", "the budget", hint)
    if quotas and BUDGET in problem.limits and (more := relaxed(problem, [*quotas, BUDGET])):
        return answer("market", "GPU quota and budget together", _raised(problem, more))
    if problem.floor and solve_fleet(replace(problem, floor=0.0)):
        hint = "lower it, or allow on-demand machines that serve every size of request"
        return answer("market.on_demand_floor", "the on-demand floor", hint)
    if problem.survive and solve_fleet(replace(problem, survive=0.0)):
        hint = "lower it, or allow more regions"
        return answer("market.survive", "the loss of a region", hint)
    return answer(*_too_much(spec, market, problem))


def relaxed(problem: Problem, resources: Collection[str]) -> Mapping[str, float] | None:
    """The least that `resources` must be raised by, in sum, for a fleet to exist: new limits of those that
    change. None where that is not enough."""
    strict = {name: most for name, most in problem.limits.items() if name not in resources}
    pools = sorted(problem.pools, key=lambda pool: pool.name)
    model = build(replace(problem, limits=strict, before=None), pools)
    program, extra = model.program, {}
    for n, name in enumerate(sorted(resources)):
        extra[name] = program.add_variable(f"extra{n}", 0)
        taken = pulp.lpSum(c.amounts.get(name, 0.0) * model.bought[c.name] for c in pools)
        program += taken - extra[name] <= problem.limits[name]
    program.setObjective(pulp.lpSum(extra.values()))
    if solve(program) is None:
        return None
    return {name: problem.limits[name] + e.value() for name, e in extra.items() if e.value() > 1e-6}


def _raised(problem: Problem, limits: Mapping[str, float]) -> str:
    """New limits in words. GPUs are whole; a budget is rounded up to the cent."""
    words = []
    for name, most in limits.items():
        if name == BUDGET:
            words.append(f"raise the budget to ${math.ceil(most * _CENT - 1e-6) / _CENT:.2f}/h")
        else:
            words.append(f"raise the quota of {name.removeprefix(GPU)} to {math.ceil(most - 1e-6)}")
    return " and ".join(words)


def _unserved(spec: Spec, market: Market, demand: Demand) -> Diagnostic:
    """A size that nothing may serve: too late whatever serves it, or refused by every column."""
    bucket = demand.requests.buckets[demand.bucket]
    if demand.serves == "batch" and math.isfinite(demand.hours):
        place, what, hint = _deadline(spec, market)
        message = f"{what} leaves no fleet for the batch work"
        return Diagnostic(code="infeasible", span=place, message=message, hint=hint)
    size = f"requests of {bucket.prompt_tokens:.0f} + {bucket.output_tokens:.0f} tokens"
    names = ", ".join(sorted({c.policy.machine.name for c in market.columns.values()}))
    return Diagnostic(
        code="unserved-size",
        span=spec.span(f"workload.{demand.serves}"),
        message=f"{size} ({bucket.share:.1%} of the {demand.serves} work) are served by none of {names}",
        hint="relax the SLO, allow other GPUs, or leave such requests out",
    )


def _deadline(spec: Spec, market: Market) -> tuple[Span, str, str]:
    """How long the fastest single machine takes."""
    enough = []
    batch = [d for d in market.demands if d.serves == "batch"]
    for column in market.columns.values():
        if column.policy.serves == "batch":
            work = sum(market.work_hours(column, demand) for demand in batch)
            target = TARGET[column.policy.generated_tokens_per_s.provenance]
            enough.append((work + market.start_hours(column)) / target)
    hint = f"{format_duration(min(enough) * 3600 * _ROUND_UP)} is enough for one machine"
    return spec.span("workload.batch.deadline"), "the deadline", hint


def _too_much(spec: Spec, market: Market, problem: Problem) -> tuple[str, str, str]:
    """Why, if no limit is to blame: one machine's time or rate, or the sizes."""
    if not any(problem.online):
        return "workload.batch.deadline", *_deadline(spec, market)[1:]
    owned = [pool for pool in problem.pools if market.columns[pool.name].market == "owned"]
    if owned:
        rate = next(d.requests.rate_per_s for d in market.demands if d.serves == "online")
        most = max(rate * pool.capacity(1) / sum(pool.loads) for pool in owned)
        target = max(pool.capacity(1) for pool in owned)
        hint = f"one machine, loaded to {target:.0%}, serves {most:.3g}/s of this mix"
        return "workload.online.rate", "the rate", hint
    return "workload.online", "the mix of request sizes", "relax the SLO or drop long requests"
