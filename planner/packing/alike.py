"""Problem, pools -> machines by pool, where all pools carry every demand alike: by counting, with no solver.

So are one pool, and the ways to buy one kind of machine. Only the sum of loads matters then: a fleet carries
it or does not, however it is shared out. Of the first pool every number is tried; of the second the fewest
that carry the rest, as more only cost more money and more of every resource.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from moeplan.planner.packing.problem import Pool, Problem

_ROUNDING = 1e-9


def carry_alike(problem: Problem, pools: Sequence[Pool]) -> bool:
    """Whether `cheapest_counts` answers the problem over `pools`: one or two of equal loads, no more rules
    than limits and a floor."""
    if problem.survive or problem.before is not None or not 1 <= len(pools) <= 2:
        return False
    if len(pools) == 1:
        return all(map(math.isfinite, pools[0].loads))
    first, second = pools
    floored = problem.floor > 0 and not all(problem.online)
    paid_by_share = bool(first.share_usd or second.share_usd)
    return first.loads == second.loads and not (floored or paid_by_share or problem.single)


def cheapest_counts(
    problem: Problem, pools: Sequence[Pool], ties: Sequence[float]
) -> tuple[float, list[int]] | None:
    """The least money, and for it machines of each of `pools`, spares not counted; None where nothing carries
    all.

    `ties` are added to the price of a machine of each pool.
    """

    def usd(counts: Sequence[int]) -> float:
        return sum(
            pool.usd * (count + pool.spare) + tie * count + sum(pool.share_usd)
            for pool, tie, count in zip(pools, ties, counts, strict=True)
            if count
        )

    allowed = [counts for counts in _carrying(pools) if _keeps_rules(problem, pools, counts)]
    return min(((usd(counts), counts) for counts in allowed), default=None)


def _carrying(pools: Sequence[Pool]) -> Iterator[list[int]]:
    """Counts that carry the load, none of the last pool to spare."""
    load = sum(pools[0].loads)
    if len(pools) == 1:
        yield [pools[0].enough(load)]
        return
    first, second = pools
    for count in range(first.enough(load) + 1):
        left = load - first.capacity(count)
        yield [count, second.enough(left) if left > _ROUNDING else 0]


def _keeps_rules(problem: Problem, pools: Sequence[Pool], counts: Sequence[int]) -> bool:
    """Resources, the most machines of a pool, and the floor."""
    taken = dict.fromkeys(problem.limits, 0.0)
    for pool, count in zip(pools, counts, strict=True):
        if (pool.most is not None and count > pool.most) or (pool.name in problem.single and count > 1):
            return False
        for name in taken:
            taken[name] += pool.amounts.get(name, 0.0) * (count + pool.spare * (count > 0))
    if any(taken[name] > most + _ROUNDING for name, most in problem.limits.items()):
        return False
    return not (problem.floor and any(problem.online)) or _keeps_floor(problem, pools, counts)


def _keeps_floor(problem: Problem, pools: Sequence[Pool], counts: Sequence[int]) -> bool:
    """Whether steady pools can carry the share `floor` of the load."""
    steady = [
        pool.capacity(count) for pool, count in zip(pools, counts, strict=True) if pool.steady and count
    ]
    if len(pools) == 1:
        return bool(steady)
    return sum(steady) >= problem.floor * sum(pools[0].loads) - _ROUNDING
