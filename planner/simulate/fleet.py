"""Requests, pools, routes -> how a fleet keeps its SLO in simulation, pool by pool.

A request is routed to a pool at random, weighted by its bucket's shares, and inside the pool to the engine
with the fewest unfinished requests. Importing this module imports Numba.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moeplan.planner.buckets import nearest_buckets
from moeplan.planner.ir.attainment import Percentiles, Pool, PoolReplay, Replay
from moeplan.planner.ir.fleet import Route
from moeplan.planner.ir.spec import Slo
from moeplan.planner.ir.workload import Bucket
from moeplan.planner.simulate.serving import Floats, Ints, keeps_slo, serve
from moeplan.planner.traces import RequestTrace

_SEED = 1  # of the router


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRun:
    """One pool's requests, [n]: infinite where refused for their length; and what its engines did."""

    column: str
    ttft_s: Floats
    itl_s: Floats  # nan where there is but one token
    gap_s: Floats
    attained: int
    busy: float
    occupied: float


def split(
    stream: RequestTrace, buckets: Sequence[Bucket], routes: Sequence[Route], pools: Sequence[Pool]
) -> list[RequestTrace]:
    """The part of `stream` that is routed to each of `pools`."""
    bucket = nearest_buckets(buckets, stream.prompt_tokens, stream.output_tokens)
    chosen = _routed(bucket, routes, [pool.column for pool in pools], len(buckets))
    return [stream.part(chosen == number) for number in range(len(pools))]


def run_pool(part: RequestTrace, pool: Pool, slo: Slo, surge: bool) -> PoolRun:
    """Serve a pool's requests, at their own rate or in a surge of the pool's margin."""
    fits = part.prompt_tokens + part.output_tokens <= pool.law.context_tokens[-1]
    served = part.part(fits)
    arrival_s = served.arrival_s / (pool.margin if surge else 1.0)
    result = serve(arrival_s, served.prompt_tokens, served.output_tokens, pool.law, pool.engines)
    ttft, itl, gap = np.full((3, part.requests), np.inf)
    ttft[fits], itl[fits], gap[fits] = result.ttft_s, result.itl_s, result.gap_s
    span_s = max(float(result.finish_s.max(initial=0.0)), 1e-9)
    return PoolRun(
        column=pool.column,
        ttft_s=ttft,
        itl_s=np.where(part.output_tokens > 1, itl, np.nan),
        gap_s=gap,
        attained=int(((ttft <= slo.ttft_s) & (itl <= slo.itl_s)).sum()),
        busy=float(result.busy_s.mean()) / span_s,
        occupied=float(result.occupied_s.mean()) / span_s / pool.law.sequences,
    )


def replay(parts: Sequence[RequestTrace], pools: Sequence[Pool], slo: Slo, surge: bool = False) -> Replay:
    """Serve each pool's part of a stream; see `split`."""
    runs = [run_pool(part, pool, slo, surge) for part, pool in zip(parts, pools, strict=True)]
    ttft, itl, gap = (
        np.concatenate([getattr(run, name) for run in runs]) for name in ("ttft_s", "itl_s", "gap_s")
    )
    served = np.isfinite(ttft)
    several = served & np.isfinite(itl)
    return Replay(
        attained_share=sum(run.attained for run in runs) / max(1, len(ttft)),
        refused=int((~served).sum()),
        ttft=_percentiles(ttft[served]),
        itl=_percentiles(itl[several]),
        gap=_percentiles(gap[several]),
        pools=tuple(
            PoolReplay(
                column=run.column,
                requests=len(run.ttft_s),
                attained_share=run.attained / max(1, len(run.ttft_s)),
                busy=run.busy,
                occupied=run.occupied,
            )
            for run in runs
        ),
    )


def engines_needed(part: RequestTrace, pool: Pool, slo: Slo, wanted: float, most: int) -> int | None:
    """The fewest engines, no fewer than the pool has and at most `most`, that keep the SLO for `wanted` of
    its part in a surge; None where `most` do not. Of many engines the number is right to a twentieth."""

    def keeps(engines: int) -> bool:
        return _keeps(part, replace(pool, engines=engines), slo, wanted)

    low, high = pool.engines - 1, min(pool.engines, most)
    while not keeps(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > max(1, high // 20):
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high


def bearable_share(part: RequestTrace, pool: Pool, slo: Slo, wanted: float) -> float:
    """The largest share of its requests, drawn at random, for which the pool keeps the SLO in a surge: to a
    thirty-second, which is also the least."""
    drawn = np.random.RandomState(_SEED).random_sample(part.requests)
    low, high = 1 / 32, 1.0
    while high - low > 1 / 32:
        middle = (low + high) / 2
        keeps = _keeps(part.part(drawn < middle), pool, slo, wanted)
        low, high = (middle, high) if keeps else (low, middle)
    return low


def _keeps(part: RequestTrace, pool: Pool, slo: Slo, wanted: float) -> bool:
    """Whether `run_pool` in a surge keeps the SLO for `wanted` of its requests; if not, it soon ends."""
    served = part.part(part.prompt_tokens + part.output_tokens <= pool.law.context_tokens[-1])
    most_late = part.requests - math.ceil(wanted * part.requests) - (part.requests - served.requests)
    return most_late >= 0 and keeps_slo(
        served.arrival_s / pool.margin,
        served.prompt_tokens,
        served.output_tokens,
        pool.law,
        pool.engines,
        (slo.ttft_s, slo.itl_s),
        most_late,
    )


def _routed(bucket: Ints, routes: Sequence[Route], columns: Sequence[str], buckets: int) -> Ints:
    """The number of each request's pool."""
    shares = np.zeros((buckets, len(columns)))
    for route in routes:
        shares[route.bucket, columns.index(route.column)] += route.share
    edges = np.cumsum(shares / shares.sum(axis=1, keepdims=True), axis=1)
    # The legacy generator: its stream is the same in every version of numpy.
    drawn = np.random.RandomState(_SEED).random_sample(len(bucket))
    return np.asarray((drawn[:, None] >= edges[bucket][:, :-1]).sum(axis=1), np.int64)


def _percentiles(seconds: Floats) -> Percentiles:
    if not len(seconds):
        return Percentiles(p50_s=0.0, p90_s=0.0, p99_s=0.0)
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99)).tolist()
    return Percentiles(p50_s=p50, p90_s=p90, p99_s=p99)
