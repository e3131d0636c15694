"""The packing program: Mélange's example and its own program, brute force, limits, an honest gap."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from fleet_instances import brute_force, melange, random_problem, slice_ilp

from moeplan.planner.packing import milp, solver
from moeplan.planner.packing.dominance import undominated
from moeplan.planner.packing.milp import Solution, solve_fleet
from moeplan.planner.packing.pricing import price
from moeplan.planner.packing.problem import Pool, Problem
from moeplan.planner.packing.solver import Effort


def solved(problem: Problem, effort: Effort | None = None) -> Solution:
    """The solution, re-scored: everything served, no pool above its capacity, no limit broken."""
    solution = solve_fleet(problem, effort)
    assert solution is not None
    pools = {pool.name: pool for pool in problem.pools}
    for k in range(len(problem.online)):
        assert sum(s for (demand, _), s in solution.shares.items() if demand == k) == pytest.approx(1.0)
    for name, count in solution.machines.items():
        load = sum(pools[name].loads[k] * s for (k, own), s in solution.shares.items() if own == name)
        assert load <= pools[name].capacity(count) * (1 + 1e-3)
    assert all(name in solution.machines for _, name in solution.shares)
    for resource, most in problem.limits.items():
        bought = ((pools[n], c + pools[n].spare) for n, c in solution.machines.items())
        assert sum(pool.amounts.get(resource, 0.0) * c for pool, c in bought) <= most + 1e-6
    return solution


@pytest.mark.parametrize(
    ("target", "fleet", "usd"),
    [
        (1.0, {"A10G": 1, "A100": 1}, 4.68),
        (0.999, {"A10G": 2, "A100": 1}, 5.69),
        (0.9, {"A10G": 2, "A100": 1}, 5.69),
        (0.85, {"A10G": 3, "A100": 1}, 6.70),
        (0.8, {"A100": 2}, 7.34),
        (0.7, {"A100": 2}, 7.34),
    ],
)
def test_melange_example(target: float, fleet: dict[str, int], usd: float) -> None:
    """The fractional optimum at several target utilisations."""
    solution = solved(melange(target))
    assert solution.machines == fleet
    assert solution.usd == pytest.approx(usd)
    assert (solution.status, solution.gap) == ("optimal", 0.0)


@pytest.mark.parametrize(
    ("name", "target", "usd"),
    [("A10G", 1.0, 12.12), ("A10G", 0.8, 15.15), ("A100", 1.0, 7.34), ("A100", 0.8, 7.34)],
)
def test_melange_single_types(name: str, target: float, usd: float) -> None:
    assert solved(melange(target, name)).usd == pytest.approx(usd)


@pytest.mark.parametrize(
    ("slices", "usd"), [(1, 6.70), (2, 5.69), (4, 5.69), (8, 5.69), (3, 4.68), (6, 4.68), (9, 4.68)]
)
def test_the_oracle_reproduces_the_sliced_costs(slices: int, usd: float) -> None:
    """Mélange's own program, the sums that its released example leads to, by slice factor."""
    assert slice_ilp(melange(1.0), slices)[0] == pytest.approx(usd)


@pytest.mark.parametrize(
    "batch", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 8))]
)
def test_never_dearer_than_slices(batch: int) -> None:
    """90 or 240 random problems: never dearer than Mélange's program with 1 or 2 slices per bucket."""
    for seed in range(30 * batch, 30 * (batch + 1)):
        draw = random.Random(seed)
        problem = random_problem(seed, draw.randint(2, 4), draw.randint(2, 5), draw.choice([1.0, 4.0, 16.0]))
        assert solved(problem).usd <= slice_ilp(problem, 1 + seed % 2)[0] * (1 + 1e-6) + 1e-4


def two_pools(seed: int) -> Problem:
    draw = random.Random(seed)
    pools = tuple(
        Pool(
            name=name,
            usd=draw.uniform(0.5, 3.0),
            loads=tuple(draw.uniform(0.05, 2.0) for _ in range(4)),
            target=draw.choice([0.7, 0.85]),
            reserve=draw.choice([0.0, 0.1, 0.4, 1.1]),
            spare=draw.choice([0, 0, 1]),
        )
        for name in ("a", "b")
    )
    return Problem(pools=pools, online=(True,) * 4)


@pytest.mark.parametrize("batch", range(4))
def test_equals_brute_force(batch: int) -> None:
    """100 random problems of two pools with reserves and spares, all counts tried."""
    for seed in range(25 * batch, 25 * (batch + 1)):
        problem = two_pools(seed)
        assert solved(problem).usd == pytest.approx(brute_force(problem, 16), abs=1e-3)


def test_a_reserve_forbids_pools_of_one() -> None:
    """0.867 x - 1.07 is negative for one machine: two or none."""
    pool = Pool(name="a", usd=1.0, loads=(0.05,), target=0.7, ceiling=0.867, reserve=1.07)
    assert solved(Problem(pools=(pool,), online=(True,))).machines == {"a": 2}


# Properties


@pytest.mark.parametrize("seed", range(5))
def test_order_of_pools_does_not_matter(seed: int) -> None:
    problem = random_problem(seed, 12, 8, 8.0)
    shuffled = list(problem.pools)
    random.Random(seed).shuffle(shuffled)
    assert solved(problem) == solved(replace(problem, pools=tuple(shuffled)))


def test_an_unproven_search_of_the_rest_proves_nothing() -> None:
    """A fleet that is the cheapest of some pools only is an incumbent until all that is left was searched."""
    known = Solution(machines={"a": 1}, shares={}, usd=10.0, objective=10.0, gap=0.0, status="optimal")
    worse = replace(known, usd=11.0, objective=11.0, gap=0.2, status="incumbent")
    assert milp._better(known, None, 9.0) == replace(known, status="incumbent", gap=pytest.approx(0.1))
    assert milp._better(known, worse, 8.0) == replace(known, status="incumbent", gap=pytest.approx(0.12))
    assert milp._better(known, replace(worse, status="optimal"), 8.0).status == "optimal"


@pytest.mark.parametrize("seed", range(5))
def test_cost_grows_with_load_and_shrinks_with_limits(seed: int) -> None:
    problem = random_problem(seed, 6, 6, 8.0)
    pools = tuple(
        replace(p, amounts={"gpu": 1.0}, loads=tuple(1.3 * load for load in p.loads)) for p in problem.pools
    )
    heavier = replace(problem, pools=pools)
    free = solved(heavier)
    assert free.usd >= solved(problem).usd - 1e-4
    machines = sum(free.machines.values())
    tight = solve_fleet(replace(heavier, limits={"gpu": machines - 1.0}))
    assert tight is None or tight.usd >= free.usd - 1e-4
    assert solved(replace(heavier, limits={"gpu": machines + 5.0})).usd == pytest.approx(free.usd, abs=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_dominated_pools_are_not_missed(seed: int) -> None:
    """With and without dropping them, machines that two small ones replace among them: one cost."""
    problem = random_problem(seed, 5, 4, 6.0)
    draw = random.Random(seed)
    worse = [
        replace(
            p, name=f"{p.name}-x", usd=p.usd * draw.uniform(1, 1.3), loads=tuple(1.01 * v for v in p.loads)
        )
        for p in problem.pools
    ]
    doubled = [
        replace(p, name=f"{p.name}-2", usd=2 * p.usd, loads=tuple(v / 2 for v in p.loads))
        for p in problem.pools
    ]
    both = replace(problem, pools=(*problem.pools, *worse, *doubled))
    assert {p.name for p in undominated(both.pools, both)} <= {p.name for p in problem.pools}
    plain = solve_fleet(both, prune=False)
    assert plain is not None
    assert solved(both).usd == pytest.approx(plain.usd, abs=1e-3)


def test_what_dominates_must_itself_be_free() -> None:
    """An owned machine, another region, a pool that pays for spares: none of them replaces."""
    good = Pool(name="good", usd=1.0, loads=(1.0,), amounts={"gpu": 1.0}, region="r1")
    worse = replace(good, name="worse", usd=2.0, loads=(2.0,))
    free = Problem(pools=(good, worse), online=(True,))
    assert undominated(free.pools, free) == [good]
    cases = (
        (replace(good, most=1), free),
        (replace(good, spare=1), free),
        (replace(good, region="r2"), replace(free, survive=0.5)),
        (replace(good, steady=False), replace(free, floor=0.5)),
        (replace(good, amounts={"gpu": 2.0}), replace(free, limits={"gpu": 4.0})),
    )
    for pool, problem in cases:
        assert undominated((pool, worse), replace(problem, pools=(pool, worse))) == [pool, worse]


@pytest.mark.parametrize("seed", range(10))
def test_the_relaxation_is_a_bound_and_pools_left_out_are_dear(seed: int) -> None:
    """After any number of steps the bound is below the optimum, also with what the optimum's pools add."""
    problem = random_problem(seed, 7, 6, 3.0)
    optimum = solve_fleet(problem, prune=False)
    assert optimum is not None
    for steps in (0, 10, 200):
        priced = price(problem.pools, optimum.usd, steps)
        assert priced.bound <= optimum.usd + 1e-4
        for pool, extra in zip(problem.pools, priced.extra, strict=True):
            if pool.name in optimum.machines:
                assert priced.bound + extra <= optimum.usd + 1e-4


def test_large_problems_are_priced_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of large problems, taken by small ones, ends at the same cost."""
    problems = [random_problem(seed, 30, 8, 6.0) for seed in range(4)]
    direct = [solved(problem).usd for problem in problems]
    monkeypatch.setattr(milp, "_DIRECT", 0)
    monkeypatch.setattr(milp, "_PROMISING", 8)
    for problem, usd in zip(problems, direct, strict=True):
        assert solved(problem).usd == pytest.approx(usd, abs=1e-3)


def test_a_stopped_search_tells_its_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node is not enough to prove: an incumbent, and the true optimum lies within the gap."""
    problem = random_problem(3, 24, 20, 5.0)
    best = solved(problem)
    monkeypatch.setattr(solver, "_has_highs", lambda: False)
    stopped = solved(problem, Effort(nodes=1))
    assert best.status == "optimal"
    assert stopped.status == "incumbent"
    assert stopped.usd * (1 - stopped.gap) <= best.usd + 1e-4
    assert stopped.gap > 0


def test_highs_goes_on_where_cbc_stopped() -> None:
    pytest.importorskip("highspy")
    problem = random_problem(3, 24, 20, 5.0)
    found = milp.build(problem, problem.pools)
    result = solver._highs(found.program, Effort(), solver._cbc(found.program, Effort(nodes=1)))
    assert result is not None
    assert result.status == "optimal"
    assert result.objective == pytest.approx(solved(problem).usd, abs=1e-2)


# Rules of buying


def spot_and_steady(**rules: float) -> Problem:
    pools = (
        Pool(name="spot", usd=0.3, loads=(2.0, 1.0), spare=1, steady=False),
        Pool(name="steady", usd=1.0, loads=(2.0, 1.0)),
    )
    return Problem(pools=pools, online=(True, True), **rules)


def test_the_floor_holds_for_every_demand() -> None:
    solution = solved(spot_and_steady(floor=0.4))
    assert all(solution.shares.get((k, "steady"), 0.0) >= 0.4 - 1e-3 for k in (0, 1))
    assert solved(spot_and_steady()).machines == {"spot": 3}
    # Loads 1.2 on two steady machines (or 1.8 on the spot ones): 2·1.0 + (1 + 1)·0.3.
    assert solution.usd == pytest.approx(2.6)


def test_any_region_may_be_lost() -> None:
    """Half of a load of 3 must fit without either region: 2 machines in each, not 3 in the cheaper."""
    pools = tuple(
        Pool(name=region, usd=usd, loads=(3.0,), region=region) for region, usd in (("r1", 1.0), ("r2", 1.1))
    )
    problem = Problem(pools=pools, online=(True,))
    assert solved(problem).machines == {"r1": 3}
    assert solved(replace(problem, survive=0.5)).machines == {"r1": 2, "r2": 2}
    assert solved(replace(problem, survive=1.0)).machines == {"r1": 3, "r2": 3}
    assert solve_fleet(replace(problem, pools=pools[:1], survive=0.1)) is None


def test_moves_must_pay() -> None:
    """A fleet that is 4 % dearer stays, one that is 12 % dearer goes."""
    for usd, stays in ((1.04, True), (1.12, False)):
        pools = (Pool(name="new", usd=1.0, loads=(2.0,)), Pool(name="old", usd=usd, loads=(2.0,)))
        problem = Problem(pools=pools, online=(True,), before={"old": 2})
        assert solved(problem).machines == ({"old": 2} if stays else {"new": 2})


def test_batch_work_fills_what_is_idle() -> None:
    """Online load 1.2 on two machines leaves 0.5 of them at 0.85: batch work of 0.4 fits for nothing."""
    online = Pool(name="online", usd=2.0, loads=(1.2, 0.4), target=0.85)
    batch = Pool(name="batch", usd=0.01, loads=(float("inf"), 0.5), share_usd=(0.0, 0.8))
    problem = Problem(pools=(batch, online), online=(True, False))
    assert solved(problem).usd == pytest.approx(4.0)
    busy = replace(online, loads=(1.2, 1.0))  # now half of it fits
    mixed = solved(replace(problem, pools=(batch, busy)))
    assert mixed.shares[1, "online"] == pytest.approx(0.5, abs=1e-3)
    assert mixed.usd == pytest.approx(4.0 + 0.01 + 0.5 * 0.8, abs=1e-3)
