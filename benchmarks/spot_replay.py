"""How fast SkyServe's policy is replayed, on one core: zone-ticks per second over a trace, best of many runs.

usage: python benchmarks/spot_replay.py TRACE...

A tick is 30 s, and every zone of it counts, though quiet ticks are jumped over.
"busy" is a made-up trace in which every zone changes at every step of 30 s, so that none can be jumped over.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tables import show

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.simulate.spot import Policy, Replayed, replay
from moeplan.planner.spot_traces import read_spot_trace

RUNS = 30


def fastest(run: Callable[[], Replayed]) -> tuple[float, int]:
    """The shortest of some runs in seconds, and the ticks of one."""
    ticks = int(run().ticks.sum())
    best = float("inf")
    for _ in range(RUNS):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best, ticks


def main() -> None:
    catalog = load_catalog(None, Span("catalog"))
    regions = {(offer.cloud, offer.region) for offer in catalog.offers}
    generator = np.random.default_rng(1)
    busy = generator.integers(0, 3, (100_000, 13)).astype(np.int16)
    traces = {"busy": (busy, 30.0)}
    for name in sys.argv[1:]:
        trace = read_spot_trace(Path(name), Span(name), regions)
        traces[Path(name).name.split(".")[0]] = (trace.capacity, trace.step_s)
    rows = []
    for name, (capacity, step_s) in traces.items():
        zones = capacity.shape[1]
        usd = 1.0 + 1e-4 * np.arange(zones)
        policy = Policy(replicas=3, extra=1, cold_start_s=300.0)
        columns = np.arange(zones)
        seconds, ticks = fastest(partial(replay, capacity, step_s, columns, usd, policy))
        rows.append(
            [name, str(zones), f"{ticks:,}", f"{seconds * 1e3:.2f}", f"{ticks * zones / seconds / 1e6:.0f}"]
        )
    show(["trace", "zones", "ticks", "ms", "million zone-ticks/s"], rows)


if __name__ == "__main__":
    main()
