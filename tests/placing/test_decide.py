"""The decision: the cheapest that keeps the promise, spread where it is wanted, what holds on days unseen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from spot_data import aws3_prices, h100_prices, needs_data, published

from moeplan.planner.ir.spot import SpotTrace
from moeplan.planner.placing.decide import (
    Market,
    Wanted,
    decide,
    replayed,
    steady_counts,
    survives,
    zone_lists,
)
from moeplan.planner.placing.outlook import availability_interval, independent_availability


def market(trace: SpotTrace, usd: NDArray[np.float64], days: slice = slice(None)) -> Market:
    """Some days of a trace; an on-demand machine costs 1."""
    per_day = round(86400 / trace.step_s)
    rows = slice(days.start and days.start * per_day, days.stop and days.stop * per_day)
    return Market(
        capacity=trace.capacity[rows],
        step_s=trace.step_s,
        usd_per_hour=usd,
        on_demand_usd_per_hour=np.ones(len(usd)),
        domains=np.arange(len(usd)),
    )


def steady(*up: int, usd: tuple[float, ...] = ()) -> Market:
    """Zones that always hold as many machines, for three days."""
    return Market(
        capacity=np.repeat(np.array([up], np.int16), 3 * 288, axis=0),
        step_s=300.0,
        usd_per_hour=np.array(usd or [0.3 + 0.1 * n for n in range(len(up))]),
        on_demand_usd_per_hour=np.ones(len(up)),
        domains=np.arange(len(up)),
    )


WANTED = Wanted(replicas=2, cold_start_s=300.0, availability=0.99)


def test_the_cheapest_steady_zone_is_enough() -> None:
    decision = decide(steady(4, 4, 4), WANTED)
    assert decision is not None
    assert decision.kept
    assert (decision.best.zones, decision.best.extra, decision.best.base) == ((0,), 0, 0)
    assert decision.best.usd_per_hour == pytest.approx(0.6, rel=0.01)


def test_dead_zones_are_never_listed() -> None:
    assert zone_lists(steady(0, 2, 0)) == ((1,),)
    assert decide(steady(0, 0), WANTED) is None


def test_spread_takes_more_zones_or_spares() -> None:
    for floor in (1, 2):
        wanted = replace(WANTED, floor=floor)
        decision = decide(steady(4, 4, 4), wanted)
        assert decision is not None
        best = decision.best
        assert len(best.zones) > 1
        counts = steady_counts(steady(4, 4, 4), best.zones, wanted.replicas + best.extra - best.base)
        assert sum(counts.values()) - max(counts.values()) >= floor


def test_spread_that_cannot_be_had() -> None:
    assert decide(steady(4), replace(WANTED, floor=1)) is None
    one_region = replace(steady(4, 4, 4), domains=np.zeros(3, np.int64))
    assert decide(one_region, replace(WANTED, floor=1)) is None
    assert not survives(one_region, replace(WANTED, floor=1), (0, 1, 2), 1, 0)


def test_the_quota_bounds_spares() -> None:
    decision = decide(steady(4, 4, 4), replace(WANTED, floor=1, most=2))
    assert decision is not None
    assert decision.best.extra == 0


def test_a_failing_zone_needs_a_floor_or_cannot() -> None:
    """One zone, half the time down: what cannot be kept is told with what comes closest."""
    capacity = np.tile(np.repeat(np.array([2, 0], np.int16), 36), 12)[:, None]
    failing = replace(steady(2), capacity=capacity)
    decision = decide(failing, replace(WANTED, availability=0.999))
    assert decision is not None
    assert not decision.kept
    assert 0.5 < decision.best.bound_availability < 0.999
    easy = decide(failing, replace(WANTED, availability=0.6))
    assert easy is not None
    assert easy.kept
    assert easy.best.usd_per_hour <= decision.best.usd_per_hour


def test_interval_of_days_without_a_miss_is_not_a_point() -> None:
    interval = availability_interval(steady(4, 4), WANTED, (0, 1), 1, 0)
    assert interval.value == interval.high == 1.0
    assert interval.low == pytest.approx(1 - 300 / 86400)  # three days: one may hide a cold start
    assert independent_availability(steady(4, 4), WANTED, (0, 1), 1, 0) == 1.0


@needs_data
@pytest.mark.parametrize("target", [0.97, 0.98, 0.99])
def test_h100_beats_all_zones_and_one_spare(target: float) -> None:
    """Trained on the first four days, scored on the other three: at least a quarter cheaper than SkyServe's
    default, the target kept. Cold starts of five minutes, real prices."""
    trace = published("h100_gcp_first7d")
    usd = h100_prices(trace)
    wanted = Wanted(replicas=3, cold_start_s=300.0, availability=target)
    decision = decide(market(trace, usd, slice(0, 4)), wanted)
    assert decision is not None
    best, later = decision.best, market(trace, usd, slice(4, 7))
    ours = replayed(later, wanted, best.zones, best.extra, best.base)
    default = replayed(later, wanted, range(len(usd)), 1, 0)
    assert ours.usd_per_hour(1.0) <= 0.75 * default.usd_per_hour(1.0)
    assert ours.availability >= target


@needs_data
def test_two_weeks_of_aws3_hold_for_the_next() -> None:
    """Targets kept and intervals right in at least 80 % of splits with two weeks or more to learn from."""
    trace = published("aws3_first_half")
    usd = aws3_prices(trace)
    kept, covered = [], []
    for days in (14, 15, 16):
        known = market(trace, usd, slice(0, days))
        later = market(trace, usd, slice(days, days + 7 if days + 7 < 22 else None))
        for cold_start_s in (120.0, 600.0):
            for target in (0.95, 0.97):
                wanted = Wanted(replicas=3, cold_start_s=cold_start_s, availability=target)
                decision = decide(known, wanted)
                assert decision is not None
                best = decision.best
                seen = replayed(later, wanted, best.zones, best.extra, best.base).availability
                interval = availability_interval(known, wanted, best.zones, best.extra, best.base)
                kept.append(not decision.kept or seen >= target)
                covered.append(interval.low <= seen <= interval.high)
    assert np.mean(kept) >= 0.8
    assert np.mean(covered) >= 0.8
