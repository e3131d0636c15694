"""Plan -> groups of equal replicas, each in one place: what plain orchestrators start."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from moeplan.codegen.packing import packing_of
from moeplan.codegen.vllm import VERSION, vllm_arguments
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.placement import Site, Zone
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.spec import Cloud

PORT = 8000
_GRACE = 1.5  # cold starts vary; a check that gives up early kills healthy replicas


def engine_image(plan: Plan) -> str:
    """The image that vLLM runs from: the spec's, or vLLM's own of the pinned version. Never pulled here."""
    return plan.spec.image or f"vllm/vllm-openai:v{VERSION}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaGroup:
    """Online replicas of one column under vLLM, in one zone; no `zone`: anywhere in the region.

    `grace_s` is how long a start may take.
    """

    name: str
    policy: Policy
    cloud: Cloud
    region: str
    zone: str
    spot: int
    on_demand: int
    grace_s: int


def replica_groups(plan: Plan) -> tuple[ReplicaGroup, ...]:
    """The groups of every rented column that serves online requests under vLLM.

    Batch work ends, and machines of a group do not: that is for managed jobs. Offloaded replicas have no
    runtime on rented machines yet.
    """
    return tuple(
        ReplicaGroup(
            name=short_name(f"{site.column}-{zone.zone or zone.region}", 52),
            policy=choice.column.policy,
            cloud=zone.cloud,
            region=zone.region,
            zone=zone.zone,
            spot=spot,
            on_demand=on_demand,
            grace_s=grace_s(site),
        )
        for choice, site in zip(plan.fleet.choices, plan.placement.sites, strict=True)
        if site.serves == "online" and choice.column.policy.engine == "vllm"
        for zone, spot, on_demand in _spread(site)
    )


def _spread(site: Site) -> Iterator[tuple[Zone, int, int]]:
    """Each zone that gets replicas, with its spot and on-demand ones.

    The plan's targets; where it has none, for want of evidence, dealt out evenly, cheapest first.
    """
    if site.static:
        fixed = [(zone, zone.spot_target, zone.on_demand_target) for zone in site.zones]
        yield from ((zone, spot, on_demand) for zone, spot, on_demand in fixed if spot or on_demand)
        return
    on_demand = site.replicas if site.market == "on-demand" else site.on_demand_base
    spot = site.replicas - on_demand + site.spot_overprovision
    zones = len(site.zones)
    for place, zone in enumerate(site.zones):
        counts = [total // zones + (place < total % zones) for total in (spot, on_demand)]
        if any(counts):
            yield zone, counts[0], counts[1]


def serve_arguments(plan: Plan, policy: Policy) -> list[str]:
    """What follows `vllm serve MODEL`, word by word."""
    return shlex.split(" ".join(vllm_arguments(plan, policy)))


def grace_s(site: Site) -> int:
    """How long a replica may take to its first answer, in whole minutes."""
    return math.ceil(site.cold_start_s * _GRACE / 60) * 60


def disk_gb(plan: Plan) -> int:
    """Room for the weights, twice where they are packed there, a fifth more, and an image of a system and an
    engine."""
    copies = 1 + any(packing_of(choice.column.policy) for choice in plan.fleet.choices)
    return math.ceil(plan.workload.model.weight_bytes() * copies * 1.2 / 1e9) + 100


def google_machine_type(machine: Machine) -> str:
    """Without the accelerators: `n1-standard-8` of `n1-standard-8+2xT4`."""
    return machine.name.partition("+")[0]


def google_accelerator(machine: Machine) -> str:
    """What is attached to the machine type: Tesla cards to the N1 family; empty where GPUs are built in."""
    return f"nvidia-tesla-{machine.gpu.lower()}" if "+" in machine.name else ""


def short_name(name: str, longest: int) -> str:
    """`name`, its end replaced by a digest where it is longer than `longest`."""
    if len(name) <= longest:
        return name
    return f"{name[: longest - 7].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def letter_first(name: str) -> str:
    """`name` where it begins with a letter, as clouds want it."""
    return name if name[:1].isalpha() else f"p-{name}"
