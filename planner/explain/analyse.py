"""Plan -> Analysis: what surrounds the plan, for the report's charts."""

from __future__ import annotations

from moeplan.planner.explain.batches import batch_points
from moeplan.planner.explain.case import Case, Held, holding
from moeplan.planner.explain.decisions import decisions
from moeplan.planner.explain.frontier import frontiers
from moeplan.planner.explain.operators import operator_points, reached_roofline, with_own_turns
from moeplan.planner.explain.timeline import timelines
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.analysis import Analysis, Frontier, ReplicaAnalysis, Source
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.workload import Workload

_LARGEST = 4  # times the chosen batch
_HALVINGS = 7


def analyse(plan: Plan, inputs: Inputs) -> Analysis:
    """Return what is beside `plan`, compiled from `inputs`."""
    held = holding(Case(spec=plan.spec, inputs=inputs)) if plan.fleet.usd_per_hour else ()
    return Analysis(
        decisions=decisions(plan, inputs, held),
        replicas=tuple(_replica(plan.workload, replica) for replica in plan.replicas),
        frontiers=_frontiers(plan, inputs, held),
        timelines=timelines(plan, inputs),
        sources=_sources(plan, inputs),
    )


def _replica(workload: Workload, replica: Replica) -> ReplicaAnalysis:
    n = replica.policy.sequences
    sizes = {max(1, round(n * _LARGEST / 2**k)) for k in range(_HALVINGS + 3)} | {n}
    operators = operator_points(workload, replica)
    return ReplicaAnalysis(
        name=replica.name,
        batches=batch_points(workload, replica, sorted(sizes)),
        operators=operators,
        roofline=with_own_turns(replica, reached_roofline(replica), operators),
    )


def _frontiers(plan: Plan, inputs: Inputs, held: Held) -> tuple[Frontier, ...]:
    """Of rented fleets that serve online work from GPU memory, where a fleet is found quickly."""
    online = [requests for requests in plan.workload.classes if requests.name == "online"]
    in_memory = all(replica.policy.engine == "vllm" for replica in plan.replicas)
    if not online or len(plan.workload.classes) > 1 or not plan.fleet.usd_per_hour or not in_memory:
        return ()
    return frontiers(Case(spec=plan.spec, inputs=inputs), plan.fleet, online[0], held)


def _sources(plan: Plan, inputs: Inputs) -> tuple[Source, ...]:
    """The model, each chosen machine and each price, with their citations."""
    model = plan.workload.model
    found = [Source(what=f"model {model.name}", citation=_cited(model.source, inputs))]
    for replica in plan.replicas:
        machine = replica.policy.machine
        found.append(Source(what=f"machine {machine.name}", citation=_cited(machine.source, inputs)))
    for choice, site in zip(plan.fleet.choices, plan.placement.sites, strict=True):
        places = {(zone.cloud, zone.region) for zone in site.zones}
        for offer in inputs.catalog.offers:
            if offer.machine == choice.column.policy.machine.name and (offer.cloud, offer.region) in places:
                found.append(Source(what=_priced(offer), citation=f"{offer.source}, {offer.date}"))
    return tuple(dict.fromkeys(found))


def _priced(offer: Offer) -> str:
    return f"price of {offer.machine} in {offer.cloud}/{offer.region}"


def _cited(source: str, inputs: Inputs) -> str:
    """The citations behind the keys of a source; a machine file's source is its own text."""
    known = inputs.catalog.sources
    keys = [key.strip() for key in source.split(",")]
    return "; ".join(known.get(key, key) for key in keys)
