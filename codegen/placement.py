"""A site of a plan -> what report and summary say of it."""

from __future__ import annotations

from typing import Any

from moeplan.planner.ir.placement import Outlook, Site, Zone
from moeplan.planner.units import format_duration


def site_lines(site: Site) -> dict[str, Any]:
    """Rule, zones, figures and notes of one spot site, as text."""
    return {
        "name": site.column,
        "place": _place(site),
        "rule": _rule(site),
        "zones": [_zone(zone, fixed=site.static is not None) for zone in site.zones],
        "figures": _figures(site, site.outlook) if site.outlook else [],
        "notes": site.notes,
    }


def bill_lines(site: Site) -> list[str]:
    """The bill that is expected, beside that of on-demand machines."""
    outlook = site.outlook
    if outlook is None:
        return []
    share = outlook.usd_per_hour / outlook.all_on_demand_usd_per_hour
    zones = f"{len(site.zones)} {_place(site)}{'s' * (len(site.zones) > 1)}"
    return [
        f"{site.column}: {outlook.usd_per_hour:.2f} USD/h expected over {zones}, {share:.0%} of on-demand, "
        f"{outlook.preemptions_per_day:.2g} preemptions a day"
    ]


def _place(site: Site) -> str:
    """What the site's places are: zones where any is known, else whole regions."""
    return "zone" if any(zone.zone for zone in site.zones) else "region"


def _rule(site: Site) -> str:
    if not site.on_demand_fallback:
        return "A preempted job is started again in the next zone of the list"
    base = f", {site.on_demand_base} of them always on-demand" * bool(site.on_demand_base)
    return (
        f"SkyServe keeps {site.replicas} + {site.spot_overprovision} replicas on spot{base}; on-demand "
        f"machines stand in while spot is short. A cold start takes {format_duration(site.cold_start_s)}"
    )


def _zone(zone: Zone, fixed: bool) -> dict[str, str]:
    name = f"{zone.cloud}/{zone.region}" + (f"/{zone.zone}" if zone.zone else "")
    return {
        "name": name,
        "spot": f"{zone.usd_per_hour:.4g}",
        "on_demand": f"{zone.on_demand_usd_per_hour:.4g}",
        "spot_target": str(zone.spot_target) if fixed else "–",
        "on_demand_target": str(zone.on_demand_target) if fixed else "–",
    }


def _figures(site: Site, outlook: Outlook) -> list[tuple[str, str]]:
    expected = outlook.availability
    bill, on_demand = outlook.usd_per_hour, outlook.all_on_demand_usd_per_hour
    rows = [
        ("evidence", _evidence(outlook)),
        ("enough replicas ready, share of a week", _interval(expected.value, expected.low, expected.high)),
        ("promised", _percent(outlook.promised) if outlook.promised else "nothing: the evidence is too thin"),
        ("replicas missing, mean share", _percent(outlook.shortfall)),
        ("bill", f"{bill:.2f} USD/h, {bill / on_demand:.0%} of {on_demand:.2f} USD/h on-demand"),
        ("of which on-demand stand-ins", f"{outlook.stand_ins_usd_per_hour:.2f} USD/h"),
        ("preemptions", f"{outlook.preemptions_per_day:.2g} a day"),
    ]
    if outlook.clairvoyant_usd_per_hour:
        gap = (bill - outlook.clairvoyant_usd_per_hour) / on_demand
        least = f"{outlook.clairvoyant_usd_per_hour:.2f} USD/h"
        rows.append(
            ("gap to clairvoyant", f"{gap * 100:.1f} points of on-demand: {least} is the least possible")
        )
    if outlook.independent_availability:
        rows.append(
            ("if zones were independent", f"{_percent(outlook.independent_availability)} would be ready")
        )
    if site.static:
        fixed = site.static
        rows.append(
            (
                "fixed targets, without SkyServe",
                f"{fixed.usd_per_hour:.2f} USD/h, {_percent(fixed.shortfall)} missing in the worst 5 %",
            )
        )
    return rows


def _evidence(outlook: Outlook) -> str:
    if not outlook.span_s:
        return outlook.basis
    begun = f" from {outlook.start}" if outlook.start else ""
    age = f"{format_duration(outlook.span_s)} in steps of {format_duration(outlook.step_s)}{begun}"
    return f"trace, {age} ({outlook.basis})"


def _interval(value: float, low: float, high: float) -> str:
    return f"{_percent(value)} ({_percent(low)} to {_percent(high)})"


def _percent(share: float) -> str:
    return f"{share * 100:.2f}".rstrip("0").rstrip(".") + " %"
