"""Capacity of zones -> fixed targets per zone, for groups that do not run SkyServe's policy.

min sum_z p_z x_z + o_z b_z (spot and on-demand machines of zone z), capacity vectors c_w of probability q_w:
  sum_z min(x_z, c_wz) + b_z >= N - s_w,   CVaR_95(s) <= most,   sum of x_z + b_z outside any domain >= floor.
CVaR as Rockafellar and Uryasev (2000) write it: eta + sum_w q_w u_w / 0.05, u_w >= s_w - eta. Shortfall whose
mean is within the limit, all of it in the worst 5 %, has a CVaR of limit / 0.05: that is `most`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pulp

from moeplan.planner.placing.decide import Market, Wanted

_TAIL = 0.05
_MOST_SCENARIOS = 100
_SPARE = 3  # a zone never gets more than this beyond what is needed
_MOST_NODES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Spot and on-demand machines per zone of the list, their bill, and the mean share missing in the worst
    5 % of scenarios."""

    spot: tuple[int, ...]
    on_demand: tuple[int, ...]
    usd_per_hour: float
    shortfall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variables:
    spot: list[pulp.LpVariable]
    on_demand: list[pulp.LpVariable]
    tail: pulp.LpAffineExpression


def static_targets(market: Market, wanted: Wanted, zones: Sequence[int]) -> Targets | None:
    """The cheapest fixed targets that keep the shortfall; None where the solver finds none in its limit."""
    most = wanted.replicas + _SPARE
    vectors, chances = _scenarios(np.minimum(market.capacity[:, list(zones)], most))
    problem, variables = _problem(market, wanted, zones, vectors, chances)
    problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, options=[f"maxNodes {_MOST_NODES}"]))
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return None
    spot = tuple(round(x.value()) for x in variables.spot)
    held = tuple(round(b.value()) for b in variables.on_demand)
    usd = market.usd_per_hour[list(zones)] @ spot + market.on_demand_usd_per_hour[list(zones)] @ held
    missing = max(0.0, float(pulp.value(variables.tail))) / wanted.replicas
    return Targets(spot=spot, on_demand=held, usd_per_hour=float(usd), shortfall=missing)


def _scenarios(capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent capacity vectors and their shares; what is rarer counts as its worst: nothing."""
    vectors, counts = np.unique(capacity, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    kept, rest = order[:_MOST_SCENARIOS], order[_MOST_SCENARIOS:]
    rows = [vectors[kept]]
    shares = [counts[kept] / counts.sum()]
    if len(rest):
        rows.append(vectors[rest].min(axis=0, keepdims=True))
        shares.append(np.array([counts[rest].sum() / counts.sum()]))
    return np.concatenate(rows), np.concatenate(shares)


def _problem(
    market: Market, wanted: Wanted, zones: Sequence[int], vectors: np.ndarray, chances: np.ndarray
) -> tuple[pulp.LpProblem, _Variables]:
    n, most = wanted.replicas, wanted.replicas + _SPARE
    problem = pulp.LpProblem("targets", pulp.LpMinimize)
    spot = [problem.add_variable(f"x{i}", 0, most, pulp.LpInteger) for i in range(len(zones))]
    base = [problem.add_variable(f"b{i}", 0, n, pulp.LpInteger) for i in range(len(zones))]
    eta = problem.add_variable("eta", 0)
    over = [problem.add_variable(f"u{w}", 0) for w in range(len(vectors))]
    tail = eta + pulp.lpSum(float(q) / _TAIL * u for q, u in zip(chances, over, strict=True))
    # The tie-break prefers zones that stand earlier.
    problem += pulp.lpSum(
        (float(market.usd_per_hour[z]) + 1e-6 * (i + 1)) * spot[i]
        + (float(market.on_demand_usd_per_hour[z]) + 1e-6 * (i + 1)) * base[i]
        for i, z in enumerate(zones)
    )
    problem += tail <= min(1.0, wanted.shortfall / _TAIL) * n
    problem += pulp.lpSum(spot) + pulp.lpSum(base) <= wanted.most
    for w, vector in enumerate(vectors):
        held = [problem.add_variable(f"y{w}_{i}", 0, int(most_here)) for i, most_here in enumerate(vector)]
        for i, y in enumerate(held):
            problem += y <= spot[i]
        problem += pulp.lpSum(held) + pulp.lpSum(base) + eta + over[w] >= n
    for domain in sorted({int(market.domains[z]) for z in zones}) if wanted.floor else ():
        outside = [i for i, z in enumerate(zones) if int(market.domains[z]) != domain]
        problem += pulp.lpSum(spot[i] + base[i] for i in outside) >= wanted.floor
    return problem, _Variables(spot=spot, on_demand=base, tail=tail)
