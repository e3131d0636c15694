"""Policies and offers -> columns: what could be bought, and why nothing can."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from moeplan.planner.diagnostics import Diagnostic, InfeasibleError
from moeplan.planner.ir.fleet import Column, Market
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.policy import Policy, Rejection
from moeplan.planner.ir.spec import MarketSpec, Purchase, Spec
from moeplan.planner.ir.workload import Workload

_MOST_REGIONS = 3  # of one machine in one market, where regions matter


def find_columns(policies: Sequence[Policy], offers: Sequence[Offer], market: MarketSpec) -> list[Column]:
    """Each policy in each market that sells its machine, sorted by name.

    At the cheapest region; where online work must survive the loss of one, in each of the cheapest few.
    """
    columns = []
    for policy in policies:
        own = [offer for offer in offers if offer.machine == policy.machine.name]
        if not own:
            columns.append(_column(policy, "owned", None, 0.0, ""))
        spread = bool(market.survive) and policy.serves == "online"
        for kind in _MARKETS[market.purchase]:
            for price, offer in _cheapest(own, kind, _MOST_REGIONS if spread else 1):
                region = f"{offer.cloud}/{offer.region}" if spread else ""
                columns.append(_column(policy, kind, offer, price, region))
    return _distinct(sorted(columns, key=lambda column: (column.name, column.policy.machine.name)))


_MARKETS: Mapping[Purchase, tuple[Market, ...]] = {
    "any": ("on-demand", "spot"),
    "on-demand": ("on-demand",),
    "spot": ("spot",),
}


def _cheapest(offers: Sequence[Offer], kind: Market, most: int) -> list[tuple[float, Offer]]:
    """The prices of the cheapest offers of one kind, one per region."""
    priced = [(o.spot_usd_per_hour if kind == "spot" else o.on_demand_usd_per_hour, o) for o in offers]
    sold = sorted(
        ((price, offer) for price, offer in priced if price is not None),
        key=lambda item: (item[0], item[1].region, item[1].cloud),
    )
    return sold[:most]


def _distinct(columns: list[Column]) -> list[Column]:
    """Names become files: machines whose names differ in punctuation only get a number."""
    used: Counter[str] = Counter()
    named = []
    for column in columns:
        used[column.name] += 1
        again = used[column.name] > 1
        named.append(replace(column, name=f"{column.name}-{used[column.name]}") if again else column)
    return named


def _column(policy: Policy, market: Market, offer: Offer | None, price: float, region: str) -> Column:
    parts = [policy.serves, re.sub("[^a-z0-9]+", "-", policy.machine.name.lower()).strip("-"), market]
    if policy.engine == "runtime_min" and policy.gpus:
        parts.append("offload")
    if region:
        parts.append(region.replace("/", "-"))
    return Column(
        name="-".join(parts),
        policy=policy,
        market=market,
        cloud=offer.cloud if offer else "",
        usd_per_hour=price,
        region=region,
    )


def require_columns(
    spec: Spec,
    workload: Workload,
    policies: Sequence[Policy],
    columns: Sequence[Column],
    rejections: Sequence[Rejection],
) -> None:
    """Every class needs a column; otherwise say why each machine was refused, nearest miss first."""
    problems = []
    if spec.machine and len(workload.classes) > 1:
        message = "one machine is planned for one kind of work"
        hint = "write two specs, one for the batch and one for the online work"
        span = spec.span("machine")
        raise InfeasibleError(Diagnostic(code="two-classes", span=span, message=message, hint=hint))
    for requests in workload.classes:
        if any(column.policy.serves == requests.name for column in columns):
            continue
        why = [r for r in rejections if r.serves == requests.name]
        if able := sorted({p.machine.name for p in policies if p.serves == requests.name}):
            message = f"{able[0]} could do the {requests.name} work, but has no {spec.market.purchase} offer"
            hint = "allow the other purchase kind, or more regions"
            problems.append(Diagnostic(code="no-offer", span=spec.span("market"), message=message, hint=hint))
            continue
        span = spec.span("machine" if spec.machine else f"workload.{requests.name}")
        if not why:
            problems.append(
                Diagnostic(
                    code="no-machine",
                    span=spec.span("market"),
                    message=f"the market offers no machine for the {requests.name} work",
                    hint="allow more clouds, regions, GPUs or both purchase kinds; `moeplan catalog offers`",
                )
            )
        for reason in _telling(why):
            problems.append(
                Diagnostic(
                    code="infeasible",
                    span=span,
                    message=f"{reason.machine}: {reason.message} ({reason.constraint})",
                    hint=reason.hint,
                )
            )
    if problems:
        raise InfeasibleError(*problems)


def _telling(rejections: Sequence[Rejection]) -> list[Rejection]:
    """At most three refusals, each for another constraint, the nearest miss of each."""
    seen: dict[str, Rejection] = {}
    for rejection in sorted(rejections, key=lambda r: (r.excess, r.machine)):
        seen.setdefault(rejection.constraint, rejection)
    return list(seen.values())[:3]
