"""Fleet, offers -> Placement: regions by price, spot with one replica to spare and on-demand behind it.

This version has no market evidence, so it follows SkyServe's rules (EuroSys'25) and promises no figure.
"""

from __future__ import annotations

from collections.abc import Sequence

from moeplan.planner import costs
from moeplan.planner.ir.fleet import Choice, Fleet
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.placement import Placement, Site, Zone
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import Workload

_MOST_REGIONS = 5
# A dearer zone collects replicas that never move back: price caps cost 0.1-0.3 points of availability and
# save over a third of the bill (replays of H100 spot traces).
_PRICE_CAP_OF_CHEAPEST = 1.5
_PRICE_CAP_OF_ON_DEMAND = 0.4


def place(spec: Spec, workload: Workload, fleet: Fleet, offers: Sequence[Offer]) -> Placement:
    """Return where each choice of the fleet runs."""
    sites = tuple(_site(workload, choice, offers) for choice in fleet.choices)
    return Placement(
        sites=sites,
        evidence="none",
        availability_wanted=spec.market.availability,
        statement=_statement(spec, sites),
    )


def _statement(spec: Spec, sites: Sequence[Site]) -> str:
    if any(site.on_demand_fallback for site in sites):
        return (
            f"availability {spec.market.availability:.4g} is wanted; without spot traces none is promised: "
            "one spot replica is to spare and on-demand replicas stand in"
        )
    if any(site.market == "spot" for site in sites):
        return "batch work on spot machines: a preempted job is started again elsewhere, from its beginning"
    return "no spot machines: availability is that of on-demand or owned machines"


def _site(workload: Workload, choice: Choice, offers: Sequence[Offer]) -> Site:
    column = choice.column
    online_spot = column.market == "spot" and column.policy.serves == "online"
    return Site(
        column=column.name,
        serves=column.policy.serves,
        market=column.market,
        replicas=choice.replicas - choice.spare,
        zones=_zones(choice, offers),
        spot_overprovision=choice.spare,
        on_demand_base=0,
        on_demand_fallback=online_spot,
        cold_start_s=costs.cold_start_s(workload),
    )


def _zones(choice: Choice, offers: Sequence[Offer]) -> tuple[Zone, ...]:
    """The cheapest regions: several for spot, under the price caps; one for on-demand."""
    market, machine = choice.column.market, choice.column.policy.machine.name
    if market == "owned":
        return ()
    zones = []
    for offer in offers:
        price = offer.spot_usd_per_hour if market == "spot" else offer.on_demand_usd_per_hour
        here = choice.column.region in ("", f"{offer.cloud}/{offer.region}")
        if offer.machine == machine and here and price is not None:
            zones.append(
                Zone(
                    cloud=offer.cloud,
                    region=offer.region,
                    usd_per_hour=price,
                    on_demand_usd_per_hour=offer.on_demand_usd_per_hour,
                )
            )
    zones.sort(key=lambda zone: (zone.usd_per_hour, zone.cloud, zone.region))
    if market == "on-demand":
        return tuple(zones[:1])
    cheapest = zones[0].usd_per_hour
    return tuple(
        zone
        for zone in zones[:_MOST_REGIONS]
        if zone.usd_per_hour <= cheapest * _PRICE_CAP_OF_CHEAPEST
        or zone.usd_per_hour <= zone.on_demand_usd_per_hour * _PRICE_CAP_OF_ON_DEMAND
    )
