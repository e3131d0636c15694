"""Counting instead of solving: what the solver finds too, for pools that carry every demand alike."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplan.planner.packing import milp
from moeplan.planner.packing.alike import carry_alike
from moeplan.planner.packing.milp import Solution, solve_fleet
from moeplan.planner.packing.problem import Pool, Problem

LOADS = st.lists(st.floats(0.02, 3.0), min_size=1, max_size=3)


def pools(loads: list[float], bounded: bool) -> st.SearchStrategy[Pool]:
    return st.builds(
        Pool,
        name=st.just("a"),
        usd=st.floats(0.1, 5.0),
        loads=st.just(tuple(loads)),
        target=st.sampled_from([0.7, 0.85, 1.0]),
        ceiling=st.sampled_from([0.867, 1.0]),
        reserve=st.sampled_from([0.0, 0.3, 1.07]),
        spare=st.integers(0, 1),
        most=st.sampled_from([None, 1, 3]) if bounded else st.none(),
        amounts=st.fixed_dictionaries({"gpu X": st.sampled_from([1.0, 4.0])}),
        steady=st.booleans(),
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    loads, count = draw(LOADS), draw(st.integers(1, 2))
    own = [replace(draw(pools(loads, count == 1)), name=name) for name in "ab"[:count]]
    limit = draw(st.none() | st.integers(1, 12))
    return Problem(
        pools=tuple(own),
        online=(True,) * len(loads),
        limits={} if limit is None else {"gpu X": float(limit)},
        floor=draw(st.sampled_from([0.0, 0.3, 1.0])),
        single=draw(st.sampled_from([frozenset(), frozenset({"a"})])) if count == 1 else frozenset(),
    )


def by_solver(problem: Problem) -> Solution | None:
    return milp._solve(problem, problem.pools, None)


def on_an_edge(problem: Problem) -> bool:
    """A load that fills machines exactly: the solver's tolerance decides, and rounding."""
    load = sum(problem.pools[0].loads)
    filled = [
        (load * share + pool.reserve) / pool.ceiling
        for pool in problem.pools
        for share in (1.0, problem.floor)
    ]
    filled += [load * share / pool.target for pool in problem.pools for share in (1.0, problem.floor)]
    return any(abs(x - round(x)) < 1e-4 for x in filled)


@settings(max_examples=60)
@given(problems())
def test_counts_as_the_solver_does(problem: Problem) -> None:
    """The same cost, or both none."""
    assume(not on_an_edge(problem))
    assert carry_alike(problem, problem.pools)
    counted, solved = milp._counted(problem, problem.pools), by_solver(problem)
    assert (counted is None) == (solved is None)
    if counted and solved:
        assert counted.objective <= solved.objective + 1e-9  # of ties the solver may miss the first
        assert counted.usd == pytest.approx(solved.usd, abs=1e-4)


def test_batch_work_paid_by_the_share() -> None:
    """One pool of batch work: machines, and what serving costs."""
    pool = Pool(name="a", usd=0.5, loads=(0.6, 0.7), share_usd=(3.0, 4.0))
    problem = Problem(pools=(pool,), online=(False, False))
    solution, solved = solve_fleet(problem), by_solver(problem)
    assert solution is not None
    assert solved is not None
    assert solution == replace(solved, objective=solution.objective)
    assert solution.objective == pytest.approx(solved.objective)
    assert (solution.machines, solution.usd) == ({"a": 2}, 8.0)


def test_spot_with_its_spare_against_on_demand() -> None:
    """Two machines at 1.00 cost less than the three at 0.70 that spot takes; of ten, spot is cheaper."""
    on_demand = Pool(name="on-demand", usd=1.0, loads=(1.8,))
    spot = Pool(name="spot", usd=0.7, loads=(1.8,), spare=1, steady=False)
    small = solve_fleet(Problem(pools=(on_demand, spot), online=(True,)))
    assert small is not None
    assert small.machines == {"on-demand": 2}
    large = [replace(pool, loads=(9.5,)) for pool in (on_demand, spot)]
    fleet = solve_fleet(Problem(pools=tuple(large), online=(True,)))
    assert fleet is not None
    assert fleet.machines == {"spot": 10}


@pytest.mark.parametrize(
    "problem",
    [
        Problem(pools=(Pool(name="a", usd=1.0, loads=(1.0,)),), online=(True,), survive=0.5),
        Problem(pools=(Pool(name="a", usd=1.0, loads=(1.0,)),), online=(True,), before={"a": 3}),
        Problem(pools=(Pool(name="a", usd=1.0, loads=(math.inf,)),), online=(True,)),
        Problem(
            pools=tuple(Pool(name=name, usd=1.0, loads=(load,)) for name, load in (("a", 1.0), ("b", 2.0))),
            online=(True,),
        ),
    ],
    ids=["survive", "previous plan", "does not serve", "unequal loads"],
)  # fmt: skip
def test_leaves_to_the_solver(problem: Problem) -> None:
    assert not carry_alike(problem, problem.pools)
