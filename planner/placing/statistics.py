"""Bands of interruptions -> a placement on synthetic traces, with an interval as wide as the bands are vague.

A monthly interruption rate f reads literally as spells of -month / ln(1 - f); measured V100 zones of AWS's
band ">20 %" had machines for 0.7 to 10 h at a time instead, so literal spells are the most that a band can
mean. The least is taken as half an hour's worth per share: 0.6 h / f, which is 3 h at 20 % and 1 h or less
far above. The plan is made for the geometric mean of both; its interval spans both ends. Down spells last 1,
2 and 4 h (the traces' means are 0.3 to 5 h). Zones of a region fail together as on AWS3 (`fit_shocks` of its
first half: 0.65 within, 0.28 across). All of this orders zones and shows what is at stake; it is no
measurement, and nothing is promised on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.placement import Interval, Outlook, Zone
from moeplan.planner.ir.spot import Interruption, SpotTrace, ZoneName
from moeplan.planner.placing.decide import Candidate, Market, Wanted, decide, replayed
from moeplan.planner.placing.shocks import Shocks, ZoneRates, generate
from moeplan.planner.placing.site import Placed, Region, widest

_WITHIN, _ACROSS = 0.65, 0.28
_MONTH_S = 30 * 86400.0
_LEAST_S_PER_SHARE = 0.6 * 3600
_DOWN_S = {"worst": 4 * 3600.0, "middle": 2 * 3600.0, "best": 3600.0}
_STEP_S = 600.0
_STEPS = 28 * 144  # four weeks
_WEEK_STEPS = 7 * 144
_SEED = 20250330
_LIKELIEST = 0.995  # of an interruption within a month: "more than 20 %" ends somewhere


def place_by_statistics(
    rows: Sequence[Interruption], offers: Mapping[Region, Offer], machine: str, wanted: Wanted, domain: str
) -> Placed | None:
    """A placement in the regions that have a band and a spot price; None where there is none."""
    known = [r for r in rows if r.machine == machine and _spot(offers.get((r.cloud, r.region))) is not None]
    if not known:
        return None
    own = [offers[row.cloud, row.region] for row in known]
    names = tuple(ZoneName(cloud=row.cloud, region=row.region) for row in known)
    readings = {name: _trace(known, names, name, wanted.replicas + 2) for name in _DOWN_S}
    markets = {name: _market(trace, own, domain) for name, trace in readings.items()}
    decision = decide(markets["middle"], wanted)
    if decision is None:
        return None
    best = decision.best
    spans = [_weeks(market, wanted, best) for market in markets.values()]
    zones = [
        Zone(
            cloud=offer.cloud,
            region=offer.region,
            usd_per_hour=float(markets["middle"].usd_per_hour[z]),
            on_demand_usd_per_hour=offer.on_demand_usd_per_hour,
        )
        for z, offer in enumerate(own)
        if z in best.zones
    ]
    return Placed(
        zones=tuple(sorted(zones, key=lambda zone: (zone.usd_per_hour, zone.cloud, zone.region))),
        extra=best.extra,
        base=best.base,
        kept=decision.kept,
        bound_availability=best.bound_availability,
        outlook=_outlook(markets["middle"], wanted, best, widest(spans)),
        static=None,
        notes=("interruption bands order zones; their rates are read widely, and no figure is promised",),
    )


def _spot(offer: Offer | None) -> float | None:
    return offer.spot_usd_per_hour if offer else None


def _up_spell_s(row: Interruption, reading: str) -> float:
    share = (row.low + row.high) / 2 if reading == "middle" else row.high if reading == "worst" else row.low
    literal = _MONTH_S / -math.log1p(-min(max(share, 0.01), _LIKELIEST))
    least = _LEAST_S_PER_SHARE / max(share, 0.01)
    return {"best": literal, "worst": least, "middle": math.sqrt(literal * least)}[reading]


def _trace(rows: Sequence[Interruption], names: Sequence[ZoneName], reading: str, depth: int) -> SpotTrace:
    rates = []
    for row, name in zip(rows, names, strict=True):
        up, down = _up_spell_s(row, reading), _DOWN_S[reading]
        share = min(0.95, max(1e-4, down / (up + down)))
        rates.append(ZoneRates(name=name, down_share=share, down_spell_s=down, depth=depth))
    shocks = Shocks(zones=tuple(rates), within=_WITHIN, across=_ACROSS)
    return generate(shocks, _STEPS, _STEP_S, _SEED)


def _market(trace: SpotTrace, offers: Sequence[Offer], domain: str) -> Market:
    keys = [{"cloud": o.cloud}.get(domain, f"{o.cloud}/{o.region}") for o in offers]
    return Market(
        capacity=trace.capacity,
        step_s=trace.step_s,
        usd_per_hour=np.array([_spot(offer) for offer in offers], dtype=np.float64),
        on_demand_usd_per_hour=np.array([offer.on_demand_usd_per_hour for offer in offers]),
        domains=np.array([sorted(set(keys)).index(key) for key in keys], dtype=np.int64),
    )


def _weeks(market: Market, wanted: Wanted, best: Candidate) -> Interval:
    """Availability of the trace's weeks, from the worst to the best."""
    weeks = [
        replayed(
            replace(market, capacity=market.capacity[at : at + _WEEK_STEPS]),
            wanted,
            best.zones,
            best.extra,
            best.base,
        ).availability
        for at in range(0, _STEPS, _WEEK_STEPS)
    ]
    return Interval(value=float(np.median(weeks)), low=min(weeks), high=max(weeks))


def _outlook(market: Market, wanted: Wanted, best: Candidate, interval: Interval) -> Outlook:
    run = replayed(market, wanted, best.zones, best.extra, best.base)
    return Outlook(
        basis="interruption bands, read as a common-shock generator",
        start="",
        span_s=0.0,
        step_s=0.0,
        availability=interval,
        promised=0.0,
        shortfall=run.shortfall,
        usd_per_hour=best.usd_per_hour,
        stand_ins_usd_per_hour=run.mean_on_demand * market.on_demand(best.zones),
        all_on_demand_usd_per_hour=wanted.replicas * market.all_on_demand,
        clairvoyant_usd_per_hour=0.0,
        preemptions_per_day=run.preemptions_per_day,
        independent_availability=0.0,
    )
