"""Problem -> Solution: how many machines of each pool, and which share of each demand goes where.

    min   Σ_c usd_c (x_c + spare_c u_c) + Σ_kc usd_kc y_kc + γ Σ_c usd_c |x_c - before_c|
    s.t.  Σ_c y_kc = 1                                         every demand k is served
          Σ_k load_kc y_kc ≤ target_c x_c                      no machine above its target
          Σ_k load_kc y_kc ≤ ceiling_c x_c - reserve_c u_c     small pools hold back more
          x_c ≤ M_c u_c                                        u_c: whether pool c is used
          Σ_c amount_rc (x_c + spare_c u_c) ≤ limit_r          every resource r: GPU quotas, the budget
          Σ_{c steady} y_kc ≥ floor                            every online demand k
          Σ_{c∉z} y'_kc = survive, loads of y' as of y         every online demand k, every region z
          x integer, u binary, y ≥ 0

Source: Mélange (arXiv 2404.14527) in its aggregated form. Its slices of one bucket are interchangeable, so
counting them is equivalent, and y is the limit of ever thinner slices: never dearer for any number of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pulp

from moeplan.planner.diagnostics import InfeasibleError
from moeplan.planner.ir.fleet import SolverStatus
from moeplan.planner.packing.alike import carry_alike, cheapest_counts
from moeplan.planner.packing.dominance import undominated
from moeplan.planner.packing.pricing import price
from moeplan.planner.packing.problem import Pool, Problem
from moeplan.planner.packing.solver import Effort, Result, solve

CHURN = 0.05  # a move of one machine must save a twentieth of its price
_TIE_BREAK = 1e-6  # USD for one machine of the first pool, twice that of the second
_MOST_TIE_BREAK = 1e-4  # USD for one machine of the last pool
_TRICKLE = 0.01  # loads below drown in the solver's tolerance
_DIRECT = 1500  # pairs of pool and demand that the solver takes as they are
_STEPS = 250
_PROMISING = 20
_LARGE_EFFORT = Effort(nodes=2_000)
_LEAST_SHARE = 5e-7
_DIGITS = 6
_SLACK = 1e-6  # the first solve's own tolerance
Shares = dict[tuple[int, str], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Machines by pool, spares not counted; shares by (demand, pool), each demand's summing to 1.

    `usd` is what they cost over the horizon, `objective` with the price of moves and ties. No fleet's
    objective is less than 1 - `gap` of that.
    """

    machines: dict[str, int]
    shares: Shares
    usd: float
    objective: float
    gap: float
    status: SolverStatus


@dataclass(frozen=True, slots=True)
class Model:
    """A pulp problem and its variables by pool; what is bought counts spares."""

    program: pulp.LpProblem
    machines: dict[str, pulp.LpVariable]
    used: dict[str, pulp.LpVariable]
    bought: dict[str, pulp.LpAffineExpression]
    shares: dict[tuple[int, str], pulp.LpVariable]


def solve_fleet(problem: Problem, effort: Effort | None = None, prune: bool = True) -> Solution | None:
    """Return the cheapest fleet; None where there is none. The order of pools does not matter.

    Raises InfeasibleError where the limit of the search left neither a fleet nor a proof that there is none.
    """
    pools = sorted(problem.pools, key=lambda pool: pool.name)
    if not all(any(pool.serves(k) for pool in pools) for k in range(len(problem.online))):
        return None
    if prune and carry_alike(problem, pools := undominated(pools, problem)):
        return _counted(problem, pools)
    if prune and len(pools) * len(problem.online) > _DIRECT:
        return _solve_large(problem, pools, effort)
    return _solve(problem, pools, effort)


def is_large(problem: Problem) -> bool:
    """Whether the problem is more than the solver takes as it is."""
    return len(problem.pools) * len(problem.online) > _DIRECT


def promising(problem: Problem, names: Collection[str]) -> tuple[Pool, ...]:
    """The pools that add least to the lower bound of any fleet, and those of `names`."""
    pools = undominated(sorted(problem.pools, key=lambda pool: pool.name), problem)
    priced = price(pools, _guess(pools), _STEPS)
    best = {pools[i].name for i in np.argsort(priced.extra, kind="stable")[:_PROMISING]}
    return tuple(pool for pool in problem.pools if pool.name in best or pool.name in names)


def serve_all(
    problem: Problem, pools: Sequence[Pool], program: pulp.LpProblem
) -> dict[tuple[int, str], pulp.LpVariable]:
    """Shares of every demand over `pools` in `program`, all of it served and the floor kept."""
    shares = _share_variables(program, pools, range(len(problem.online)), "y")
    _serve(problem, pools, program, shares)
    return shares


def _counted(problem: Problem, pools: Sequence[Pool]) -> Solution | None:
    """As `_solve`, of pools that carry all demands alike."""
    found = cheapest_counts(problem, pools, _ties(pools))
    if found is None:
        return None
    objective, numbers = found
    counts = {c.name: count for c, count in zip(pools, numbers, strict=True)}
    result = Result(status="optimal", objective=objective, bound=objective)
    return _solution(problem, [c for c in pools if counts[c.name]], counts, {}, result)


def _solve(problem: Problem, pools: Sequence[Pool], effort: Effort | None) -> Solution | None:
    model = build(problem, pools)
    result = solve(model.program, effort)
    if result is None:
        return None
    counts = {c.name: round(model.machines[c.name].value()) for c in pools}
    used = [c for c in pools if counts[c.name]]
    found = {key: y.value() for key, y in model.shares.items() if counts[key[1]]}
    return _solution(problem, used, counts, found, result)


def _solve_large(problem: Problem, pools: Sequence[Pool], effort: Effort | None) -> Solution | None:
    """The cheapest fleet of the most promising pools, then of all that could be part of a cheaper one.

    Where none could, that fleet is the cheapest of all. What is left out is proven dearer (`pricing`).
    """
    effort = effort or _LARGE_EFFORT
    first = price(pools, _guess(pools), _STEPS)
    best = [pools[i] for i in sorted(np.argsort(first.extra, kind="stable")[:_PROMISING])]
    known = _solve(problem, best, effort)
    if known is None:
        return _solve(problem, pools, effort)
    pools = [c for c, extra in zip(pools, first.extra, strict=True) if first.bound + extra <= known.objective]
    again = price(pools, known.objective, _STEPS, first.prices)
    left = [c for c, extra in zip(pools, again.extra, strict=True) if again.bound + extra <= known.objective]
    if {c.name for c in left} <= {c.name for c in best}:
        return known
    try:
        found = _solve(problem, left, effort)
    except InfeasibleError:  # the limit came before any fleet: the one at hand stands
        found = None
    return _better(known, found, again.bound)


def _guess(pools: Sequence[Pool]) -> float:
    """About what a fleet costs: each demand where it is cheapest, and as many half-empty machines again."""
    demands = range(len(pools[0].loads))
    return 1.2 * sum(min(c.usd * c.loads[k] / c.target for c in pools) for k in demands)


def _better(known: Solution, found: Solution | None, bound: float) -> Solution:
    """The cheaper of a fleet of the promising pools and one of all that are left, with the best gap known.

    Only a search of all that are left can prove a fleet the cheapest.
    """
    if found is not None and found.status == "optimal":
        return found
    best = replace(known, status="incumbent", gap=1.0)
    if found is not None:
        bound = max(bound, found.objective * (1 - found.gap))
        best = min(best, found, key=lambda solution: solution.objective)
    return replace(best, gap=max(0.0, 1.0 - bound / best.objective))


def _solution(
    problem: Problem, used: Sequence[Pool], counts: Mapping[str, int], found: Shares, result: Result
) -> Solution:
    shares = _balanced(problem, used, counts, found)
    machines = sum(c.usd * (counts[c.name] + c.spare) for c in used)
    served = sum(
        c.share_usd[k] * shares.get((k, c.name), 0.0)
        for c in used
        if c.share_usd
        for k in range(len(problem.online))
    )
    return Solution(
        machines={c.name: counts[c.name] for c in used},
        shares=shares,
        usd=machines + served,
        objective=result.objective,
        gap=0.0 if result.status == "optimal" else max(0.0, 1.0 - result.bound / result.objective),
        status=result.status,
    )


def build(problem: Problem, pools: Sequence[Pool]) -> Model:
    """The program of the module's head over `pools`; the limit of the n-th resource is called limit_n."""
    model = _variables(problem, pools)
    program = model.program
    ties = [tie * model.machines[c.name] for tie, c in zip(_ties(pools), pools, strict=True)]
    program += pulp.lpSum([*_costs(problem, pools, model), *ties])
    _serve(problem, pools, program, model.shares)
    for c in pools:
        _carry(c, program, model.machines[c.name], model.used.get(c.name, 0), model.shares)
        _no_trickle(c, model)
    for n, (resource, most) in enumerate(sorted(problem.limits.items())):
        taken = pulp.lpSum(c.amounts.get(resource, 0.0) * model.bought[c.name] for c in pools)
        program += taken <= most, f"limit_{n}"
    if problem.survive:
        _survive(problem, pools, model)
    if single := [model.machines[c.name] for c in pools if c.name in problem.single]:
        program += pulp.lpSum(single) == 1
    return model


def _ties(pools: Sequence[Pool]) -> list[float]:
    """What a machine of each pool costs more, so that of equals the first is taken."""
    step = min(_TIE_BREAK, _MOST_TIE_BREAK / max(1, len(pools)))
    return [step * (i + 1) for i in range(len(pools))]


def _variables(problem: Problem, pools: Sequence[Pool]) -> Model:
    program = pulp.LpProblem("fleet", pulp.LpMinimize)
    machines, used, bought = {}, {}, {}
    for i, c in enumerate(pools):
        x = machines[c.name] = program.add_variable(f"x{i}", 0, c.most, pulp.LpInteger)
        bought[c.name] = x + 0
        if c.spare or c.holds_back:
            u = used[c.name] = program.add_variable(f"u{i}", 0, 1, pulp.LpInteger)
            bought[c.name] = x + c.spare * u
            program += x <= _most(c) * u
            program += x >= u
    shares = _share_variables(program, pools, range(len(problem.online)), "y")
    return Model(program, machines, used, bought, shares)


def _share_variables(
    program: pulp.LpProblem, pools: Sequence[Pool], demands: Iterable[int], name: str
) -> dict[tuple[int, str], pulp.LpVariable]:
    demands = list(demands)
    return {
        (k, c.name): program.add_variable(f"{name}{k}_{i}", 0)
        for i, c in enumerate(pools)
        for k in demands
        if c.serves(k)
    }


def _most(pool: Pool) -> int:
    """As many machines as any fleet needs of one pool."""
    return pool.enough(sum(load for k, load in enumerate(pool.loads) if pool.serves(k))) + 1


def _costs(problem: Problem, pools: Sequence[Pool], model: Model) -> list[pulp.LpAffineExpression]:
    """Machines, what is served by the share, and moves."""
    program = model.program
    costs = [c.usd * model.bought[c.name] for c in pools]
    prices = {c.name: c.share_usd for c in pools if c.share_usd}
    costs += [prices[name][k] * y for (k, name), y in model.shares.items() if name in prices]
    if problem.before is not None:
        for i, c in enumerate(pools):
            moved, before = program.add_variable(f"a{i}", 0), problem.before.get(c.name, 0)
            program += moved >= model.bought[c.name] - before
            program += moved >= before - model.bought[c.name]
            costs.append(CHURN * c.usd * moved)
    return costs


def _serve(
    problem: Problem,
    pools: Sequence[Pool],
    program: pulp.LpProblem,
    shares: Mapping[tuple[int, str], pulp.LpVariable],
) -> None:
    """Each demand in full, of the online ones at least `floor` on steady pools."""
    for k, online in enumerate(problem.online):
        own = [c for c in pools if (k, c.name) in shares]
        program += pulp.lpSum(shares[k, c.name] for c in own) == 1
        if online and problem.floor:
            program += pulp.lpSum(shares[k, c.name] for c in own if c.steady) >= problem.floor


def _carry(
    pool: Pool,
    program: pulp.LpProblem,
    machines: pulp.LpVariable | float,
    used: pulp.LpVariable | float,
    shares: Mapping[tuple[int, str], pulp.LpVariable],
) -> None:
    """The pool's load within what its machines may carry."""
    own = [(k, shares[k, pool.name]) for k in range(len(pool.loads)) if (k, pool.name) in shares]
    load = pulp.lpSum(pool.loads[k] * y for k, y in own)
    program += load <= pool.target * machines
    if pool.holds_back:
        program += load <= pool.ceiling * machines - pool.reserve * used


def _no_trickle(pool: Pool, model: Model) -> None:
    """Small loads fit no machine at all, to the solver's tolerance: what serves is there at least once."""
    program = model.program
    for k, load in enumerate(pool.loads):
        if load < _TRICKLE:
            program += model.shares[k, pool.name] <= model.machines[pool.name]


def _survive(problem: Problem, pools: Sequence[Pool], model: Model) -> None:
    """Without the pools of any one region, the share `survive` of each online demand is still carried."""
    program = model.program
    timed = [k for k, online in enumerate(problem.online) if online]
    for z, region in enumerate(sorted({c.region for c in pools if c.region})):
        left = [c for c in pools if c.region != region]
        shares = _share_variables(program, left, timed, f"z{z}_")
        for k in timed:
            own = [shares[k, c.name] for c in left if (k, c.name) in shares]
            program += pulp.lpSum(own) == problem.survive
        for c in left:
            _carry(c, program, model.machines[c.name], model.used.get(c.name, 0), shares)


def _balanced(problem: Problem, used: Sequence[Pool], counts: Mapping[str, int], found: Shares) -> Shares:
    """With the machines fixed: the routing with the lowest peak utilisation, ties by the order of pools.

    The first solve leaves shares free to wander between solvers; this one pins them. Shares that cost money
    stay as they were found. One pool has it all.
    """
    if len(used) == 1:
        return {(k, used[0].name): 1.0 for k in range(len(problem.online))}
    program = pulp.LpProblem("routing", pulp.LpMinimize)
    peak = program.add_variable("peak", 0)
    shares = serve_all(problem, used, program)
    order = {c.name: i + 1 for i, c in enumerate(used)}
    program += peak + pulp.lpSum(1e-4 * order[name] * y for (_, name), y in shares.items())
    for c in used:
        _carry(c, program, counts[c.name] * (1 + _SLACK), 1, shares)
        own = [(k, shares[k, c.name]) for k in range(len(c.loads)) if (k, c.name) in shares]
        if not c.share_usd:
            program += pulp.lpSum(c.loads[k] * y for k, y in own) <= counts[c.name] * peak
        for k, y in own:
            if c.share_usd:
                program += y == found[k, c.name]
    if solve(program) is None:
        return _rounded(problem, used, found)
    return _rounded(problem, used, {key: y.value() for key, y in shares.items()})


def _rounded(problem: Problem, used: Sequence[Pool], raw: Shares) -> Shares:
    """Shares of six digits without the solver's noise; what rounding leaves goes to the largest."""
    shares: Shares = {}
    for k in range(len(problem.online)):
        row = {c.name: raw[k, c.name] for c in used if raw.get((k, c.name), 0.0) > _LEAST_SHARE}
        total = sum(row.values())
        digits = {name: round(share / total, _DIGITS) for name, share in row.items()}
        largest = max(digits, key=lambda name: (digits[name], name))
        digits[largest] = round(digits[largest] + 1.0 - sum(digits.values()), _DIGITS)
        shares.update({(k, name): share for name, share in digits.items() if share > 0})
    return shares
