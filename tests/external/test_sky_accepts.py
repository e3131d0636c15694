"""Generated SkyPilot files under SkyPilot 0.14.1 itself, offline: parsed, validated, placed and scaled.

No cloud and no network: our own prices stand in for SkyPilot's catalog, with invented zones. Each trap that
the emitter avoids is planted once, to show that these tests would see it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sky_catalog
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.codegen.emit import skypilot
from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.placement import Site
from moeplan.planner.ir.plan import Plan
from moeplan.planner.language import NAME
from moeplan.planner.pipeline import compile_plan

pytestmark = pytest.mark.external
ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MOEPLAN_SKYPILOT_PYTHON", ROOT / "build" / "skypilot" / "bin" / "python"))
CHAT = """\
name: chat
model: qwen3-30b-a3b
workload:
  online:
    rate: {rate}/s
    sizes: [{{prompt: 512, output: 128, share: 70%}}, {{prompt: 2048, output: 256, share: 30%}}]
    slo: {{ttft: 2s, itl: 100ms}}
market: {{{market}}}
"""
WORK = """\
name: nightly
model: mixtral-8x7b
workload:
  batch: {{requests: {requests}, prompt: 77, output: 128, deadline: 6h}}
market: {{{market}}}
"""
SPECS = {
    "spot on gcp": CHAT.format(rate=8, market="clouds: [gcp], purchase: spot"),
    "spot on aws": CHAT.format(rate=80, market="clouds: [aws], purchase: spot"),
    "small GPUs": CHAT.format(rate=80, market="gpus: [L4], clouds: [gcp], purchase: spot"),
    "on demand": CHAT.format(rate=8, market="clouds: [aws], purchase: on-demand"),
    "azure": CHAT.format(rate=8, market="clouds: [azure]"),
    "an image": "image: vllm/vllm-openai:v0.33.0\n"
    + CHAT.format(rate=8, market="clouds: [gcp], gpus: [H100], purchase: spot"),
    "batch on spot": WORK.format(requests=100_000, market="clouds: [gcp], purchase: spot"),
    "batch on several machines": WORK.format(requests=500_000, market="gpus: [L4], purchase: on-demand"),
    "batch on T4": WORK.format(requests=5000, market="gpus: [T4], clouds: [aws, azure]"),
}
SPECS |= {path.parent.name: path.read_text() for path in sorted(ROOT.glob("examples/*/spec.yaml"))}


class SkyPilot:
    """SkyPilot in a process of its own; `read` answers what it makes of a file."""

    def __init__(self, catalog: Path) -> None:
        script = Path(__file__).with_name("sky_accept.py")
        self._process = subprocess.Popen(
            [str(PYTHON), str(script), str(catalog)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def read(self, text: str, **envs: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"text": text, "envs": envs}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def sky(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SkyPilot]:
    if not PYTHON.exists():
        missing = f"no SkyPilot at {PYTHON}: make test-skypilot installs it"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    folder = tmp_path_factory.mktemp("catalog")
    sky_catalog.write_catalog(folder, load_catalog(None, Span("catalog")))
    process = SkyPilot(folder)
    yield process
    process.close()


def compiled(name: str) -> Plan:
    path = ROOT / "examples" / name / "spec.yaml"
    return compile_plan(SPECS[name], str(path) if path.exists() else "spec.yaml")


@pytest.mark.parametrize("name", SPECS)
def test_every_file_is_accepted(sky: SkyPilot, name: str) -> None:
    """Every step of a launch passes, and SkyPilot would rent the planned machines where the plan says."""
    plan = compiled(name)
    files = skypilot.emit(plan)
    sites = {f"skypilot/{site.column}.yaml": site for site in plan.placement.sites}
    for path, text in files.items():
        site, column = (
            sites[path],
            next(c.column for c in plan.fleet.choices if c.column.name == Path(path).stem),
        )
        found = sky.read(text)
        assert found["problems"] == {}
        assert f"({column.policy.machine.name.partition('+')[0]}" in found["choice"]
        assert {r["region"] for r in found["resources"]} == {zone.region for zone in site.zones}
        assert {r["use_spot"] for r in found["resources"]} == {site.market == "spot"}
        if site.serves == "online":
            check_service(found, site)


def check_service(found: dict[str, Any], site: Site) -> None:
    """The placer may use every zone of the plan and no other; the first decision starts what the plan has."""
    decided = found["autoscaler"]
    if site.market == "spot":
        # A plan that names no zone means all of its region.
        places = {(z.cloud, z.region, z.zone if z.cloud == "gcp" else "") for z in site.zones}
        expected = sorted(
            [sky_catalog.CLOUD_NAMES[cloud], region, zone]
            for cloud, region, only in places
            for zone in ([only] if only else sky_catalog.zones(cloud, region))
        )
        assert found["candidates"] == expected
        assert decided["class"] == "FallbackRequestRateAutoscaler"
        assert decided["spot"] == site.replicas + site.spot_overprovision - site.on_demand_base
        assert decided["on_demand"] == site.replicas  # stand in until spot replicas are ready
    else:
        assert decided == {"class": "RequestRateAutoscaler", "spot": 0, "on_demand": site.replicas}


@pytest.mark.parametrize(
    ("spare", "base", "fallback"), [(1, 0, True), (3, 1, True), (2, 1, False), (0, 2, True)]
)
def test_counts_of_any_placement(sky: SkyPilot, chat: Plan, spare: int, base: int, fallback: bool) -> None:
    """Spot replicas beside those on demand; what stands in until they are ready."""
    changes = {
        "replicas": 4,
        "spot_overprovision": spare,
        "on_demand_base": base,
        "on_demand_fallback": fallback,
    }
    (text,) = skypilot.emit(_placed(chat, replace(chat.placement.sites[0], **changes))).values()
    found = sky.read(text)
    assert found["problems"] == {}
    assert found["autoscaler"]["spot"] == 4 + spare - base
    assert found["autoscaler"]["on_demand"] == (4 if fallback else base)


def test_zones_by_name(sky: SkyPilot, chat: Plan) -> None:
    """Where the plan names zones, the placer has those alone."""
    site = chat.placement.sites[0]
    first, *_, last = sky_catalog.zones("gcp", site.zones[0].region)
    zones = tuple(replace(site.zones[0], zone=zone) for zone in (first, last))
    (text,) = skypilot.emit(_placed(chat, replace(site, zones=zones))).values()
    found = sky.read(text)
    assert found["problems"] == {}
    assert [zone for _, _, zone in found["candidates"]] == [first, last]


def _placed(plan: Plan, site: Site) -> Plan:
    return replace(plan, placement=replace(plan.placement, sites=(site,)))


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/*.plan/skypilot/*.yaml")), ids=lambda p: p.stem)
def test_checked_in_files_are_accepted(sky: SkyPilot, path: Path) -> None:
    assert sky.read(path.read_text())["problems"] == {}


def test_a_job_gets_its_bucket(sky: SkyPilot) -> None:
    """SkyPilot itself replaces ${BUCKET}, in the mount and nowhere else."""
    (text,) = skypilot.emit(compiled("batch on spot")).values()
    found = sky.read(text, BUCKET="s3://moeplan-test/night", MODEL="m", SHARD="0")
    assert found["problems"] == {}
    assert found["mounts"] == {"/bucket": "s3://moeplan-test/night"}
    assert found["run"] == sky.read(text)["run"] == yaml.safe_load(text)["run"]


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
HARD = (
    "no",
    "012",
    "1e16",
    "${MODEL}",
    "$MODEL",
    "{{ x }}",
    "a\nrun: b",
    "\"'\\",
    "\x85\u2028\ufeff",
    "%{x}",
)


@settings(max_examples=25)
@given(
    st.from_regex(NAME.pattern, fullmatch=True), TEXT | st.sampled_from(HARD), TEXT | st.sampled_from(HARD)
)
def test_text_survives_substitution(sky: SkyPilot, chat: Plan, name: str, image: str, model: str) -> None:
    """An image of the spec and a model of the command line reach the machine as they are."""
    (text,) = skypilot.emit(replace(chat, spec=replace(chat.spec, name=name, image=image or "i"))).values()
    (plain,) = skypilot.emit(chat).values()
    found, expected = sky.read(text, MODEL=model), sky.read(plain)
    assert found["problems"] == expected["problems"] == {}
    assert found["name"] == (name if name[0].isalpha() else f"moe-{name}")
    assert found["envs"] == {"MODEL": model, "IMAGE": image or "i"}
    for key in ("run", "setup", "service", "candidates"):
        assert found[key] == expected[key]


@pytest.fixture(scope="session")
def chat() -> Plan:
    return compiled("an image")


def planted(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change of one key, `a.b` within a."""

    def change(data: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for name in path:
            data = data[name]
        data[last] = value

    return change


def without_spot(data: dict[str, Any]) -> None:
    data["resources"]["use_spot"] = False


def qps_per_gpu(data: dict[str, Any]) -> None:
    data["service"]["load_balancing_policy"] = "instance_aware_least_load"
    data["service"]["replica_policy"]["target_qps_per_replica"] = {"H100": 2.0}


def scaled_without_target(data: dict[str, Any]) -> None:
    del data["service"]["replica_policy"]["target_qps_per_replica"]
    data["service"]["replica_policy"]["max_replicas"] += 1


def container_as_image(data: dict[str, Any]) -> None:
    data["resources"] |= {"image_id": "docker:vllm/vllm-openai:v0.33.0"}


def two_clouds_one_network_tier(data: dict[str, Any]) -> None:
    data["resources"] |= {"accelerators": "A100:8", "memory": "600+", "network_tier": "best"}
    data["resources"]["any_of"] = [{"infra": "aws/us-east-1"}, {"infra": "gcp/us-central1"}]


TRAPS: dict[str, Callable[[dict[str, Any]], None]] = {
    "target QPS per GPU beside fallback": qps_per_gpu,
    "target QPS per GPU, plain balancing": planted(
        "service.replica_policy.target_qps_per_replica", {"H100": 1}
    ),
    "target QPS with a hyphen": planted("service.replica_policy.target_qps_per_replica", {"A100-80GB": 1}),
    "several accelerators": planted("resources.accelerators", {"H100": 2, "A100": 2}),
    "container as image": container_as_image,
    "network tier of two clouds": two_clouds_one_network_tier,
    "job recovery in a service": planted("resources.job_recovery", "EAGER_NEXT_REGION"),
    "spot and on-demand mixed": planted(
        "resources.any_of", [{"infra": "gcp/us-east4"}, {"infra": "gcp/us-west1", "use_spot": False}]
    ),
    "two ports": planted("resources.ports", [8000, 8001]),
    "fallback without spot": without_spot,
    "scaling without a target": scaled_without_target,
    "a count that no machine has": planted("resources.accelerators", "H100:3"),
    "a region that is none": planted("resources.any_of", [{"infra": "gcp/us-nowhere1"}]),
    "a variable without a value": planted("envs.MODEL", None),
    "a machine type beside the placer": planted("resources.instance_type", "a3-highgpu-2g"),
    "memory that no machine has": planted("resources.memory", "99999+"),
    "a key that is none": planted("service.replica_policy.autoscaling_decision_interval", 20),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_planted_trap_is_seen(sky: SkyPilot, chat: Plan, trap: str) -> None:
    """None of what the emitter avoids would go through these tests unseen."""
    (text,) = skypilot.emit(chat).values()
    data = yaml.safe_load(text)
    assert sky.read(yaml.safe_dump(data))["problems"] == {}
    TRAPS[trap](data)
    assert sky.read(yaml.safe_dump(data))["problems"]


def test_what_skypilot_does_not_see(sky: SkyPilot, chat: Plan) -> None:
    """Why tests/codegen holds the names of GPUs against a list: this one is taken for an H100-MEGA."""
    (text,) = skypilot.emit(chat).values()
    data = yaml.safe_load(text)
    data["resources"]["accelerators"] = "H100-MEG:2"
    assert not sky.read(yaml.safe_dump(data))["problems"].keys() & {"parse", "validate", "service"}
