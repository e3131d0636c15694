"""Plan -> kubernetes/*.yaml: for each place, a Deployment per market and one Service over them."""

from __future__ import annotations

import math
from typing import Any

from moeplan.codegen.groups import (
    PORT,
    ReplicaGroup,
    disk_gb,
    engine_image,
    google_accelerator,
    google_machine_type,
    letter_first,
    replica_groups,
    serve_arguments,
)
from moeplan.codegen.render import render
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.spec import Cloud

_CHECK_S = 10
# The labels that EKS, GKE and AKS put on spot nodes; AKS taints them as well.
_SPOT: dict[Cloud, dict[str, str]] = {
    "aws": {"eks.amazonaws.com/capacityType": "SPOT"},
    "gcp": {"cloud.google.com/gke-spot": "true"},
    "azure": {"kubernetes.azure.com/scalesetpriority": "spot"},
}
_ON_DEMAND: dict[Cloud, dict[str, str]] = {
    "aws": {"eks.amazonaws.com/capacityType": "ON_DEMAND"},
    "gcp": {},
    "azure": {},
}


def emit(plan: Plan) -> dict[str, str]:
    """Return one file per group of online replicas on rented machines."""
    return {f"kubernetes/{group.name}.yaml": _text(plan, group) for group in replica_groups(plan)}


def _text(plan: Plan, group: ReplicaGroup) -> str:
    policy = group.policy
    return render(
        "kubernetes/replicas.yaml.j2",
        plan=plan.spec.name,
        model=f"{letter_first(plan.spec.name)}-model",
        file=f"{group.name}.yaml",
        region=group.region,
        service=group.name,
        deployments=_deployments(group),
        image=engine_image(plan),
        arguments=serve_arguments(plan, policy),
        gpus=policy.gpus * policy.data_parallel,
        port=PORT,
        start_checks=math.ceil(group.grace_s / _CHECK_S),
        disk_gb=disk_gb(plan),
    )


def _deployments(group: ReplicaGroup) -> list[dict[str, Any]]:
    """Spot and on-demand replicas run on different nodes."""
    return [
        {
            "name": f"{group.name}-{market}",
            "replicas": replicas,
            "selector": {**_place(group), **labels[group.cloud]},
            "taints": labels[group.cloud] if group.cloud == "azure" else {},
        }
        for market, replicas, labels in (
            ("spot", group.spot, _SPOT),
            ("on-demand", group.on_demand, _ON_DEMAND),
        )
        if replicas
    ]


def _place(group: ReplicaGroup) -> dict[str, str]:
    """The labels of nodes of the group's machine type in its zone or region."""
    machine = group.policy.machine
    labels = {"node.kubernetes.io/instance-type": machine.name, "topology.kubernetes.io/region": group.region}
    if group.cloud == "gcp":
        labels["node.kubernetes.io/instance-type"] = google_machine_type(machine)
        if accelerator := google_accelerator(machine):
            labels["cloud.google.com/gke-accelerator"] = accelerator
    if group.zone:
        labels["topology.kubernetes.io/zone"] = group.zone
    return labels
