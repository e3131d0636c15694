"""What must hold of the applied resources of a region's folder, one rule per habit.

A rule takes {type: [values, ...]}, values as `terraform show -json` has them, and says whether it is kept.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import Any

Resources = dict[str, list[dict[str, Any]]]
Rule = Callable[[Resources], bool]
PROXY = ["35.235.240.0/20"]  # Identity-Aware Proxy's range
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|password|secret|hf_[A-Za-z0-9]{8}", re.IGNORECASE
)


def _templates(resources: Resources) -> list[dict[str, Any]]:
    return resources.get("aws_launch_template", []) + resources.get(
        "google_compute_region_instance_template", []
    )


def _started(template: dict[str, Any]) -> str:
    if "user_data" in template:
        return base64.b64decode(template["user_data"]).decode()
    return str(template["metadata"]["user-data"])


def _firewalls(resources: Resources, direction: str) -> list[dict[str, Any]]:
    return [rule for rule in resources["google_compute_firewall"] if rule["direction"] == direction]


def _rules_of_groups(resources: Resources, way: str) -> list[dict[str, Any]]:
    return [rule for group in resources["aws_security_group"] for rule in group[way] or ()]


def _distribution(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["mixed_instances_policy"][0]["instances_distribution"][0]
    return found


def _has_spot(group: dict[str, Any]) -> bool:
    return bool(group["desired_capacity"] > _distribution(group)["on_demand_base_capacity"])


AWS: dict[str, Rule] = {
    "metadata needs a session token": lambda r: all(
        t["metadata_options"][0]["http_tokens"] == "required" for t in r["aws_launch_template"]
    ),
    "containers cannot reach metadata": lambda r: all(
        t["metadata_options"][0]["http_put_response_hop_limit"] == 1 for t in r["aws_launch_template"]
    ),
    "every disk is encrypted": lambda r: all(
        [d["ebs"][0]["encrypted"] for d in t["block_device_mappings"]] == ["true"]
        for t in r["aws_launch_template"]
    ),
    "no public address": lambda r: all(
        [n["associate_public_ip_address"] for n in t["network_interfaces"]] == ["false"]
        for t in r["aws_launch_template"]
    ),
    "no SSH key": lambda r: all(not t["key_name"] for t in r["aws_launch_template"]),
    "nothing comes in unless clients are named": lambda r: not _rules_of_groups(r, "ingress"),
    "only HTTPS goes out": lambda r: (
        [(rule["from_port"], rule["to_port"], rule["protocol"]) for rule in _rules_of_groups(r, "egress")]
        == [(443, 443, "tcp")]
    ),
    "machines carry the group's security group alone": lambda r: all(
        len(t["network_interfaces"][0]["security_groups"]) == 1 and not t["vpc_security_group_ids"]
        for t in r["aws_launch_template"]
    ),
    "the role may use Session Manager and nothing else": lambda r: (
        [a["policy_arn"] for a in r["aws_iam_role_policy_attachment"]]
        == ["arn:aws:iam::aws:policy/AmazonSSMManagedInstanceCore"]
    ),
    "no policy of our own, no user, no key": lambda r: (
        r.keys()
        == {
            "aws_autoscaling_group",
            "aws_iam_instance_profile",
            "aws_iam_policy_document",
            "aws_iam_role",
            "aws_iam_role_policy_attachment",
            "aws_launch_template",
            "aws_security_group",
        }
    ),
    "the role is for EC2 alone": lambda r: (
        [
            [p["identifiers"] for s in d["statement"] for p in s["principals"]]
            for d in r["aws_iam_policy_document"]
        ]
        == [[["ec2.amazonaws.com"]]]
    ),
    "spot machines are replaced ahead of interruption": lambda r: all(
        g["capacity_rebalance"] == _has_spot(g) for g in r["aws_autoscaling_group"]
    ),
    "spot capacity before price": lambda r: all(
        _distribution(g)["spot_allocation_strategy"] == "price-capacity-optimized"
        for g in r["aws_autoscaling_group"]
    ),
    "machines and disks are tagged with the plan": lambda r: all(
        {s["resource_type"] for s in t["tag_specifications"] if "moeplan:plan" in s["tags"]}
        == {"instance", "volume"}
        for t in r["aws_launch_template"]
    ),
}

GOOGLE: dict[str, Rule] = {
    "no public address": lambda r: all(
        not n["access_config"] and not n["ipv6_access_config"]
        for t in _templates(r)
        for n in t["network_interface"]
    ),
    "Secure Boot, virtual TPM, integrity monitoring": lambda r: all(
        all(t["shielded_instance_config"][0].values()) for t in _templates(r)
    ),
    "no SSH keys in metadata, those of the project refused": lambda r: all(
        t["metadata"]["block-project-ssh-keys"] == "true" and "ssh-keys" not in t["metadata"]
        for t in _templates(r)
    ),
    "OS Login": lambda r: all(t["metadata"]["enable-oslogin"] == "TRUE" for t in _templates(r)),
    "no serial console": lambda r: all(t["metadata"]["serial-port-enable"] == "FALSE" for t in _templates(r)),
    "shells come through Identity-Aware Proxy, nothing else comes in": lambda r: (
        [(rule["source_ranges"], [a["ports"] for a in rule["allow"]]) for rule in _firewalls(r, "INGRESS")]
        == [(PROXY, [["22"]])]
    ),
    "only HTTPS goes out": lambda r: (
        [
            (rule["priority"], [a["ports"] for a in rule["allow"]], [d["protocol"] for d in rule["deny"]])
            for rule in sorted(_firewalls(r, "EGRESS"), key=lambda rule: rule["priority"])
        ]
        == [(1000, [["443"]], []), (1001, [], ["all"])]
    ),
    "firewall rules are for the replicas alone": lambda r: all(
        len(rule["target_service_accounts"]) == 1 and not rule["target_tags"]
        for rule in r["google_compute_firewall"]
    ),
    "the service account has no role, no key": lambda r: (
        r.keys()
        == {
            "google_compute_firewall",
            "google_compute_region_instance_group_manager",
            "google_compute_region_instance_template",
            "google_service_account",
        }
    ),
    "scopes are for logs and metrics": lambda r: all(
        {scope.rpartition("/")[2] for scope in t["service_account"][0]["scopes"]}
        == {"logging.write", "monitoring.write"}
        for t in _templates(r)
    ),
    "no forwarding of packets": lambda r: all(not t["can_ip_forward"] for t in _templates(r)),
    "spot machines end when taken back": lambda r: all(
        s["instance_termination_action"] == ("DELETE" if s["provisioning_model"] == "SPOT" else None)
        for t in _templates(r)
        for s in t["scheduling"]
    ),
}

BOTH: dict[str, Rule] = {
    "no secret at start": lambda r: all(not SECRET.search(_started(t)) for t in _templates(r)),
    "the engine gains no privileges": lambda r: all(
        "no-new-privileges" in _started(t) and "--privileged" not in _started(t) for t in _templates(r)
    ),
}
RULES = {"aws": {**AWS, **BOTH}, "gcp": {**GOOGLE, **BOTH}}
