"""Pools that a cheapest fleet can do without, found before the solver has to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.packing.problem import Pool, Problem

_MOST_TIMES = 64.0  # one machine is not replaced by more


def undominated(pools: Sequence[Pool], problem: Problem) -> list[Pool]:
    """Return `pools` without those that another one replaces at no loss; of equals the first stays.

    b replaces a if k ≥ 1 machines of b do all that one of a does, for no more money and no more of any
    limited resource: k·usd_b ≤ usd_a, load_b ≤ k·load_a for every demand, share_usd_b ≤ share_usd_a,
    k·amount_b ≤ amount_a, b's target and ceiling at least a's, k·reserve_a ≥ reserve_b, spare_b ≤ spare_a,
    and b is as steady, in the same region, and unbounded.

    Safe. Take any fleet with n machines of a. Buy k·n more of b instead and route a's shares to b.
    Load: what a carried, L ≤ n·target_a, is at most k·L ≤ k·n·target_b on b's machines; likewise L ≤
    n·ceiling_a - reserve_a becomes k·L ≤ k·n·ceiling_b - k·reserve_a, and k·reserve_a ≥ reserve_b pays b's
    reserve if b was not used before. Spares: b's cost at most a's, by k·spare_b ≤ spare_a·k and the same
    prices, or b had them. So the new fleet keeps every constraint and costs no more. What is removed is
    replaced by something kept: the relation is transitive, and equals are ordered by position.

    A previous fleet prices moves by pool, and a single machine cannot become k: then nothing is removed,
    or k is 1.
    """
    if problem.before is not None or len(pools) < 2:
        return list(pools)
    table = _Table(pools, problem)
    replaced = np.array([table.replaced(a) for a in range(len(pools))])
    earlier = np.tri(len(pools), k=-1, dtype=bool)
    gone = (replaced & (~replaced.T | earlier)).any(axis=1)
    return [pool for pool, out in zip(pools, gone, strict=True) if not out]


class _Table:
    """The pools as arrays, one row each."""

    def __init__(self, pools: Sequence[Pool], problem: Problem) -> None:
        resources = sorted(problem.limits)
        self.usd = np.array([p.usd for p in pools])
        self.loads = np.array([p.loads for p in pools])
        self.share_usd = np.array([p.share_usd or (0.0,) * len(p.loads) for p in pools])
        self.amounts = np.array([[p.amounts.get(r, 0.0) for r in resources] for p in pools])
        self.target = np.array([p.target for p in pools])
        self.ceiling = np.array([p.ceiling for p in pools])
        self.reserve = np.array([p.reserve for p in pools])
        self.spare = np.array([p.spare for p in pools])
        self.bounded = np.array([p.most is not None for p in pools])
        self.steady = np.array([p.steady or problem.floor == 0 for p in pools])
        self.single = np.array([p.name in problem.single for p in pools])
        regions = [p.region if problem.survive else "" for p in pools]
        self.region = np.unique(regions, return_inverse=True)[1]

    def replaced(self, a: int) -> NDArray[np.bool_]:
        """Which pools replace pool `a`; it does not replace itself."""
        k = self._times(a)
        able = (
            (k >= 1)
            & ~self.bounded
            & (self.steady >= self.steady[a])
            & (self.region == self.region[a])
            & (self.single == self.single[a])
            & (self.spare <= self.spare[a])
            & (self.target >= self.target[a])
            & (self.ceiling >= self.ceiling[a])
            & (self.reserve <= k * self.reserve[a])
        )
        able[a] = False
        rows = np.flatnonzero(able)
        cheaper = (self.share_usd[rows] <= self.share_usd[a]).all(axis=1)
        able[rows] = cheaper & (self.loads[rows] <= k[rows, None] * self.loads[a]).all(axis=1)
        return np.asarray(able)

    def _times(self, a: int) -> NDArray[np.float64]:
        """The most machines of each pool for the money and the resources of one of `a`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            money = np.where(self.usd > 0, self.usd[a] / self.usd, math.inf)
            ratios = np.where(self.amounts > 0, self.amounts[a] / self.amounts, math.inf)
        k = np.minimum(np.floor(np.minimum(money, ratios.min(axis=1, initial=math.inf))), _MOST_TIMES)
        return np.asarray(np.where(self.single, np.minimum(k, 1.0), k))
