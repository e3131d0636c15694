"""Fleet problems, and fleets found by means that share nothing with the planner's solver."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pulp

from moeplan.planner.packing.problem import Pool, Problem

# Mélange's released example: 30 requests/s, four buckets, USD/h and requests/s of each type.
MELANGE_RATES = (6.0, 3.0, 15.0, 6.0)
MELANGE = {"A10G": (1.01, (2.0, 1.0, 5.0, 2.0)), "A100": (3.67, (20.0, 20.0, 40.0, 20.0))}


def melange(target: float, *names: str) -> Problem:
    """The released example at a target utilisation, with only the types `names` if any."""
    pools = tuple(
        Pool(
            name=name,
            usd=usd,
            loads=tuple(r / t for r, t in zip(MELANGE_RATES, throughputs, strict=True)),
            target=target,
            ceiling=target,
        )
        for name, (usd, throughputs) in MELANGE.items()
        if not names or name in names
    )
    return Problem(pools=pools, online=(True,) * len(MELANGE_RATES))


def random_problem(seed: int, types: int, buckets: int, rate: float) -> Problem:
    """Types of random speed, price and taste, some of which cannot serve the costliest sizes."""
    draw = random.Random(seed)
    weights = [draw.lognormvariate(0, 1) for _ in range(buckets)]
    work = [draw.lognormvariate(0, 1.2) for _ in range(buckets)]
    pools = []
    for n in range(types):
        speed, taste, small = draw.lognormvariate(0, 1), draw.gauss(0, 0.35), n > 0 and draw.random() < 0.3
        loads = tuple(
            math.inf if small and w > 3 else rate * s / sum(weights) * w / speed * w**taste
            for s, w in zip(weights, work, strict=True)
        )
        price = 0.7 * speed ** draw.uniform(0.8, 1.1) * draw.uniform(0.8, 1.25)
        pools.append(Pool(name=f"type{n:03d}", usd=price, loads=loads, target=0.85, ceiling=0.85))
    return Problem(pools=tuple(pools), online=(True,) * buckets)


def in_regions(problem: Problem, regions: int, seed: int) -> Problem:
    """Every pool in several regions, up to 15 % dearer than in the cheapest."""
    draw = random.Random(seed)
    pools = tuple(
        replace(pool, name=f"{pool.name}-r{r}", usd=pool.usd * (1 + 0.15 * r * draw.random() / regions))
        for pool in problem.pools
        for r in range(regions)
    )
    return replace(problem, pools=pools)


def slice_ilp(problem: Problem, slices: int, seconds: float | None = None) -> tuple[float, bool]:
    """Cost by Mélange's own program, and whether it is proven: each bucket in equal slices, each slice on one
    type, one binary each. Infinite where `seconds` found nothing."""
    program = pulp.LpProblem("melange", pulp.LpMinimize)
    demands = range(len(problem.online))
    counts = [program.add_variable(f"n{g}", 0, None, pulp.LpInteger) for g in range(len(problem.pools))]
    chosen = {
        (k, s, g): program.add_variable(f"a{k}_{s}_{g}", 0, 1, pulp.LpInteger)
        for k in demands
        for s in range(slices)
        for g, pool in enumerate(problem.pools)
        if math.isfinite(pool.loads[k])
    }
    program += pulp.lpSum(pool.usd * n for pool, n in zip(problem.pools, counts, strict=True))
    for k, s in itertools.product(demands, range(slices)):
        program += pulp.lpSum(x for (bucket, part, _), x in chosen.items() if (bucket, part) == (k, s)) == 1
    for g, pool in enumerate(problem.pools):
        load = pulp.lpSum(pool.loads[k] / slices * x for (k, _, own), x in chosen.items() if own == g)
        program += load <= pool.target * counts[g]
    program.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, timeLimit=seconds))
    if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        return math.inf, False
    usd = sum(pool.usd * round(n.value()) for pool, n in zip(problem.pools, counts, strict=True))
    return float(usd), program.sol_status == pulp.LpSolutionOptimal


def brute_force(problem: Problem, most: int) -> float:
    """Cheapest counts of up to `most` machines per pool that can carry everything, tried one by one.

    Two pools share the demands as a fractional knapsack: the first takes what is relatively cheapest there.
    """
    first, second = problem.pools
    best = math.inf
    for a, b in itertools.product(range(most), repeat=2):
        spares = first.spare * (a > 0) * first.usd + second.spare * (b > 0) * second.usd
        cost = a * first.usd + b * second.usd + spares
        if cost < best and _holds(first, second, first.capacity(a), second.capacity(b)):
            best = cost
    return best


def _holds(first: Pool, second: Pool, room_first: float, room_second: float) -> bool:
    rest = 0.0
    for k in sorted(range(len(first.loads)), key=lambda k: first.loads[k] / second.loads[k]):
        part = min(1.0, room_first / first.loads[k])
        room_first -= part * first.loads[k]
        rest += (1.0 - part) * second.loads[k]
    return rest <= room_second + 1e-9
