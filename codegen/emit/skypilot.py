"""Plan -> skypilot/*.yaml: one service per online replica type, one managed job per batch replica type.

Every file is shaped by what SkyPilot 0.14 accepts and survives: a scalar target QPS, one accelerator per file
(its spot placer refuses mixtures), no network tier, container images in `run` rather than `image_id`. Text of
the spec and the catalog reaches scripts as environment variables only, never as script.
"""

from __future__ import annotations

import math
from typing import Any

from moeplan.codegen.emit.report import caution, why_unrun
from moeplan.codegen.groups import PORT, disk_gb, grace_s
from moeplan.codegen.packing import packing_of
from moeplan.codegen.render import render
from moeplan.codegen.vllm import VERSION, vllm_arguments
from moeplan.planner.ir.fleet import Choice
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.placement import Site, Zone
from moeplan.planner.ir.plan import Plan

_MEMORY_SHARE = 0.9
_NOTICE_S = 5  # between two looks at the metadata service; clouds give 30 to 120 seconds
_PARTS_PER_HOUR = 1  # of vLLM's work: what a preemption loses at most, against starting it once per part
_GPU_NAMES = {"H100-NVL": "H100"}  # where SkyPilot's catalog has another name


def emit(plan: Plan) -> dict[str, str]:
    """Return one file per rented column that an engine can run; nothing for machines that the user owns."""
    files: dict[str, str] = {}
    for choice, site in zip(plan.fleet.choices, plan.placement.sites, strict=True):
        if template := _template(plan, choice, site):
            name = plan.spec.name if len(plan.fleet.choices) == 1 else f"{plan.spec.name}-{len(files) + 1}"
            files[f"skypilot/{site.column}.yaml"] = render(
                f"skypilot/{template}", name=_name(name), **_values(plan, choice, site)
            )
    return files


def _template(plan: Plan, choice: Choice, site: Site) -> str:
    """Which template deploys a site; empty where SkyPilot has nothing to do or nothing could run."""
    engine = choice.column.policy.engine
    if site.market == "owned" or (engine == "runtime_min" and why_unrun(plan, choice.column.policy)):
        return ""
    if site.serves == "online":  # runtime_min answers files, not requests
        return "service.yaml.j2" if engine == "vllm" else ""
    return "job.yaml.j2"


def _name(name: str) -> str:
    """A name that SkyPilot takes: it begins with a letter."""
    return name if name[:1].isalpha() else f"moe-{name}"


def _values(plan: Plan, choice: Choice, site: Site) -> dict[str, Any]:
    policy = choice.column.policy
    machine = policy.machine
    placed = site.market == "spot" and site.serves == "online"  # by SkyServe's spot placer
    return {
        "column": site.column,
        "caution": caution(policy),
        "accelerators": f"{_GPU_NAMES.get(machine.gpu, machine.gpu)}:{machine.gpus}" if machine.gpus else "",
        "instance": machine.name.partition("+")[0],  # n1-standard-8+1xT4 is an n1-standard-8 with a T4
        "memory_gb": _memory_gb(machine) if placed else "",
        "cloud": choice.column.cloud,
        "infra": tuple(dict.fromkeys(_infra(zone) for zone in site.zones)),
        "spot": site.market == "spot",
        "replicas": site.replicas,
        "overprovision": site.spot_overprovision,
        "base": site.on_demand_base,
        "fallback": site.on_demand_fallback,
        "readiness_s": grace_s(site),
        "qps": _target_qps(plan, choice, site) if site.serves == "online" else 0.0,
        "parts": _parts(choice) * site.replicas,
        "disk_gb": disk_gb(plan),
        "port": PORT,
        "notice_s": _NOTICE_S,
        "image": plan.spec.image,
        "packing": packing_of(policy),
        "version": VERSION,
        "vllm": vllm_arguments(plan, policy) if policy.engine == "vllm" else (),
    }


def _memory_gb(machine: Machine) -> str:
    """What picks the machine type where none may be named: the spot placer fails on `instance_type`.

    SkyPilot takes the cheapest type that has the GPUs and this much. Types of one GPU differ by factors of 2,
    sources on one type's GiB by a few percent.
    """
    return f"{math.floor(_MEMORY_SHARE * machine.level('dram').bytes / 2**30)}+"


def _parts(choice: Choice) -> int:
    """Parts of one machine's work; runtime_min goes on within a part, and works best on all at once."""
    if choice.column.policy.engine == "runtime_min":
        return 1
    return max(1, math.ceil(choice.hours * _PARTS_PER_HOUR))


def _infra(zone: Zone) -> str:
    """SkyPilot's name of a place. AWS's zone names differ from account to account, and Azure's are unknown to
    it: there, the region."""
    region = f"{zone.cloud}/{zone.region}"
    return f"{region}/{zone.zone}" if zone.zone and zone.cloud == "gcp" else region


def _target_qps(plan: Plan, choice: Choice, site: Site) -> float:
    """Requests per second of one replica that is as full as the plan allows."""
    requests = plan.workload.request_class(site.serves)
    routed = sum(
        route.share * requests.buckets[route.bucket].share
        for route in plan.fleet.routes
        if (route.column, route.serves) == (choice.column.name, site.serves)
    )
    fullest = plan.fleet.target_utilisation / choice.utilisation if choice.utilisation else 1.0
    return float(format(requests.rate_per_s * routed / site.replicas * max(1.0, fullest), ".4g"))
