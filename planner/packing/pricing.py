"""A lower bound on any fleet's cost, and pools that no cheapest fleet has: Lagrangian relaxation.

Let nothing but prices π_k make demand k be served. Then pools no longer depend on each other, and each one's
best number of machines x is a knapsack:

    L(π) = Σ_k π_k + Σ_c min(0, g_c),   g_c = min_{x ≥ 1} [usd_c (x + spare_c) - knapsack_c(x, π)]

knapsack_c(x, π) is the most that x machines earn when pool c may serve up to the whole of each demand. Every
L(π) is a lower bound on the cost of every fleet (Geoffrion 1974), for constraints that are left out only
make fleets dearer. A fleet that uses pool c costs at least L(π) + max(0, g_c): if that is above the cost of a
fleet at hand, no cheapest fleet uses c.

L is concave; subgradient steps raise it (Held, Wolfe and Crowder 1974).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.packing.problem import Pool

Array = NDArray[np.float64]
_PATIENCE = 8  # steps without a better bound before the step is halved


@dataclass(frozen=True, slots=True)
class Prices:
    """The best bound found, its prices by demand, and what using each pool adds to the bound, in USD."""

    bound: float
    prices: Array
    extra: Array


def price(pools: Sequence[Pool], upper: float, steps: int, start: Array | None = None) -> Prices:
    """Return a lower bound on the cost of any fleet of `pools`.

    `upper` is about what a fleet costs, and sets the length of the steps; the bound is valid for any.
    """
    table = _Table.of(pools)
    prices = table.cheapest() if start is None else start
    best = _relax(table, prices)[0]
    length, waited = 1.0, 0
    for _ in range(steps):
        found, missing = _relax(table, prices)
        if found.bound > best.bound * (1 + 1e-9):
            best, waited = found, 0
        else:
            waited += 1
        if waited == _PATIENCE:
            length, waited, prices = length / 2, 0, best.prices.copy()
            found, missing = _relax(table, prices)
        scaled = missing * prices
        norm = float(scaled @ scaled)
        if norm <= 0.0:
            break
        step = length * max(upper - found.bound, 1e-3 * upper) / norm
        prices = np.maximum(0.0, prices + step * scaled * prices)
    return best


@dataclass(frozen=True, slots=True)
class _Table:
    """The pools as arrays, one row each; `able` says what a pool may serve."""

    able: NDArray[np.bool_]
    loads: Array
    share_usd: Array
    usd: Array
    target: Array
    spare: Array

    @staticmethod
    def of(pools: Sequence[Pool]) -> _Table:
        loads = np.array([p.loads for p in pools])
        return _Table(
            able=np.isfinite(loads),
            loads=np.where(np.isfinite(loads), np.maximum(loads, 1e-12), 1.0),
            share_usd=np.array([p.share_usd or (0.0,) * len(p.loads) for p in pools]),
            usd=np.array([p.usd for p in pools]),
            target=np.array([p.target for p in pools]),
            spare=np.array([float(p.spare) for p in pools]),
        )

    def cheapest(self) -> Array:
        """What each demand costs where it is cheapest, machines bought by the piece: the LP's own prices."""
        costs = (self.usd / self.target)[:, None] * self.loads + self.share_usd
        least: Array = np.where(self.able, costs, np.inf).min(axis=0)
        return least


def _relax(table: _Table, prices: Array) -> tuple[Prices, Array]:
    """The bound at `prices`, and the share of each demand that the pools leave (negative: too much)."""
    worth = np.where(table.able, np.maximum(0.0, prices - table.share_usd), 0.0)
    order = np.argsort(-worth / table.loads, axis=1, kind="stable")
    worth, loads = np.take_along_axis(worth, order, 1), np.take_along_axis(table.loads, order, 1)
    loads = np.where(worth > 0, loads, 0.0)
    before = np.cumsum(loads, axis=1) - loads
    pays = worth * table.target[:, None] > table.usd[:, None] * loads
    # Earnings are concave in x: the best whole number is next to the best real one.
    ideal = np.where(pays, loads, 0.0).sum(axis=1) / table.target
    gains, shares = np.full(len(ideal), np.inf), np.zeros_like(loads)
    for machines in (np.maximum(1.0, np.floor(ideal)), np.maximum(1.0, np.ceil(ideal))):
        room = (machines * table.target)[:, None] - before
        part = np.clip(np.divide(room, loads, out=np.zeros_like(loads), where=loads > 0), 0.0, 1.0)
        gain = table.usd * (machines + table.spare) - (worth * part).sum(axis=1)
        better = gain < gains
        gains = np.where(better, gain, gains)
        shares = np.where(better[:, None], part, shares)
    served = np.zeros_like(shares)
    np.put_along_axis(served, order, shares, 1)
    taken = gains < 0
    bound = float(prices.sum() + gains[taken].sum())
    return Prices(bound, prices, np.maximum(0.0, gains)), 1.0 - served[taken].sum(axis=0)
