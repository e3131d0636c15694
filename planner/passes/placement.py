"""Fleet, offers, evidence of spot machines -> Placement: zones, spare replicas, on-demand floor, what is
promised.

With a trace of its machine, an online spot site is placed by replaying SkyServe's policy over it
(`planner/placing/`); with bands of interruptions, over synthetic traces; with neither, it follows rules: the
cheapest regions under price caps, one replica to spare, on-demand behind it, and no figure is promised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from moeplan.planner.cold_start import cold_start
from moeplan.planner.diagnostics import Diagnostic, InfeasibleError
from moeplan.planner.ir.fleet import Choice, Fleet
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.placement import Evidence, Outlook, Placement, Site, Zone
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.spot import Interruption, SpotTrace
from moeplan.planner.ir.workload import Workload
from moeplan.planner.spot_traces import covers
from moeplan.planner.units import format_duration

if TYPE_CHECKING:
    from moeplan.planner.placing.decide import Wanted
    from moeplan.planner.placing.site import Placed

_MOST_REGIONS = 5
# A dearer zone collects replicas that never move back: price caps cost 0.1-0.3 points of availability and
# save over a third of the bill (replays of H100 spot traces).
_PRICE_CAP_OF_CHEAPEST = 1.5
_PRICE_CAP_OF_ON_DEMAND = 0.4
_WEAKEST: tuple[Evidence, ...] = ("none", "statistics", "trace")


def place(
    spec: Spec,
    workload: Workload,
    fleet: Fleet,
    offers: Sequence[Offer],
    trace: SpotTrace | None = None,
    interruptions: Sequence[Interruption] = (),
    policies: Sequence[Policy] = (),
) -> Placement:
    """Return where each choice of the fleet runs; `policies` are all that could have been chosen.

    Raises InfeasibleError where the trace says that no placement keeps the availability or the spread that
    the spec asks for: it tells what can be reached, and for how much.
    """
    sites = []
    for choice in fleet.choices:
        site = _by_rules(workload, choice, offers)
        if site.market == "spot" and site.serves == "online":
            site = _by_evidence(spec, fleet, choice, site, offers, trace, interruptions)
            site = _hedged(site, choice, fleet, policies)
        sites.append(site)
    judged = [site.evidence for site in sites if site.on_demand_fallback]
    return Placement(
        sites=tuple(sites),
        evidence=min(judged, key=_WEAKEST.index, default="none"),
        availability_wanted=spec.market.availability,
        statement=_statement(spec, sites),
    )


def _by_rules(workload: Workload, choice: Choice, offers: Sequence[Offer]) -> Site:
    column = choice.column
    online_spot = column.market == "spot" and column.policy.serves == "online"
    return Site(
        column=column.name,
        serves=column.policy.serves,
        market=column.market,
        replicas=choice.replicas - choice.spare,
        zones=_regions(choice, offers),
        spot_overprovision=choice.spare,
        on_demand_base=0,
        on_demand_fallback=online_spot,
        cold_start_s=cold_start(workload, column.policy.machine).seconds,
    )


def _regions(choice: Choice, offers: Sequence[Offer]) -> tuple[Zone, ...]:
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


def _by_evidence(
    spec: Spec,
    fleet: Fleet,
    choice: Choice,
    rules: Site,
    offers: Sequence[Offer],
    trace: SpotTrace | None,
    interruptions: Sequence[Interruption],
) -> Site:
    """The site on the best evidence there is; as the rules have it where there is none."""
    if trace is None and not interruptions:
        return _ruled(spec, rules, ())
    from moeplan.planner.placing import site as sites  # takes Numba
    from moeplan.planner.placing.statistics import place_by_statistics

    machine = choice.column.policy.machine
    wanted = _wanted(spec, fleet, choice, rules)
    own = {(offer.cloud, offer.region): offer for offer in offers if offer.machine == machine.name}
    notes: tuple[str, ...] = ()
    if trace is not None:
        domain = spec.market.spread.over if spec.market.spread else None
        found = sites.zoned(trace, machine, own, domain) if covers(trace, machine) else None
        if found is not None:
            placed = sites.place_by_trace(found, trace, wanted)
            return _site(spec, rules, wanted, placed, "trace")
        notes = (
            f"the trace ({trace.instance or 'of no named machine'}) has no zone that sells {machine.name}",
        )
    over = spec.market.spread.over if spec.market.spread else "region"
    known = [row for row in interruptions if row.machine == machine.name and (row.cloud, row.region) in own]
    if known:
        placed = place_by_statistics(known, own, machine.name, wanted, over)
        return _site(spec, rules, wanted, placed, "statistics")
    if interruptions:
        notes += (f"no interruption band of {machine.name}",)
    return _ruled(spec, rules, notes)


def _wanted(spec: Spec, fleet: Fleet, choice: Choice, site: Site) -> Wanted:
    from moeplan.planner.placing.decide import Wanted
    from moeplan.planner.placing.site import floor_of, most_replicas

    machine = choice.column.policy.machine
    others = sum(
        c.replicas * c.column.policy.machine.gpus
        for c in fleet.choices
        if c is not choice and c.column.policy.machine.gpu == machine.gpu
    )
    spread = spec.market.spread
    return Wanted(
        replicas=site.replicas,
        cold_start_s=site.cold_start_s,
        availability=spec.market.availability,
        floor=floor_of(site.replicas, spread.floor if spread else None),
        most=most_replicas(spec.market.quota, others, machine),
    )


def _site(spec: Spec, rules: Site, wanted: Wanted, placed: Placed | None, evidence: Evidence) -> Site:
    """The site as placed. Raises InfeasibleError where it breaks what the spec asks for in so many words."""
    if placed is None:
        raise InfeasibleError(_no_spread(spec, wanted))
    if not placed.kept and evidence == "trace" and "market.availability" in spec.spans:
        raise InfeasibleError(_unreachable(spec, rules, wanted, placed))
    return Site(
        column=rules.column,
        serves=rules.serves,
        market=rules.market,
        replicas=rules.replicas,
        zones=placed.zones,
        spot_overprovision=placed.extra,
        on_demand_base=placed.base,
        on_demand_fallback=True,
        cold_start_s=rules.cold_start_s,
        evidence=evidence,
        outlook=placed.outlook,
        static=placed.static,
        notes=placed.notes,
    )


def _hedged(site: Site, choice: Choice, fleet: Fleet, policies: Sequence[Policy]) -> Site:
    """The site with a note on the cheapest backstop of another GPU type that serves the class by offloading.

    It is an option with its price, no part of the plan: SkyServe cannot mix replicas, and runtime_min has
    never run on a GPU.
    """
    own = choice.column.policy.machine.gpu
    others = tuple(
        f"{site.serves}-{re.sub('[^a-z0-9]+', '-', p.machine.name.lower()).strip('-')}-"
        for p in policies
        if p.machine.gpu != own and p.serves == site.serves and p.engine == "runtime_min"
    )
    backstops = [
        other
        for other in fleet.alternatives
        if other.column.startswith(others) and other.column.endswith("-offload")
    ]
    if not backstops or site.outlook is None:
        return site
    best = min(backstops, key=lambda other: (other.cost_usd, other.column))
    note = (
        f"a hedge that is not deployed: {best.replicas} × {best.column} would serve everything for "
        f"{best.cost_usd:.2f} USD/h (predicted only, runtime_min has never run on a GPU); on-demand "
        f"stand-ins are expected to cost {site.outlook.stand_ins_usd_per_hour:.2f} USD/h"
    )
    return replace(site, notes=(*site.notes, note))


def _ruled(spec: Spec, site: Site, notes: tuple[str, ...]) -> Site:
    """The rules' site; where the spec wants spread, only if its zones can have it."""
    spread = spec.market.spread
    if spread is None:
        return replace(site, notes=notes)
    regions = {zone.cloud if spread.over == "cloud" else f"{zone.cloud}/{zone.region}" for zone in site.zones}
    return replace(
        site,
        notes=(
            *notes,
            f"without evidence spread is not checked: there are {len(regions)} {spread.over}s to use",
        ),
    )


def _no_spread(spec: Spec, wanted: Wanted) -> Diagnostic:
    spread = spec.market.spread
    over = spread.over if spread else "zone"
    return Diagnostic(
        code="infeasible",
        span=spec.span("market.spread"),
        message=f"no zone list keeps {wanted.floor} of {wanted.replicas} replicas after the loss of a {over}",
        hint="allow more regions or clouds (and have them in the trace), lower `floor`, or raise the quota",
    )


def _unreachable(spec: Spec, site: Site, wanted: Wanted, placed: Placed) -> Diagnostic:
    """What can be reached with these zones and this quota, and what it costs."""
    outlook = placed.outlook
    reached = f"{_percent(placed.bound_availability)} for {outlook.usd_per_hour:.2f} USD/h"
    on_demand = f"{wanted.replicas} on-demand machines cost {outlook.all_on_demand_usd_per_hour:.2f} USD/h"
    quota = ", or raise the quota" if wanted.most < wanted.replicas + 2 else ""
    return Diagnostic(
        code="infeasible",
        span=spec.span("market.availability"),
        message=(
            f"no spot placement of {wanted.replicas} replicas keeps {_percent(wanted.availability)} on the "
            f"trace's days, cold starts of {format_duration(site.cold_start_s)}; {reached} can be reached"
        ),
        hint=f"ask for that, take `purchase: on-demand` ({on_demand}){quota}",
    )


def _statement(spec: Spec, sites: Sequence[Site]) -> str:
    spot = [site for site in sites if site.on_demand_fallback]
    wanted = _percent(spec.market.availability)
    if spot and all(site.outlook is None for site in spot):
        return (
            f"availability {wanted} is wanted; without spot traces none is promised: "
            "one spot replica is to spare and on-demand replicas stand in"
        )
    if spot:
        parts = [_outlook_text(site.outlook) for site in spot if site.outlook]
        parts += ["nothing is known of the other spot replicas"] * (len(parts) < len(spot))
        return f"availability {wanted} is wanted; {'; '.join(parts)}"
    if any(site.market == "spot" for site in sites):
        return "batch work on spot machines: a preempted job is started elsewhere and skips finished parts"
    return "no spot machines: availability is that of on-demand or owned machines"


def _outlook_text(outlook: Outlook) -> str:
    expected = outlook.availability
    text = (
        f"{_percent(expected.value)} is expected in a week "
        f"({_percent(expected.low)} to {_percent(expected.high)}), "
    )
    if outlook.promised:
        return f"{text}{_percent(outlook.promised)} is promised: {_age(outlook)}"
    if outlook.span_s:
        return f"{text}none is promised: {_age(outlook)}"
    return f"{text}none is promised: {outlook.basis}"


def _age(outlook: Outlook) -> str:
    begun = f" from {outlook.start}" if outlook.start else ""
    return (
        f"a trace of {format_duration(outlook.span_s)} in steps of {format_duration(outlook.step_s)}{begun}"
    )


def _percent(share: float) -> str:
    """A share as far as its nines go: 99.95 %, 97.3 %."""
    digits = 2 if share >= 0.99 else 1
    return f"{share * 100:.{digits}f}".rstrip("0").rstrip(".") + " %"
