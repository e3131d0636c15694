"""Requests, pools, routes -> Replay: a fleet's latency in simulation.

A request is routed to a pool at random, weighted by its bucket's shares, and inside the pool to the engine
with the fewest unfinished requests. Importing this module imports Numba.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moeplan.planner.buckets import nearest_buckets
from moeplan.planner.ir.attainment import Percentiles, Pool, Replay
from moeplan.planner.ir.fleet import Route
from moeplan.planner.ir.spec import Slo
from moeplan.planner.ir.workload import Bucket
from moeplan.planner.simulate.serving import Floats, Ints, serve
from moeplan.planner.strategies.laws import slowed
from moeplan.planner.traces import RequestTrace

_SEED = 1  # of the router


def replay(
    stream: RequestTrace,
    buckets: Sequence[Bucket],
    routes: Sequence[Route],
    pools: Sequence[Pool],
    slo: Slo,
    slower: bool = False,
) -> Replay:
    """Serve `stream` on `pools`, as predicted or with each engine as slow as its plan allows for.

    Requests longer than an engine was planned for are refused, and so miss their SLO.
    """
    n = stream.requests
    served = np.ones(n, bool)
    ttft, itl, gap = np.full((3, n), np.inf)
    busy, occupied = [], []
    chosen = _routed(nearest_buckets(buckets, stream.prompt_tokens, stream.output_tokens), routes, pools)
    for number, pool in enumerate(pools):
        own = chosen == number
        law = slowed(pool.law, pool.slower) if slower else pool.law
        fits = stream.prompt_tokens + stream.output_tokens <= law.context_tokens[-1]
        served &= ~own | fits
        own &= fits
        result = serve(
            stream.arrival_s[own],
            stream.prompt_tokens[own],
            stream.output_tokens[own],
            law,
            pool.engines,
        )
        ttft[own], itl[own], gap[own] = result.ttft_s, result.itl_s, result.gap_s
        span_s = max(float(result.finish_s.max(initial=0.0)), float(stream.arrival_s[-1]))
        busy.append((pool.column, float(result.busy_s.mean()) / span_s))
        places = pool.law.sequences * span_s
        occupied.append((pool.column, float(result.occupied_s.mean()) / places))
    several = served & (stream.output_tokens > 1)
    return Replay(
        attained_share=float(((ttft <= slo.ttft_s) & (itl <= slo.itl_s)).mean()),
        refused=int((~served).sum()),
        ttft=_percentiles(ttft[served]),
        itl=_percentiles(itl[several]),
        gap=_percentiles(gap[several]),
        busy=tuple(busy),
        occupied=tuple(occupied),
    )


def _routed(bucket: Ints, routes: Sequence[Route], pools: Sequence[Pool]) -> Ints:
    """The number of each request's pool."""
    names = [pool.column for pool in pools]
    shares = np.zeros((bucket.max(initial=0) + 1, len(pools)))
    for route in routes:
        if route.bucket < len(shares):
            shares[route.bucket, names.index(route.column)] += route.share
    # The legacy generator: its stream is the same in every version of numpy.
    drawn = np.random.RandomState(_SEED).random_sample(len(bucket))
    edges = np.cumsum(shares / shares.sum(axis=1, keepdims=True), axis=1)
    chosen = (drawn[:, None] >= edges[bucket][:, :-1]).sum(axis=1)
    return np.asarray(chosen, np.int64)


def _percentiles(seconds: Floats) -> Percentiles:
    if not len(seconds):
        return Percentiles(p50_s=0.0, p90_s=0.0, p99_s=0.0)
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99)).tolist()
    return Percentiles(p50_s=p50, p90_s=p90, p99_s=p99)
