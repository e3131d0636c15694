"""Capacity of zones, one batch job -> when it ends and what it costs when spot machines are taken away.

A job runs in the cheapest zone that has a machine, from the end of its cold start. Preempted, it loses the
work of its last `redone_s` seconds (the requests in flight, which the runtime starts again when it resumes),
or all of it where the engine keeps no answers before the end. While no zone has a machine it waits. The trace
is taken as a circle: a job that is not done at its end goes on at its beginning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

_MOST_TURNS = 20  # of the trace, after which a job counts as never done


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRuns:
    """One job begun at each of many moments: seconds to its end (infinite: never), its bill, preemptions."""

    seconds: NDArray[np.float64]  # [starts]
    usd: NDArray[np.float64]  # [starts]
    preemptions: NDArray[np.int64]  # [starts]


@njit(cache=True)
def _run(capacity, usd_per_s, step_s, work_s, cold_s, redone_s, start, most_steps):
    """Seconds, USD and preemptions of one job that is launched at step `start`."""
    steps, zones = capacity.shape
    zone, warm_s, done_s, usd, lost = -1, 0.0, 0.0, 0.0, 0
    for n in range(most_steps):
        row = capacity[(start + n) % steps]
        if zone >= 0 and row[zone] < 1:
            done_s = max(0.0, done_s - redone_s)
            zone = -1
            lost += 1
        if zone < 0:
            warm_s = 0.0
            for z in range(zones):
                if row[z] > 0:
                    zone = z
                    break
        if zone < 0:
            continue
        idle_s = min(step_s, max(0.0, cold_s - warm_s))
        warm_s += idle_s
        useful_s = min(step_s - idle_s, work_s - done_s)
        done_s += useful_s
        if done_s >= work_s - 1e-9:
            return n * step_s + idle_s + useful_s, usd + usd_per_s[zone] * (idle_s + useful_s), lost
        usd += usd_per_s[zone] * step_s
    return np.inf, usd, lost


def run_batch(
    capacity: NDArray[np.int16],
    step_s: float,
    usd_per_hour: NDArray[np.float64],
    work_s: float,
    cold_start_s: float,
    redone_s: float,
    starts: NDArray[np.int64],
) -> BatchRuns:
    """Run the job once from each of `starts` over `capacity` [steps, zones]."""
    order = np.argsort(usd_per_hour, kind="stable")
    ranked = np.ascontiguousarray(capacity[:, order])
    usd_per_s = usd_per_hour[order] / 3600.0
    whole = math.ceil((work_s + cold_start_s) / step_s)
    most = _MOST_TURNS * (len(capacity) + whole)
    rows = [
        _run(ranked, usd_per_s, step_s, work_s, cold_start_s, redone_s, int(start), most) for start in starts
    ]
    return BatchRuns(
        seconds=np.array([row[0] for row in rows]),
        usd=np.array([row[1] for row in rows]),
        preemptions=np.array([row[2] for row in rows], dtype=np.int64),
    )
