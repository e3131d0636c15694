"""Plan, spot trace -> Timelines: what the online spot sites would have done over the trace, tick by tick.

The same replay as behind the placement's promise (`simulate/spot.py`), with the zones, spares and on-demand
floor that the plan came to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.analysis import Timeline, TimelinePart
from moeplan.planner.ir.placement import Site
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.spot import SpotTrace

_COLUMNS = 240  # of the chart
_MOST_ROWS = 14  # of the table, each of whole days
_DAY_S = 86400.0


def timelines(plan: Plan, inputs: Inputs) -> tuple[Timeline, ...]:
    """Of each site that was placed by the trace; none without one."""
    trace = inputs.spot_trace
    if trace is None:
        return ()
    return tuple(_timeline(site, trace) for site in plan.placement.sites if site.evidence == "trace")


def _timeline(site: Site, trace: SpotTrace) -> Timeline:
    from moeplan.planner.simulate.spot import TICK_S, Policy, cold_ticks, replay, ticks_of  # takes Numba

    zones = {(zone.cloud, zone.region, zone.zone): zone.usd_per_hour for zone in site.zones}
    used = [n for n, z in enumerate(trace.zones) if (z.cloud, z.region, z.zone) in zones]
    usd = [zones[z.cloud, z.region, z.zone] for z in (trace.zones[n] for n in used)]
    policy = Policy(
        replicas=site.replicas,
        extra=site.spot_overprovision,
        base=site.on_demand_base,
        cold_start_s=site.cold_start_s,
        fallback=site.on_demand_fallback,
    )
    ticks = np.zeros((ticks_of(trace.steps, trace.step_s), 3), np.int32)
    replay(trace.capacity, trace.step_s, np.array(used), np.array(usd), policy, timeline=ticks)
    counted = np.arange(len(ticks)) >= cold_ticks(site.cold_start_s)
    days = math.ceil(trace.span_s / _DAY_S / _MOST_ROWS)
    columns = np.linspace(0, len(ticks), min(_COLUMNS, len(ticks)) + 1).round().astype(int)
    rows = np.append(np.arange(0, len(ticks), round(days * _DAY_S / TICK_S)), len(ticks))
    return Timeline(
        column=site.column,
        wanted=site.replicas,
        source=trace.source or "spot trace",
        columns=tuple(_parts(ticks, counted, site.replicas, columns.tolist(), TICK_S)),
        rows=tuple(_parts(ticks, counted, site.replicas, rows.tolist(), TICK_S)),
    )


def _parts(
    ticks: NDArray[np.int32], counted: NDArray[np.bool_], wanted: int, edges: list[int], tick_s: float
) -> Iterator[TimelinePart]:
    """What happens between `edges`, in ticks. Before the first cold start nothing counts as missing."""
    enough = ticks[:, :2].sum(axis=1) >= wanted
    for begin, end in pairwise(edges):
        own = counted[begin:end]
        yield TimelinePart(
            begin_s=begin * tick_s,
            end_s=end * tick_s,
            on_spot=float(ticks[begin:end, 0].mean()),
            on_demand=float(ticks[begin:end, 1].mean()),
            enough_share=float(enough[begin:end][own].mean()) if own.any() else 1.0,
            preemptions=int(ticks[begin:end, 2].sum()),
        )
