"""SkyPilot files: what the plan says is in them, and none of the traps its schema and autoscaler set.

tests/external/test_sky_accepts.py has the real SkyPilot read them; planted traps show there what they do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ONLINE, batch_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeplan.codegen.emit import skypilot
from moeplan.planner.ir.placement import Zone
from moeplan.planner.ir.plan import Plan
from moeplan.planner.pipeline import compile_plan

IMAGE = "image: registry.example.com:5000/vllm/vllm-openai:v0.33.0\n"
OFFERS = """\
cloud,region,instance,on_demand_usd_per_hour,spot_usd_per_hour,date,source
aws,eu-test-1,gr6.8xlarge,2.4,1.1,2026-08-03,test
aws,eu-test-2,gr6.8xlarge,2.4,1.2,2026-08-03,test
"""
# Offers of one-GPU machines only: nothing holds Mixtral in GPU memory.
OFFLOADED = "catalog: own\nmarket: {regions: [aws/eu-test-1, aws/eu-test-2]}\n"
LONG = batch_spec(more=", deadline: 6h").replace("2000", "500000")
SPECS = {
    "spot on gcp": ONLINE + "market: {clouds: [gcp], purchase: spot}\n",
    "spot on aws": ONLINE + "market: {clouds: [aws], purchase: spot}\n",
    "many cheap replicas": ONLINE.replace("8/s", "80/s") + "market: {gpus: [L4], purchase: spot}\n",
    "on demand": ONLINE + "market: {clouds: [aws], purchase: on-demand}\n",
    "azure": ONLINE + "market: {clouds: [azure]}\n",
    "batch": LONG + "market: {clouds: [gcp], purchase: spot}\n",
    "batch on several machines": LONG + "market: {gpus: [L4], purchase: on-demand}\n",
    "both": ONLINE.replace("  online", "  batch: {requests: 90000, prompt: 77, output: 128}\n  online")
    + "market: {clouds: [aws], purchase: spot}\n",
    "offloaded": batch_spec() + OFFLOADED,
    "image": LONG + IMAGE + "market: {gpus: [L4], purchase: on-demand}\n",
    "image online": ONLINE + IMAGE + "market: {clouds: [gcp], purchase: spot}\n",
    "a digit first": ONLINE.replace("name: chat", 'name: "012"')
    + "market: {clouds: [aws], purchase: spot}\n",
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plan]:
    """The plan of a spec of SPECS, compiled once."""
    folder = tmp_path_factory.mktemp("specs")
    (folder / "own").mkdir()
    (folder / "own" / "offers.csv").write_text(OFFERS)
    return cache(lambda name: compile_plan(SPECS[name], str(folder / "spec.yaml")))


def emitted(plan: Plan) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in skypilot.emit(plan).values()]


@pytest.fixture(params=SPECS)
def plan(request: pytest.FixtureRequest, compiled: Callable[[str], Plan]) -> Plan:
    return compiled(request.param)


@pytest.fixture
def files(plan: Plan) -> list[dict[str, Any]]:
    found = emitted(plan)
    assert found
    return found


def services(files: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (file for file in files if "service" in file)


def test_spot_service(compiled: Callable[[str], Plan]) -> None:
    """Every figure of the site is in its place."""
    plan = compiled("spot on gcp")
    (service,), (site,) = emitted(plan), plan.placement.sites
    assert service["service"]["replica_policy"] | {"target_qps_per_replica": 0} == {
        "min_replicas": site.replicas,
        "max_replicas": site.replicas,
        "num_overprovision": site.spot_overprovision,
        "base_ondemand_fallback_replicas": site.on_demand_base,
        "dynamic_ondemand_fallback": True,
        "spot_placer": "dynamic_fallback",
        "target_qps_per_replica": 0,
    }
    assert service["resources"]["use_spot"] is True
    infra = [entry["infra"] for entry in service["resources"]["any_of"]]
    assert infra == [f"{zone.cloud}/{zone.region}" for zone in site.zones]
    assert len(infra) > 1


def test_target_qps_is_what_a_full_replica_takes(compiled: Callable[[str], Plan]) -> None:
    """All replicas together take the rate, and as much more as the plan's utilisation allows."""
    plan = compiled("many cheap replicas")
    (service,), (site,), (choice,) = emitted(plan), plan.placement.sites, plan.fleet.choices
    qps = service["service"]["replica_policy"]["target_qps_per_replica"]
    full = plan.fleet.target_utilisation / choice.utilisation
    assert qps * site.replicas == pytest.approx(80.0 * full, rel=1e-3)
    assert qps * site.replicas >= 80.0 * (1 - 1e-3)


def test_readiness_outlasts_the_cold_start(plan: Plan) -> None:
    for service, site in zip(emitted(plan), plan.placement.sites, strict=True):
        if "service" in service:
            delay = service["service"]["readiness_probe"]["initial_delay_seconds"]
            assert 1.5 * site.cold_start_s <= delay <= 1.5 * site.cold_start_s + 60


def test_qps_is_a_number(files: list[dict[str, Any]]) -> None:
    """A mapping beside on-demand fallback passes every check and crashes the autoscaler."""
    for file in services(files):
        qps = file["service"]["replica_policy"]["target_qps_per_replica"]
        assert isinstance(qps, float)
        assert qps > 0
        assert file["service"]["load_balancing_policy"] == "least_load"  # goes with a number, no other


def test_one_accelerator_per_file(plan: Plan) -> None:
    """The placer refuses mixtures, and a count that no machine has leaves it without candidates."""
    for file, choice in zip(emitted(plan), plan.fleet.choices, strict=True):
        machine = choice.column.policy.machine
        name, count = file["resources"]["accelerators"].split(":")
        assert int(count) == machine.gpus
        assert name == {"H100-NVL": "H100"}.get(machine.gpu, machine.gpu)
        assert all(entry.keys() == {"infra"} for entry in file["resources"]["any_of"])


# The names of SkyPilot's catalog (sky/catalog of 0.14.1); it takes a misspelt one for whatever contains it.
ACCELERATORS = {"A10", "A100", "A100-80GB", "A10G", "B200", "H100", "H100-MEGA", "H200", "L4", "L40S"}
ACCELERATORS |= {"RTXPRO6000", "T4", "V100"}


def test_every_gpu_on_offer_has_skypilots_name(catalog: Any) -> None:
    for offer in catalog.offers:
        gpu = catalog.machines[offer.machine].gpu
        assert skypilot._GPU_NAMES.get(gpu, gpu) in ACCELERATORS


def test_spot_keys_only_with_spot(files: list[dict[str, Any]]) -> None:
    """Fallback or a placer without use_spot is rejected."""
    keys = {
        "spot_placer",
        "dynamic_ondemand_fallback",
        "base_ondemand_fallback_replicas",
        "num_overprovision",
    }
    for file in services(files):
        has = file["service"]["replica_policy"].keys() & keys
        assert has == (keys if file["resources"]["use_spot"] else set())


def test_keys_that_fail_elsewhere_are_absent(files: list[dict[str, Any]]) -> None:
    """`image_id` of a container becomes region-keyed, `network_tier` is not everywhere, `max_hourly_cost`
    compares GCP's price without the GPU, `job_recovery` is no service's; the placer fails on `instance_type`.
    """
    common, always = {"name", "resources", "envs", "setup", "run"}, {"accelerators", "use_spot", "disk_size"}
    for file in files:
        serves = "service" in file
        assert file.keys() == common | {"service" if serves else "file_mounts"}
        placed = serves and "spot_placer" in file["service"]["replica_policy"]
        keys = always | {"any_of", "memory" if placed else "instance_type"} | ({"ports"} if serves else set())
        recovers = {"job_recovery"} if "runtime_min run " in file["run"] else set()
        assert file["resources"].keys() == keys | recovers
        assert isinstance(file["resources"].get("ports", 0), int)


def test_replicas_need_no_autoscaling(files: list[dict[str, Any]]) -> None:
    """The plan says how many; different bounds without a target would be rejected."""
    for file in services(files):
        policy = file["service"]["replica_policy"]
        assert policy["min_replicas"] == policy["max_replicas"] > 0


def test_memory_picks_the_planned_machine(plan: Plan, catalog: Any) -> None:
    """Of the types with as many of the GPUs, the cheapest with the memory asked for is the planned one."""
    for file, choice, site in zip(emitted(plan), plan.fleet.choices, plan.placement.sites, strict=True):
        planned = choice.column.policy.machine
        for zone in site.zones if "memory" in file["resources"] else ():
            need = float(file["resources"]["memory"].removesuffix("+"))
            fitting = [
                (offer.spot_usd_per_hour or offer.on_demand_usd_per_hour, offer.machine)
                for offer in catalog.offers
                for machine in [catalog.machines[offer.machine]]
                if (offer.cloud, offer.region) == (zone.cloud, zone.region)
                and (machine.gpu, machine.gpus) == (planned.gpu, planned.gpus)
                and machine.level("dram").bytes / 2**30 >= need
            ]
            assert min(fitting)[1] == planned.name


def test_zones_by_name_except_on_aws(compiled: Callable[[str], Plan]) -> None:
    """AWS's zone names differ from account to account; zones of one region are one place there."""
    for name, cloud, expected in (
        ("spot on gcp", "gcp", ["gcp/r1/r1-a", "gcp/r1/r1-b"]),
        ("spot on aws", "aws", ["aws/r1"]),
    ):
        plan = compiled(name)
        zones = tuple(
            Zone(cloud=cloud, region="r1", zone=zone, usd_per_hour=1.0, on_demand_usd_per_hour=2.0)  # type: ignore[arg-type]
            for zone in ("r1-a", "r1-b")
        )
        site = replace(plan.placement.sites[0], zones=zones)
        (file,) = emitted(replace(plan, placement=replace(plan.placement, sites=(site,))))
        assert [entry["infra"] for entry in file["resources"]["any_of"]] == expected


def test_environment_has_no_null_and_services_no_variable(files: list[dict[str, Any]]) -> None:
    """Null is rejected. In a service SkyPilot replaces $NAME as text, whatever quotes the value holds."""
    for file in files:
        assert all(isinstance(value, str) for value in file["envs"].values())
        assert "$" not in str(file.get("service", ""))


def test_names_begin_with_a_letter_and_differ(files: list[dict[str, Any]]) -> None:
    names = [file["name"] for file in files]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-zA-Z]([-_.a-zA-Z0-9]*[a-zA-Z0-9])?", name) for name in names)


def test_batch_is_a_job_that_goes_on_from_the_bucket(compiled: Callable[[str], Plan]) -> None:
    """As many jobs as the plan has machines, with the parts of the batch shared out among them."""
    plan = compiled("batch on several machines")
    ((text,), (site,)) = skypilot.emit(plan).values(), plan.placement.sites
    job = yaml.safe_load(text)
    assert site.replicas > 1
    assert f"SHARD from 0 to {site.replicas - 1}" in text
    assert job["file_mounts"] == {"/bucket": {"source": "${BUCKET}", "mode": "MOUNT"}}
    hours = plan.fleet.choices[0].hours
    assert f"--parts {math.ceil(hours) * site.replicas}\n" in text  # an hour each, as many for every machine


def test_offloaded_work_is_a_job_of_runtime_min(compiled: Callable[[str], Plan]) -> None:
    """Exit code 75 means stopped in order; nothing else is taken for a preemption. What never ran says so."""
    plan = compiled("offloaded")
    (text,) = skypilot.emit(plan).values()
    job = yaml.safe_load(text)
    assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert job["resources"]["instance_type"] == "gr6.8xlarge"
    assert f"/bucket/runtime/{plan.replicas[0].name} " in job["run"]
    assert "# runtime_min has never run on a GPU" in text


def test_an_image_replaces_the_installation(compiled: Callable[[str], Plan]) -> None:
    for name in ("image", "image online"):
        (file,) = emitted(compiled(name))
        assert file["envs"]["IMAGE"] == "registry.example.com:5000/vllm/vllm-openai:v0.33.0"
        assert "uv pip" not in file["setup"]
        assert '--entrypoint vllm "$IMAGE"' in file["run"]


@pytest.mark.parametrize("machine", ["g4dn.16xlarge"])
def test_nothing_for_owned_machines(compile_text: Callable[[str], Plan], machine: str) -> None:
    assert skypilot.emit(compile_text(batch_spec(machine=machine))) == {}


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
HARD = (
    "no",
    "012",
    "1e16",
    "${MODEL}",
    "{{ x }}",
    "a\nenvs: {A: 1}",
    "\"'\\",
    "%{x}",
    "\x85\u2028\ufeff",
    "# x",
)


@settings(max_examples=15)
@given(TEXT, TEXT, TEXT, TEXT)
@example(*HARD[:4])
@example(*HARD[4:8])
@example(*HARD[6:])
def test_text_of_spec_and_catalog_survives(
    plan_of: Plan, name: str, image: str, gpu: str, region: str
) -> None:
    """Names, image, GPU and region may be any text: each comes back, and nothing else in the file changes."""
    (file,) = emitted(_with(plan_of, name, image, gpu, region))
    (plain,) = emitted(_with(plan_of, "n", image and "i", "G", "r"))
    count = plan_of.fleet.choices[0].column.policy.machine.gpus
    assert file["name"] == skypilot._name(name)
    assert file["envs"].get("IMAGE", "") == image
    assert file["resources"]["accelerators"] == f"{gpu}:{count}"
    assert [entry["infra"] for entry in file["resources"]["any_of"]] == [
        f"{plan_of.placement.sites[0].zones[0].cloud}/{region}"
    ]
    for key in ("service", "file_mounts", "setup", "run"):
        assert file.get(key) == plain.get(key)
    assert file.keys() == plain.keys()


@pytest.fixture(scope="module", params=["spot on gcp", "image"])
def plan_of(request: pytest.FixtureRequest, compiled: Callable[[str], Plan]) -> Plan:
    """A service and a job."""
    return compiled(request.param)


def _with(plan: Plan, name: str, image: str, gpu: str, region: str) -> Plan:
    """The plan with other texts, as specs and own catalogs could bring them."""
    (choice,), (site,) = plan.fleet.choices, plan.placement.sites
    machine = replace(choice.column.policy.machine, gpu=gpu)
    column = replace(choice.column, policy=replace(choice.column.policy, machine=machine))
    site = replace(site, zones=(replace(site.zones[0], region=region),))
    return replace(
        plan,
        spec=replace(plan.spec, name=name, image=image),
        fleet=replace(plan.fleet, choices=(replace(choice, column=column),)),
        placement=replace(plan.placement, sites=(site,)),
    )


def test_headers(plan: Plan) -> None:
    for text in skypilot.emit(plan).values():
        assert text.startswith("# Code generated by moeplan from spec.yaml. DO NOT EDIT.\n")
        assert text.endswith("\n")
        assert not any(line != line.rstrip() for line in text.splitlines())


def test_checked_in_files_are_skypilots_kind() -> None:
    """The examples' goldens are read by these tests, not only made by them."""
    root = Path(__file__).parents[2] / "examples"
    found = [yaml.safe_load(path.read_text()) for path in root.glob("*/*.plan/skypilot/*.yaml")]
    assert found
    assert all({"name", "resources", "run"} <= file.keys() for file in found)
