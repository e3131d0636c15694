"""Plan -> what it costs in words: what is deployed, the bill expected, what was solved for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moeplan.codegen.placement import bill_lines
from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.fleet import Choice
from moeplan.planner.ir.placement import Site
from moeplan.planner.ir.plan import Plan


def deployed(site: Site) -> int:
    """Replicas of a site and those to spare; where a trace placed it, not as many as were solved for."""
    return site.replicas + site.spot_overprovision


def deployed_usd_per_hour(plan: Plan) -> float:
    """What all that is deployed costs in the cheapest place of each column."""
    return sum(deployed(site) * choice.column.usd_per_hour for choice, site in _both(plan))


def cost_lines(plan: Plan) -> list[str]:
    """The deployed machines' price, the bill that is expected of each site with evidence, and what was solved
    where it is not what is deployed. Nothing where the machine is the user's own."""
    if not plan.fleet.usd_per_hour:
        return []
    lines = [f"{deployed_usd_per_hour(plan):.2f} USD/h {price_note(plan)}"]
    lines += [line for site in plan.placement.sites for line in bill_lines(site)]
    if any(deployed(site) != choice.replicas for choice, site in _both(plan)):
        solved = " and ".join(f"{c.replicas} × {c.column.name}" for c in plan.fleet.choices)
        lines.append(
            f"{plan.fleet.usd_per_hour:.2f} USD/h as solved ({solved}, spot replicas to spare included); "
            "how many are deployed was then decided on the evidence of the zones"
        )
    return lines


def price_note(plan: Plan) -> str:
    """On what condition the deployed machines cost what is said."""
    dearest = sum(deployed(site) * _dearest(choice, site) for choice, site in _both(plan))
    if dearest < deployed_usd_per_hour(plan) + 0.005:
        return "while everything runs"
    return f"while everything runs, if all ran in the cheapest place; {dearest:.2f} in the dearest listed"


def token_prices(plan: Plan) -> Iterator[tuple[str, Estimate, str]]:
    """(class, USD per million generated tokens, of which bill): for online work the expected one where every
    site of it has one."""
    for serves, price in plan.fleet.usd_per_million_tokens:
        own = [(c, site) for c, site in _both(plan) if c.column.policy.serves == serves]
        if serves == "batch":
            yield serves, price, "of the batch work's own bill"
            continue
        solved = sum(choice.replicas * choice.column.usd_per_hour for choice, _ in own)
        bills = [site.outlook.usd_per_hour for _, site in own if site.outlook]
        if solved and len(bills) == len(own):
            expected = replace(price, value=price.value * sum(bills) / solved)
            yield serves, expected, "of the expected bill, at the spec's rate"
        else:
            count = sum(deployed(site) * choice.column.usd_per_hour for choice, site in own)
            where = "in the cheapest place, " if "cheapest" in price_note(plan) else ""
            value = price.value * count / solved if solved else price.value
            yield serves, replace(price, value=value), f"of the machines deployed, {where}at the spec's rate"


def _both(plan: Plan) -> Iterator[tuple[Choice, Site]]:
    return zip(plan.fleet.choices, plan.placement.sites, strict=True)


def _dearest(choice: Choice, site: Site) -> float:
    """What one machine costs at most where the site may run, stand-ins aside."""
    return max((choice.column.usd_per_hour, *(zone.usd_per_hour for zone in site.zones)))
