"""Why this fleet: the best of one type, the runner-up, what constraints cost, what would change the answer.

Everything is a re-solve. On large problems those are made among the most promising pools, and only slower
throughputs are tried.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pulp

from moeplan.planner.ir.estimate import Z90
from moeplan.planner.ir.fleet import ConstraintCost, Doubt, Flip, Mix, Sensitivity
from moeplan.planner.ir.workload import ClassName
from moeplan.planner.packing.formulate import BUDGET, GPU, Market
from moeplan.planner.packing.milp import Solution, is_large, promising, serve_all, solve_fleet
from moeplan.planner.packing.problem import Pool, Problem
from moeplan.planner.packing.solver import Effort, solve

_EFFORT = Effort(nodes=500)
_MOST_GPUS = 3
_BISECTIONS = 4
_MOST_DOUBTS = 2
_LEAST_FACTOR = 1e-3
_WORTH = 1e-4  # a smaller relative difference in cost is none


def find_sensitivity(market: Market, problem: Problem, solution: Solution) -> Sensitivity:
    """Return what else could have been chosen, and what would have to change for that."""
    large = is_large(problem)
    near = replace(problem, pools=promising(problem, solution.machines)) if large else problem
    used = [pool for pool in near.pools if pool.name in solution.machines]
    runner_up = _runner_up(near, solution)
    single = _single(market, problem)
    flips = list(_slower(market, near, used, solution))
    if not large:
        rivals = [*solution.machines, *_names(runner_up), *_names(single)]
        flips += _faster(market, near, solution, rivals)
    return Sensitivity(
        single=single,
        runner_up=runner_up,
        constraints=tuple(_constraint_costs(near, solution)),
        flips=tuple(sorted(flips, key=lambda flip: (abs(math.log(flip.factor)), flip.gpu))),
        doubts=_doubts(market, used, solution),
    )


def _names(mix: Mix | None) -> list[str]:
    return [name for name, _ in mix.parts] if mix else []


def _single(market: Market, problem: Problem) -> Mix | None:
    """For each class the cheapest column that does all of it; quota and budget aside."""
    parts: list[tuple[str, int]] = []
    cost = 0.0
    for requests in market.workload.classes:
        bills = [bill for pool in problem.pools if (bill := _alone(market, pool, requests.name))]
        if not bills:
            return None
        usd, name, machines = min(bills)
        cost += usd
        parts.append((name, machines))
    return Mix(parts=tuple(sorted(parts)), cost=cost)


def _alone(market: Market, pool: Pool, serves: ClassName) -> tuple[float, str, int] | None:
    """Cost, name and machines of one pool for all of a class; None where it cannot."""
    own = [k for k, demand in enumerate(market.demands) if demand.serves == serves]
    if market.columns[pool.name].policy.serves != serves or not all(pool.serves(k) for k in own):
        return None
    machines = pool.enough(sum(pool.loads[k] for k in own))
    if pool.most is not None and machines > pool.most:
        return None
    served = sum(pool.share_usd[k] for k in own) if pool.share_usd else 0.0
    return pool.usd * (machines + pool.spare) + served, pool.name, machines + pool.spare


def _mix(problem: Problem, solution: Solution) -> Mix:
    spare = {pool.name: pool.spare for pool in problem.pools}
    parts = sorted((name, count + spare[name]) for name, count in solution.machines.items())
    return Mix(parts=tuple(parts), cost=solution.usd)


def _runner_up(problem: Problem, solution: Solution) -> Mix | None:
    """The cheapest fleet that lacks one of the columns chosen."""
    found = []
    for name in sorted(solution.machines):
        fewer = replace(problem, pools=tuple(p for p in problem.pools if p.name != name), before=None)
        if all(any(p.serves(k) for p in fewer.pools) for k in range(len(problem.online))):
            other = solve_fleet(fewer, _EFFORT)
            if other:
                found.append(_mix(fewer, other))
    return min(found, key=lambda mix: (mix.cost, mix.parts), default=None)


def _constraint_costs(problem: Problem, solution: Solution) -> Iterable[ConstraintCost]:
    """What dropping each constraint that the spec sets would save."""
    quotas = {name: most for name, most in problem.limits.items() if name.startswith(GPU)}
    dropped: dict[str, Problem] = {}
    if quotas:
        dropped["quota"] = replace(
            problem, limits={n: m for n, m in problem.limits.items() if n not in quotas}
        )
    if BUDGET in problem.limits:
        dropped["budget"] = replace(problem, limits=quotas)
    if problem.floor:
        dropped["on_demand_floor"] = replace(problem, floor=0.0)
    if problem.survive:
        dropped["survive"] = replace(problem, survive=0.0)
    if problem.before is not None:
        dropped["the previous plan"] = replace(problem, before=None)
    for name, looser in dropped.items():
        other = solve_fleet(looser, _EFFORT)
        saving = max(0.0, solution.usd - other.usd) if other else 0.0
        yield ConstraintCost(constraint=name, saving=saving if saving > _WORTH * solution.usd else 0.0)


def _gpu(market: Market, pool: Pool) -> str:
    """What is wrong together: a GPU type, or where there is none a machine."""
    machine = market.columns[pool.name].policy.machine
    return machine.gpu or machine.name


def _sigma(market: Market, name: str) -> float:
    return market.columns[name].policy.generated_tokens_per_s.sigma


def _slower(market: Market, problem: Problem, used: list[Pool], solution: Solution) -> Iterable[Flip]:
    """For each GPU type of the fleet: the factor on its throughputs below which the fleet is not the answer.

    Where machines are paid all along it stays the answer until it no longer fits: slower machines only make
    other fleets dearer, and it costs what it did. That factor is the optimum of one linear program: loads
    times 1/f fit the capacity where loads fit f times it. Work paid by the hour gets dearer: re-solves.
    """
    for gpu in sorted({_gpu(market, pool) for pool in used}):
        own = [pool for pool in used if _gpu(market, pool) == gpu]
        if any(pool.share_usd for pool in own):
            yield from _bisected(market, problem, solution, gpu, slower=True)
            continue
        program = pulp.LpProblem("slower", pulp.LpMinimize)
        factor = program.add_variable("factor", 0, 1)
        shares = serve_all(problem, used, program)
        program += factor + 0
        for pool in used:
            room = pool.capacity(solution.machines[pool.name]) * (1 + 1e-6)
            load = pulp.lpSum(pool.loads[k] * y for (k, name), y in shares.items() if name == pool.name)
            program += load <= (room * factor if pool in own else room)
        if solve(program) is not None and factor.value() > _LEAST_FACTOR:
            low = math.exp(-Z90 * max(_sigma(market, pool.name) for pool in own))
            value = min(1.0, float(factor.value()))
            yield Flip(gpu=gpu, factor=value, likely=value >= low)


def _faster(market: Market, problem: Problem, solution: Solution, rivals: list[str]) -> Iterable[Flip]:
    """For the GPU types of the fleet and of its rivals: how much faster makes another fleet the answer."""
    pools = {pool.name: pool for pool in problem.pools}
    gpus = list(dict.fromkeys(_gpu(market, pools[name]) for name in rivals if name in pools))
    for gpu in gpus[:_MOST_GPUS]:
        yield from _bisected(market, problem, solution, gpu, slower=False)


def _bisected(market: Market, problem: Problem, solution: Solution, gpu: str, slower: bool) -> Iterable[Flip]:
    """The factor nearest to 1 at which a re-solve has other machines, if it is within the 90 % interval."""
    names = {pool.name for pool in problem.pools if _gpu(market, pool) == gpu}
    sigma = max(_sigma(market, name) for name in names)
    most = math.exp(-Z90 * sigma if slower else Z90 * sigma)

    def flips(factor: float) -> bool:
        pools = tuple(_sped_up(p, factor) if p.name in names else p for p in problem.pools)
        other = solve_fleet(replace(problem, pools=pools), _EFFORT)
        return other is None or other.machines != solution.machines

    if not flips(most):
        return
    same, other = 1.0, most
    for _ in range(_BISECTIONS):
        middle = math.sqrt(same * other)
        same, other = (same, middle) if flips(middle) else (middle, other)
    yield Flip(gpu=gpu, factor=other, likely=True)


def _sped_up(pool: Pool, factor: float) -> Pool:
    return replace(
        pool,
        loads=tuple(load / factor for load in pool.loads),
        share_usd=tuple(usd / factor for usd in pool.share_usd),
    )


def _doubts(market: Market, used: list[Pool], solution: Solution) -> tuple[Doubt, ...]:
    """The sizes whose throughput, uncertain as it is, moves most machines' worth of load."""
    pools = {pool.name: pool for pool in used}
    doubts = []
    for (k, name), share in solution.shares.items():
        rate = market.columns[name].policy.rates
        demand = market.demands[k]
        if demand.serves == "batch" and demand.hours == math.inf:
            continue  # however long it takes
        number = demand.bucket if demand.bucket < len(rate) else 0
        moved = pools[name].loads[k] * share * rate[number].requests_per_s.sigma
        doubts.append(
            Doubt(serves=demand.serves, bucket=demand.bucket, column=name, uncertain_machines=moved)
        )
    doubts.sort(key=lambda d: (-d.uncertain_machines, d.serves, d.bucket, d.column))
    return tuple(d for d in doubts[:_MOST_DOUBTS] if d.uncertain_machines > 0)
