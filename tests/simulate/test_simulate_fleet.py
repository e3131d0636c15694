"""Fleets in simulation: routing by shares, pools by themselves, how many engines are needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_simulate_serving import BUSY

from moeplan.planner.ir.attainment import Pool
from moeplan.planner.ir.fleet import Route
from moeplan.planner.ir.spec import Slo
from moeplan.planner.ir.workload import Bucket
from moeplan.planner.simulate.fleet import engines_needed, replay, run_pool, split
from moeplan.planner.traces import RequestTrace

SLO = Slo(ttft_s=1.0, itl_s=0.05, attainment=0.95)
SMALL, LARGE = (
    Pool(column=name, engines=engines, margin=1.15, capacity_share=1.0, law=BUSY)
    for name, engines in (("small", 2), ("large", 4))
)
BUCKETS = tuple(Bucket(prompt_tokens=p, output_tokens=20.0, share=0.5) for p in (50.0, 700.0))


def stream(count: int, rate_per_s: float, seed: int = 0) -> RequestTrace:
    draw = np.random.RandomState(seed)
    return RequestTrace(
        arrival_s=np.cumsum(draw.exponential(1 / rate_per_s, count)),
        prompt_tokens=draw.choice([40, 60, 600, 800], count),
        output_tokens=draw.randint(1, 40, count),
    )


def route(bucket: int, column: str, share: float) -> Route:
    return Route(serves="online", bucket=bucket, column=column, share=share)


def test_requests_follow_the_shares() -> None:
    """Long prompts to the large pool, short ones three to one; each request goes somewhere, once."""
    routes = [route(0, "small", 0.75), route(0, "large", 0.25), route(1, "large", 1.0)]
    requests = stream(8000, 10.0)
    small, large = split(requests, BUCKETS, routes, (SMALL, LARGE))
    assert small.requests + large.requests == requests.requests
    assert sorted([*small.arrival_s, *large.arrival_s]) == requests.arrival_s.tolist()
    assert (small.prompt_tokens < 100).all()
    short = (requests.prompt_tokens < 100).sum()
    assert small.requests / short == pytest.approx(0.75, abs=0.02)


def test_a_replay_adds_its_pools_up() -> None:
    routes = [route(0, "small", 1.0), route(1, "large", 1.0)]
    parts = split(stream(2000, 20.0), BUCKETS, routes, (SMALL, LARGE))
    found = replay(parts, (SMALL, LARGE), SLO)
    kept = sum(pool.requests * pool.attained_share for pool in found.pools)
    assert found.attained_share == pytest.approx(kept / 2000)
    assert [pool.column for pool in found.pools] == ["small", "large"]
    assert found.ttft.p50_s <= found.ttft.p90_s <= found.ttft.p99_s
    assert all(0 < pool.busy <= 1 and 0 < pool.occupied <= 1 for pool in found.pools)


def test_attained_means_both_promises() -> None:
    run = run_pool(stream(1000, 60.0), SMALL, SLO, surge=False)
    itl = np.nan_to_num(run.itl_s)  # a single token has no gap to be late
    assert run.attained == ((run.ttft_s <= SLO.ttft_s) & (itl <= SLO.itl_s)).sum()
    assert 0 < run.attained < 1000


def test_a_surge_is_the_same_requests_faster() -> None:
    part = stream(1500, 12.0)
    surge = run_pool(part, SMALL, SLO, surge=True)
    faster = run_pool(part.at_rate(part.rate_per_s * 1.15), SMALL, SLO, surge=False)
    assert surge.attained == pytest.approx(faster.attained, abs=15)
    assert surge.attained <= run_pool(part, SMALL, SLO, surge=False).attained


def test_too_long_requests_miss() -> None:
    """Longer than the engines were planned for: refused, never served, counted."""
    part = stream(300, 1.0)
    long = replace(part, output_tokens=np.where(np.arange(300) < 30, 5000, part.output_tokens))
    found = replay([long], [LARGE], SLO)
    assert found.refused == 30
    assert found.attained_share <= 0.9


def test_engines_needed_is_the_fewest() -> None:
    part = stream(3000, 60.0)
    one = replace(SMALL, engines=1)

    def keeps(engines: int) -> bool:
        return run_pool(part, replace(one, engines=engines), SLO, surge=True).attained >= 0.95 * 3000

    needed = engines_needed(part, one, SLO, 0.95, 64)
    assert needed == next(n for n in range(1, 65) if keeps(n))
    assert needed > 2
    assert engines_needed(part, one, SLO, 0.95, needed - 1) is None


def test_more_engines_and_lower_rates_attain_more() -> None:
    parts = [stream(4000, rate) for rate in (80.0, 40.0, 20.0)]
    by_rate = [run_pool(part, SMALL, SLO, surge=False).attained for part in parts]
    assert by_rate == sorted(by_rate)
    by_engines = [run_pool(parts[0], replace(SMALL, engines=n), SLO, surge=False).attained for n in (2, 4, 8)]
    assert by_engines == sorted(by_engines)


def test_a_pool_without_requests() -> None:
    routes = [route(0, "small", 1.0), route(1, "small", 1.0)]
    parts = split(stream(10, 1.0), BUCKETS, routes, (SMALL, LARGE))
    found = replay(parts, (SMALL, LARGE), SLO)
    assert found.pools[1].requests == 0
    assert found.attained_share == 1.0
