"""Fixed targets: brute force finds nothing cheaper, and the tail is the tail."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.placing.decide import Market, Wanted
from moeplan.planner.placing.targets import static_targets

SPOT, ON_DEMAND = (1.0, 1.3), (3.0, 2.8)


def tail(missing: np.ndarray) -> float:
    """Mean of the worst 5 % of equally likely scenarios, by Rockafellar and Uryasev's minimum."""
    return min(eta + float(np.maximum(missing - eta, 0).mean()) / 0.05 for eta in (0.0, *missing.tolist()))


def brute(market: Market, wanted: Wanted) -> float:
    best = np.inf
    limit = min(1.0, wanted.shortfall / 0.05) * wanted.replicas
    counts = range(wanted.replicas + 4)
    bases = range(wanted.replicas + 1)
    for spot in itertools.product(counts, repeat=2):
        for base in itertools.product(bases, repeat=2):
            held = np.minimum(market.capacity, np.array(spot)).sum(axis=1) + sum(base)
            outside = [spot[1] + base[1], spot[0] + base[0]]
            if tail(np.maximum(wanted.replicas - held, 0)) > limit + 1e-9 or min(outside) < wanted.floor:
                continue
            best = min(best, float(np.dot(spot, SPOT) + np.dot(base, ON_DEMAND)))
    return best


@settings(max_examples=12)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=12),
    st.integers(1, 2),
    st.sampled_from([0.9, 0.97, 0.99]),
    st.integers(0, 1),
)
def test_brute_force(rows: list[tuple[int, int]], replicas: int, availability: float, floor: int) -> None:
    market = Market(
        capacity=np.array(rows, np.int16),
        step_s=300.0,
        usd_per_hour=np.array(SPOT),
        on_demand_usd_per_hour=np.array(ON_DEMAND),
        domains=np.arange(2),
    )
    wanted = Wanted(replicas=replicas, cold_start_s=60.0, availability=availability, floor=floor)
    found = static_targets(market, wanted, (0, 1))
    assert found is not None
    assert found.usd_per_hour == pytest.approx(brute(market, wanted), abs=1e-4)
