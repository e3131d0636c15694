"""Deployments and Services: parsed back, the plan's counts in them, selectors that select."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml
from conftest import ONLINE, batch_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeplan.codegen.emit import kubernetes
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.spec import Cloud
from moeplan.planner.pipeline import compile_plan

Compile = Callable[[str], Plan]
SPOT = ONLINE + "market: {clouds: [aws], purchase: spot}\n"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compile_plan(SPOT, "spec.yaml")


def documents(plan: Plan) -> list[dict[str, Any]]:
    files = kubernetes.emit(plan).values()
    return [document for text in files for document in yaml.safe_load_all(text)]


def of_kind(plan: Plan, kind: str) -> list[dict[str, Any]]:
    return [document for document in documents(plan) if document["kind"] == kind]


def with_site(plan: Plan, **changes: Any) -> Plan:
    (site,) = plan.placement.sites
    return replace(plan, placement=replace(plan.placement, sites=(replace(site, **changes),)))


def test_replicas_are_the_plans(plan: Plan) -> None:
    (site,) = plan.placement.sites
    deployments = of_kind(plan, "Deployment")
    assert sum(d["spec"]["replicas"] for d in deployments) == site.replicas + site.spot_overprovision
    for deployment in deployments:
        selector = deployment["spec"]["template"]["spec"]["nodeSelector"]
        assert selector["eks.amazonaws.com/capacityType"] == "SPOT"
        assert selector["topology.kubernetes.io/region"] in {zone.region for zone in site.zones}


def test_markets_are_deployments_behind_one_service(plan: Plan) -> None:
    """5 replicas, 2 of them on-demand, in one region: 3 and 2, and a Service over both."""
    zones = plan.placement.sites[0].zones[:1]
    mixed = with_site(plan, replicas=5, on_demand_base=2, spot_overprovision=0, zones=zones)
    counts = {d["metadata"]["name"][-4:]: d["spec"]["replicas"] for d in of_kind(mixed, "Deployment")}
    assert counts == {"spot": 3, "mand": 2}
    (service,) = of_kind(mixed, "Service")
    for deployment in of_kind(mixed, "Deployment"):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("cloud", ["gcp", "azure"])
def test_other_clouds(plan: Plan, cloud: Cloud) -> None:
    """Each cloud's own label of spot nodes; AKS also taints them."""
    wanted = {"gcp": "cloud.google.com/gke-spot", "azure": "kubernetes.azure.com/scalesetpriority"}[cloud]
    zones = tuple(replace(zone, cloud=cloud) for zone in plan.placement.sites[0].zones)
    for deployment in of_kind(with_site(plan, zones=zones), "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        assert wanted in pod["nodeSelector"]
        assert (wanted in {toleration["key"] for toleration in pod["tolerations"]}) == (cloud == "azure")


def test_the_pod(plan: Plan) -> None:
    """GPUs of the plan, time for its cold start, no privileges."""
    policy = plan.fleet.choices[0].column.policy
    for deployment in of_kind(plan, "Deployment"):
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": policy.gpus * policy.data_parallel}
        probe = container["startupProbe"]
        assert (
            probe["periodSeconds"] * probe["failureThreshold"] >= plan.placement.sites[0].cold_start_s * 1.5
        )
        assert container["args"][:2] == ["serve", "$(MODEL)"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert pod["automountServiceAccountToken"] is False


def test_nothing_where_nothing_is_rented_or_served(compile_text: Compile) -> None:
    assert kubernetes.emit(compile_text(batch_spec(machine="g4dn.16xlarge"))) == {}


@settings(max_examples=25)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
@example("no\n---\nkind: Secret")
@example("{{ x }} ${y} %{z} \"quoted\" 'single' # comment")
@example("012")
@example("1e16")
def test_a_name_changes_no_structure(plan: Plan, name: str) -> None:
    """Whatever the plan is called, documents and keys stay, and the name comes back as text."""
    plain = documents(plan)
    named = documents(replace(plan, spec=replace(plan.spec, name=name)))
    assert [shape(document) for document in named] == [shape(document) for document in plain]
    assert {document["metadata"]["labels"]["app.kubernetes.io/part-of"] for document in named} == {name}


def shape(value: Any) -> Any:
    """Keys and lengths without the scalars, but for which kind of object it is."""
    if isinstance(value, dict):
        return {key: value[key] if key == "kind" else shape(item) for key, item in value.items()}
    return [shape(item) for item in value] if isinstance(value, list) else type(value)
