"""The clairvoyant's bill is the linear program's, and no policy pays less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from spot_data import even_prices, needs_data, published

from moeplan.planner.placing.clairvoyant import clairvoyant_bound
from moeplan.planner.simulate.spot import Policy, Rule, replay

STEP_S = 300.0
ON_DEMAND = 3.0


def omniscient(capacity: NDArray[np.int16], usd: NDArray[np.float64], replicas: int, cold: int) -> float:
    """SkyServe's omniscient problem as a linear program, word for word: USD per hour, never short after the
    first cold start of `cold` steps."""
    steps, zones = capacity.shape
    rooms = np.concatenate([capacity, np.full((steps, 1), replicas)], axis=1)
    price = [*usd.tolist(), ON_DEMAND]
    problem = pulp.LpProblem("omniscient", pulp.LpMinimize)
    launched = [
        [problem.add_variable(f"l{z}_{t}", 0, int(rooms[t, z])) for t in range(steps)]
        for z in range(zones + 1)
    ]
    ready = [[problem.add_variable(f"r{z}_{t}", 0) for t in range(steps)] for z in range(zones + 1)]
    problem += pulp.lpSum(price[z] * launched[z][t] for z in range(zones + 1) for t in range(steps))
    for t in range(cold, steps):
        problem += pulp.lpSum(ready[z][t] for z in range(zones + 1)) >= replicas
        for z in range(zones + 1):
            for u in range(t - cold, t + 1):
                problem += ready[z][t] <= launched[z][u]
    problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1))
    return float(pulp.value(problem.objective)) / steps


@st.composite
def markets(draw: st.DrawFn) -> tuple[NDArray[np.int16], NDArray[np.float64], int, int]:
    zones, steps = draw(st.integers(1, 3)), draw(st.integers(4, 14))
    rows = st.lists(st.integers(0, 2), min_size=zones, max_size=zones)
    capacity = np.array(draw(st.lists(rows, min_size=steps, max_size=steps)), np.int16)
    usd = np.array(draw(st.lists(st.sampled_from([0.7, 1.0, 1.3]), min_size=zones, max_size=zones)))
    return capacity, usd, draw(st.integers(1, 3)), draw(st.integers(1, 3))


@settings(max_examples=25)
@given(markets())
def test_flow_is_the_linear_program(case: tuple[NDArray[np.int16], NDArray[np.float64], int, int]) -> None:
    """With the step as block and nothing excused but the rounding of ticks, which is taken out here."""
    capacity, usd, replicas, cold = case
    from moeplan.planner.placing import clairvoyant

    rooms = np.concatenate([capacity, np.full((len(capacity), 1), replicas, np.int16)], axis=1)
    flow = clairvoyant._flow(rooms, np.append(usd, ON_DEMAND), 1e6, cold, replicas) / len(capacity)
    assert flow == pytest.approx(omniscient(capacity, usd, replicas, cold), rel=1e-6)


@settings(max_examples=100)
@given(
    markets(),
    st.integers(0, 2),
    st.integers(0, 1),
    st.sampled_from([60.0, 130.0, 300.0, 650.0]),
    st.sampled_from(["min-cost", "round-robin", "even-spread"]),
)
def test_no_policy_pays_less(
    case: tuple[NDArray[np.int16], NDArray[np.float64], int, int],
    extra: int,
    base: int,
    cold_start_s: float,
    rule: Rule,
) -> None:
    capacity, usd, replicas, _ = case
    policy = Policy(
        replicas=replicas, extra=extra, base=base, cold_start_s=cold_start_s, rule=rule, fallback=extra != 2
    )
    run = replay(capacity, STEP_S, np.arange(len(usd)), usd, policy)
    bound = clairvoyant_bound(capacity, STEP_S, usd, ON_DEMAND, replicas, cold_start_s, run.availability)
    assert bound <= run.usd_per_hour(ON_DEMAND) + 1e-9


@needs_data
@pytest.mark.parametrize(("name", "published_cost"), [("gcp1", 34.0), ("aws3_first_half", 34.0)])
def test_published_optima(name: str, published_cost: float) -> None:
    """SkyServe's "Optimal" (its windows are a day each): within three points, and below SkyServe's cost."""
    trace = published(name)
    steps = min(trace.steps, 2700)
    capacity, usd = trace.capacity[:steps], even_prices(trace)
    bound = clairvoyant_bound(capacity, trace.step_s, usd, ON_DEMAND, 3, 120.0, 1.0)
    assert 100 * bound / 9.0 == pytest.approx(published_cost, abs=3.0)
    policy = Policy(replicas=3, extra=0, cold_start_s=120.0)
    for extra in (0, 1, 2):
        run = replay(capacity, trace.step_s, np.arange(len(usd)), usd, replace(policy, extra=extra))
        allowed = clairvoyant_bound(capacity, trace.step_s, usd, ON_DEMAND, 3, 120.0, run.availability)
        assert allowed <= run.usd_per_hour(ON_DEMAND)
