"""Plan -> skypilot/*.yaml: one service per online replica type, one managed job per batch replica type.

Every file was shaped by what SkyPilot 0.14 accepts: region-level `infra`, a scalar target QPS, and one
accelerator per file, because its spot placer refuses mixtures.
"""

from __future__ import annotations

import math
from typing import Any

from moeplan.codegen.render import render
from moeplan.codegen.vllm import vllm_arguments
from moeplan.planner.ir.fleet import Choice
from moeplan.planner.ir.placement import Site
from moeplan.planner.ir.plan import Plan

_READINESS_MARGIN = 1.5  # cold starts vary; a probe that gives up early kills healthy replicas
_PORT = 8000


def emit(plan: Plan) -> dict[str, str]:
    """Return one file per rented column under vLLM.

    Nothing for machines that the user owns, and nothing for offloaded replicas: runtime_min does not
    execute accelerator plans yet, and a job that cannot run is worse than none.
    """
    files: dict[str, str] = {}
    for choice, site in zip(plan.fleet.choices, plan.placement.sites, strict=True):
        if site.market == "owned" or choice.column.policy.engine != "vllm":
            continue
        kind = "service" if site.serves == "online" else "job"
        name = plan.spec.name if len(plan.fleet.choices) == 1 else f"{plan.spec.name}-{len(files) + 1}"
        files[f"skypilot/{site.column}.yaml"] = render(
            f"skypilot/{kind}.yaml.j2", name=name, **_values(plan, choice, site)
        )
    return files


def _values(plan: Plan, choice: Choice, site: Site) -> dict[str, Any]:
    policy = choice.column.policy
    machine = policy.machine
    return {
        "column": site.column,
        "gpu": machine.gpu,
        "gpus": machine.gpus,
        "instance": machine.name,
        "cloud": choice.column.cloud,
        "zones": site.zones,
        "spot": site.market == "spot",
        "replicas": site.replicas,
        "overprovision": site.spot_overprovision,
        "base": site.on_demand_base,
        "fallback": site.on_demand_fallback,
        "readiness_s": math.ceil(site.cold_start_s * _READINESS_MARGIN / 60) * 60,
        "qps": _target_qps(plan, choice, site),
        "disk_gb": math.ceil(plan.workload.model.weight_bytes() * 1.2 / 1e9) + 100,
        "port": _PORT,
        "vllm": vllm_arguments(plan, policy),
    }


def _target_qps(plan: Plan, choice: Choice, site: Site) -> float:
    """Requests per second that one replica is planned to take."""
    requests = plan.workload.request_class(site.serves)
    routed = sum(
        route.share * requests.buckets[route.bucket].share
        for route in plan.fleet.routes
        if (route.column, route.serves) == (choice.column.name, site.serves)
    )
    return float(format(requests.rate_per_s * routed / site.replicas, ".4g")) if requests.rate_per_s else 0.0
