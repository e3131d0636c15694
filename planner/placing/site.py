"""A trace of zones, or bands of interruptions -> where a site's online spot replicas go and what they will
do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moeplan.planner.ir.machine import Machine, Offer
from moeplan.planner.ir.placement import Interval, Outlook, StaticTargets, Zone
from moeplan.planner.ir.spec import Cloud, Domain
from moeplan.planner.ir.spot import SpotTrace, ZoneName
from moeplan.planner.placing.clairvoyant import clairvoyant_bound, manageable_steps
from moeplan.planner.placing.decide import (
    DAY_S,
    FULL_EVIDENCE_DAYS,
    Candidate,
    Decision,
    Market,
    Wanted,
    decide,
    replayed,
)
from moeplan.planner.placing.outlook import availability_interval, independent_availability
from moeplan.planner.placing.targets import Targets, static_targets

Region = tuple[Cloud, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A placement of one site. `kept` is false where nothing keeps what is wanted: then it comes closest."""

    zones: tuple[Zone, ...]
    extra: int
    base: int
    kept: bool
    bound_availability: float
    outlook: Outlook
    static: StaticTargets | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Zoned:
    """The trace's zones that are for sale, with their offers, and notes on those that are not.

    `carries` is false where the trace is of another machine type, or does not tell how many machines there
    are: it orders placements, but nothing is promised on it.
    """

    market: Market
    names: tuple[ZoneName, ...]
    offers: tuple[Offer, ...]
    carries: bool
    notes: tuple[str, ...]


def zoned(
    trace: SpotTrace, machine: Machine, offers: Mapping[Region, Offer], domain: Domain | None
) -> Zoned | None:
    """The market that a trace describes; None where none of its zones sells spot machines of this type."""
    columns = [
        n
        for n, zone in enumerate(trace.zones)
        if (offer := offers.get((zone.cloud, zone.region))) and offer.spot_usd_per_hour is not None
    ]
    if not columns:
        return None
    names = tuple(trace.zones[n] for n in columns)
    own = tuple(offers[name.cloud, name.region] for name in names)
    dropped = [str(zone) for n, zone in enumerate(trace.zones) if n not in columns]
    notes = list(trace.notes)
    if dropped:
        notes.append(f"no spot offer within the market in {', '.join(dropped)}")
    if not trace.counted:
        notes.append(
            "the trace tells whether a zone has a machine, not how many: any number, no base for a promise"
        )
    words = re.findall(r"[A-Za-z0-9.+-]+", trace.instance)
    other = bool(words) and machine.name not in words and trace.instance != machine.gpu
    if other:
        notes.append(
            f"the trace was taken with {trace.instance}, not with {machine.name}: no base for a promise"
        )
    market = Market(
        capacity=np.ascontiguousarray(trace.capacity[:, columns]),
        step_s=trace.step_s,
        usd_per_hour=np.array([offer.spot_usd_per_hour for offer in own], dtype=np.float64),
        on_demand_usd_per_hour=np.array([offer.on_demand_usd_per_hour for offer in own]),
        domains=_domains(names, domain),
    )
    return Zoned(
        market=market, names=names, offers=own, carries=trace.counted and not other, notes=tuple(notes)
    )


def _domains(names: Sequence[ZoneName], domain: Domain | None) -> np.ndarray:
    keys = {
        "zone": [str(name) for name in names],
        "region": [f"{name.cloud}/{name.region}" for name in names],
        "cloud": [str(name.cloud) for name in names],
    }[domain or "zone"]
    known = sorted(set(keys))
    return np.array([known.index(key) for key in keys], dtype=np.int64)


def place_by_trace(found: Zoned, trace: SpotTrace, wanted: Wanted) -> Placed | None:
    """Zones, spare replicas and on-demand floor by replaying the trace; None where no zone list may be
    used."""
    decision = decide(found.market, wanted)
    if decision is None:
        return None
    best = decision.best
    outlook = _outlook(found.market, wanted, best, trace, decision.kept and found.carries)
    targets = static_targets(found.market, wanted, best.zones)
    zones = _zones(found, best, targets)
    return Placed(
        zones=zones,
        extra=best.extra,
        base=best.base,
        kept=decision.kept,
        bound_availability=best.bound_availability,
        outlook=outlook,
        static=StaticTargets(usd_per_hour=targets.usd_per_hour, shortfall=targets.shortfall)
        if targets
        else None,
        notes=(*_left_out(found, decision), *found.notes),
    )


def _zones(found: Zoned, best: Candidate, targets: Targets | None) -> tuple[Zone, ...]:
    """The chosen zones, cheapest first."""
    order = sorted(best.zones, key=lambda z: (found.market.usd_per_hour[z], found.names[z]))
    spot = dict(zip(best.zones, targets.spot, strict=True)) if targets else {}
    on_demand = dict(zip(best.zones, targets.on_demand, strict=True)) if targets else {}
    return tuple(
        Zone(
            cloud=found.names[z].cloud,
            region=found.names[z].region,
            zone=found.names[z].zone,
            usd_per_hour=float(found.market.usd_per_hour[z]),
            on_demand_usd_per_hour=found.offers[z].on_demand_usd_per_hour,
            spot_target=spot.get(z, 0),
            on_demand_target=on_demand.get(z, 0),
        )
        for z in order
    )


def _left_out(found: Zoned, decision: Decision) -> list[str]:
    """Which zones the decision leaves out, with price and how often they had a machine."""
    up = (found.market.capacity > 0).mean(axis=0)
    left = [
        f"{found.names[z]} ({found.market.usd_per_hour[z]:.2f} USD/h, up {up[z]:.0%})"
        for z in range(len(found.names))
        if z not in decision.best.zones
    ]
    notes = [f"left out: {', '.join(left)}"] if left else []
    used = {found.names[z].region for z in decision.best.zones}
    if any(
        found.names[z].cloud == "aws" and found.names[z].region in used
        for z in range(len(found.names))
        if z not in decision.best.zones
    ):
        notes.append("on AWS SkyPilot is told regions: it may use zones of theirs that are left out here")
    if len(decision.best.zones) == 1:
        notes.append(
            "one zone only: a failure that its trace does not show takes all; `spread` asks for more"
        )
    return notes


def _outlook(market: Market, wanted: Wanted, best: Candidate, trace: SpotTrace, certain: bool) -> Outlook:
    run = replayed(market, wanted, best.zones, best.extra, best.base)
    interval = availability_interval(market, wanted, best.zones, best.extra, best.base)
    long_enough = trace.span_s / DAY_S >= FULL_EVIDENCE_DAYS
    return Outlook(
        basis=trace.source or "spot trace",
        start=trace.start,
        span_s=trace.span_s,
        step_s=trace.step_s,
        availability=interval,
        promised=min(best.bound_availability, wanted.availability) if certain and long_enough else 0.0,
        shortfall=run.shortfall,
        usd_per_hour=best.usd_per_hour,
        stand_ins_usd_per_hour=run.mean_on_demand * market.on_demand(best.zones),
        all_on_demand_usd_per_hour=wanted.replicas * market.all_on_demand,
        clairvoyant_usd_per_hour=_clairvoyant(market, wanted, best),
        preemptions_per_day=run.preemptions_per_day,
        independent_availability=independent_availability(market, wanted, best.zones, best.extra, best.base),
    )


def _clairvoyant(market: Market, wanted: Wanted, best: Candidate) -> float:
    """The least bill of any policy with all the market's zones that is as available as ours was, over the
    last part of the trace that can be solved; scaled to the whole trace by our own bills."""
    steps = manageable_steps(market.step_s, wanted.cold_start_s, len(market.usd_per_hour), wanted.replicas)
    part = replace(market, capacity=market.capacity[-steps:])
    run = replayed(part, wanted, best.zones, best.extra, best.base)
    bound = clairvoyant_bound(
        part.capacity,
        market.step_s,
        market.usd_per_hour,
        market.all_on_demand,
        wanted.replicas,
        wanted.cold_start_s,
        run.availability,
    )
    return best.usd_per_hour * bound / run.usd_per_hour(market.on_demand(best.zones))


def widest(intervals: Sequence[Interval]) -> Interval:
    """From the lowest to the highest, about the middle one."""
    middle = sorted(intervals, key=lambda i: i.value)[len(intervals) // 2]
    return Interval(
        value=middle.value,
        low=min(i.low for i in intervals),
        high=max(i.high for i in intervals),
    )


def most_replicas(quota: Mapping[str, int], used_by_others: int, machine: Machine) -> int:
    """How many replicas the quota of the machine's GPU leaves for this site."""
    if machine.gpu not in quota:
        return 1 << 30
    return (quota[machine.gpu] - used_by_others) // max(1, machine.gpus)


def floor_of(replicas: int, share: float | None) -> int:
    return math.ceil(share * replicas - 1e-9) if share else 0
