"""Which machines and offers a spec allows."""

from __future__ import annotations

from dataclasses import replace

from moeplan.planner.diagnostics import CompileError, Diagnostic
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.machine import Machine, Offer
from moeplan.planner.ir.spec import Spec
from moeplan.planner.spot_traces import covers
from moeplan.planner.suggest import nearest


def candidate_offers(spec: Spec, inputs: Inputs) -> tuple[Offer, ...]:
    """The catalog's offers within the market; none for a pinned machine, which is the user's own.

    Raises CompileError for GPUs, machines and regions that the catalog has no offer for.
    """
    market, machines = spec.market, inputs.catalog.machines
    if inputs.machine is not None:
        return ()
    _require_known(spec, inputs)
    allowed = (
        offer
        for offer in inputs.catalog.offers
        if (not market.clouds or offer.cloud in market.clouds)
        and (not market.regions or f"{offer.cloud}/{offer.region}" in market.regions)
        and (not market.gpus or machines[offer.machine].gpu in market.gpus)
        and (not market.machines or offer.machine in market.machines)
    )
    return tuple(_traced(offer, inputs) for offer in allowed)


def _traced(offer: Offer, inputs: Inputs) -> Offer:
    """The offer, without its spot price where a trace of its machine knows nothing of its region."""
    trace = inputs.spot_trace
    if trace is None or not covers(trace, inputs.catalog.machines[offer.machine]):
        return offer
    if any((zone.cloud, zone.region) == (offer.cloud, offer.region) for zone in trace.zones):
        return offer
    return replace(offer, spot_usd_per_hour=None)


def _require_known(spec: Spec, inputs: Inputs) -> None:
    offers = inputs.catalog.offers
    gpus = {inputs.catalog.machines[offer.machine].gpu for offer in offers}
    regions = {f"{offer.cloud}/{offer.region}" for offer in offers}
    machines = {offer.machine for offer in offers}
    asked = [
        *(("machine", f"market.machines.{i}", m, machines) for i, m in enumerate(spec.market.machines)),
        *(("gpu", f"market.gpus.{i}", name, gpus) for i, name in enumerate(spec.market.gpus)),
        *(("gpu", f"market.quota.{name}", name, gpus) for name in spec.market.quota),
        *(("region", f"market.regions.{i}", name, regions) for i, name in enumerate(spec.market.regions)),
    ]
    problems = [
        Diagnostic(
            code=f"unknown-{kind}",
            span=spec.span(key),
            message=f"the catalog has no offer for {kind} {name!r}",
            hint=nearest(name, known, "`moeplan catalog offers` lists them"),
        )
        for kind, key, name, known in asked
        if name not in known
    ]
    if problems:
        raise CompileError(*problems)


def candidate_machines(spec: Spec, inputs: Inputs, offers: tuple[Offer, ...]) -> tuple[Machine, ...]:
    """The pinned machine, or every machine that is on offer, by name."""
    if inputs.machine is not None:
        return (inputs.machine,)
    return tuple(inputs.catalog.machines[name] for name in sorted({offer.machine for offer in offers}))
