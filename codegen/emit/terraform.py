"""Plan -> terraform/<cloud>/: a fixed module, a fixed root per region, and the plan's numbers as JSON.

Only plan.auto.tfvars.json depends on the plan, so nothing in a spec can change what Terraform executes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moeplan.codegen.data import to_json
from moeplan.codegen.groups import (
    ReplicaGroup,
    disk_gb,
    engine_image,
    google_accelerator,
    google_machine_type,
    letter_first,
    replica_groups,
    serve_arguments,
    short_name,
)
from moeplan.codegen.render import verbatim
from moeplan.planner.ir.plan import Plan

_LONGEST_NAME = 31  # names of launch templates and roles add the group's name and a suffix

_MODULE = {
    "versions.tf": "{cloud}/versions.tf",
    "variables.tf": "{cloud}/variables.tf",
    "main.tf": "{cloud}/module/main.tf",
    "outputs.tf": "{cloud}/module/outputs.tf",
    "cloud-init.yaml.tftpl": "cloud-init.yaml.tftpl",
}
_ROOT = {
    "versions.tf": "{cloud}/versions.tf",
    "variables.tf": "{cloud}/variables.tf",
    "main.tf": "{cloud}/region/main.tf",
    "outputs.tf": "{cloud}/region/outputs.tf",
    "tests/plan.tftest.hcl": "{cloud}/region/tests/plan.tftest.hcl",
}


def emit(plan: Plan) -> dict[str, str]:
    """Return one folder per cloud and region with online replicas; none for Azure or owned machines.

    A provider works in one region, and a folder has one state: a region that is down blocks no other.
    """
    groups = [group for group in replica_groups(plan) if group.cloud in _GROUP_VALUES]
    files: dict[str, str] = {"terraform/README.md": verbatim("terraform/README.md")} if groups else {}
    for cloud, region in sorted({(group.cloud, group.region) for group in groups}):
        here = [group for group in groups if (group.cloud, group.region) == (cloud, region)]
        files |= _copies(cloud, "module", _MODULE) | _copies(cloud, region, _ROOT)
        files[f"terraform/{cloud}/{region}/plan.auto.tfvars.json"] = _variables(plan, region, here)
    return files


def _copies(cloud: str, folder: str, sources: dict[str, str]) -> dict[str, str]:
    return {
        f"terraform/{cloud}/{folder}/{name}": verbatim(f"terraform/{source.format(cloud=cloud)}")
        for name, source in sources.items()
    }


def _variables(plan: Plan, region: str, groups: Sequence[ReplicaGroup]) -> str:
    return to_json(
        {
            "name": short_name(letter_first(plan.spec.name), _LONGEST_NAME),
            "plan": plan.spec.name,
            "region": region,
            "engine_image": engine_image(plan),
            "groups": {
                name: {**values, "disk_gb": disk_gb(plan), "arguments": serve_arguments(plan, group.policy)}
                for group in groups
                for name, values in _GROUP_VALUES[group.cloud](group).items()
            },
        }
    )


def _aws(group: ReplicaGroup) -> dict[str, dict[str, Any]]:
    """One Auto Scaling group: on-demand replicas and spot ones above them."""
    return {
        group.name: {
            "zone": group.zone,
            "instance_type": group.policy.machine.name,
            "spot": group.spot,
            "on_demand": group.on_demand,
            "grace_s": group.grace_s,
        }
    }


def _gcp(group: ReplicaGroup) -> dict[str, dict[str, Any]]:
    """One instance group per market, since its template is for one."""
    machine = group.policy.machine
    accelerator = google_accelerator(machine)
    shape = {
        "zone": group.zone,
        "machine_type": google_machine_type(machine),
        "accelerator_type": accelerator,
        "accelerator_count": machine.gpus if accelerator else 0,
    }
    counts = {"spot": group.spot, "on-demand": group.on_demand}
    both = all(counts.values())
    return {
        f"{group.name}-{market}" if both else group.name: {
            **shape,
            "spot": market == "spot",
            "replicas": count,
        }
        for market, count in counts.items()
        if count
    }


_GROUP_VALUES: dict[str, Callable[[ReplicaGroup], dict[str, dict[str, Any]]]] = {"aws": _aws, "gcp": _gcp}
