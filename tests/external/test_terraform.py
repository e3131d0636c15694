"""Generated Terraform under Terraform itself: formatted, valid, tested, and closed where it should be."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from security_rules import RULES
from terraform_cases import CASES, Case
from validators import Terraform, program, run, schema_mirror, validator

pytestmark = pytest.mark.external
GROUP = {"aws": "aws_autoscaling_group", "gcp": "google_compute_region_instance_group_manager"}
CLOUD_INIT_SCHEMA = "usr/lib/python3/dist-packages/cloudinit/config/schemas/schema-cloud-config-v1.json"
TEMPLATE = {"aws": "aws_launch_template", "gcp": "google_compute_region_instance_template"}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return schema_mirror(tmp_path_factory.mktemp("mirror"))


@pytest.fixture(scope="session", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="session")
def tree(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the plan's terraform/ folder."""
    folder = tmp_path_factory.mktemp("plan") / "terraform"
    case.write(folder)
    return folder


@pytest.fixture(scope="session")
def regions(tree: Path) -> list[Path]:
    return sorted(path.parent for path in tree.glob("*/*/plan.auto.tfvars.json"))


@pytest.fixture(scope="session")
def tested(regions: list[Path], config: Path) -> dict[Path, dict[str, Any]]:
    """Each region's folder initialised and tested; what `terraform test` said."""
    found = {}
    for folder in regions:
        terraform = Terraform(folder, config)
        terraform.ok("init")
        found[folder] = terraform.tests()
    return found


def resources(runs: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The values of all resources of a kind, as applied in the run `closed`."""
    held = runs["closed"]["state"]["root_module"]["resources"]
    return [resource["values"] for resource in held if resource["type"] == kind]


def test_format(tree: Path) -> None:
    done = run(program("terraform"), "fmt", "-check", "-recursive", "-diff", tree)
    assert done.returncode == 0, done.stdout


def test_validate(tested: dict[Path, dict[str, Any]], config: Path) -> None:
    for folder in tested:
        found = json.loads(Terraform(folder, config)("validate", "-json").stdout)
        assert found["valid"], found
        assert found["warning_count"] == 0, found


def test_terraform_test(tested: dict[Path, dict[str, Any]]) -> None:
    """The emitted tests pass: counts and machines, closed doors, refused inputs."""
    for runs in tested.values():
        problems = [problem for found in runs.values() for problem in found.get("problems", [])]
        assert problems == []
        assert {found["status"] for name, found in runs.items() if name} == {"pass"}
        assert len(runs) >= 8


def test_groups_are_the_plans(case: Case, tested: dict[Path, dict[str, Any]]) -> None:
    """By plan.json, not by the variables: replicas and spares of each site, no more and no fewer."""
    found = {"spot": 0, "on_demand": 0}
    for folder, runs in tested.items():
        if folder.parent.name == "aws":
            for group in resources(runs, "aws_autoscaling_group"):
                base = group["mixed_instances_policy"][0]["instances_distribution"][0][
                    "on_demand_base_capacity"
                ]
                found["on_demand"] += base
                found["spot"] += group["desired_capacity"] - base
        else:
            spot = {
                template["name_prefix"].rstrip("-"): template["scheduling"][0]["provisioning_model"] == "SPOT"
                for template in resources(runs, TEMPLATE["gcp"])
            }
            for group in resources(runs, GROUP["gcp"]):
                found["spot" if spot[group["name"]] else "on_demand"] += group["target_size"]
    assert found == case.wanted()


def test_machines_are_the_plans(case: Case, tested: dict[Path, dict[str, Any]]) -> None:
    key = {"aws": "instance_type", "gcp": "machine_type"}
    kinds = {
        template[key[folder.parent.name]]
        for folder, runs in tested.items()
        for template in resources(runs, TEMPLATE[folder.parent.name])
    }
    assert kinds == case.machines()


def test_security_rules(tested: dict[Path, dict[str, Any]]) -> None:
    for folder, runs in tested.items():
        assert len(RULES[folder.parent.name]) >= 14
        assert broken_rules(folder.parent.name, runs) == set()


def broken_rules(cloud: str, runs: dict[str, Any]) -> set[str]:
    held = runs["closed"]["state"]["root_module"]["resources"]
    by_kind = {resource["type"]: resources(runs, resource["type"]) for resource in held}
    return {name for name, kept in RULES[cloud].items() if not kept(by_kind)}


def started(folder: Path, runs: dict[str, Any]) -> Iterator[str]:
    """The cloud-init text of each template."""
    for template in resources(runs, TEMPLATE[folder.parent.name]):
        if folder.parent.name == "aws":
            yield base64.b64decode(template["user_data"]).decode()
        else:
            yield template["metadata"]["user-data"]


def test_cloud_init(tested: dict[Path, dict[str, Any]]) -> None:
    """cloud-init's own schema accepts it and refuses a slip."""
    import jsonschema

    schema = json.loads(validator("cloud-init", CLOUD_INIT_SCHEMA).read_text(encoding="utf-8"))
    judge = jsonschema.Draft4Validator(schema)
    for folder, runs in tested.items():
        for text in started(folder, runs):
            assert text.startswith("#cloud-config\n")
            assert len(text.encode()) < 16 * 1024  # what AWS takes
            config = yaml.safe_load(text)
            assert list(judge.iter_errors(config)) == []
            config["write_files"][0]["permision"] = "0644"
            assert list(judge.iter_errors(config))


def test_unit_and_script(tested: dict[Path, dict[str, Any]], tmp_path: Path) -> None:
    """systemd and bash accept what cloud-init writes; the script calls the engine as the plan has it."""
    for folder, runs in tested.items():
        variables = json.loads((folder / "plan.auto.tfvars.json").read_text(encoding="utf-8"))
        wanted = sorted(group["arguments"] for group in variables["groups"].values())
        called = []
        for text in started(folder, runs):
            files = {file["path"]: file["content"] for file in yaml.safe_load(text)["write_files"]}
            verify_unit(files["/etc/systemd/system/moeplan-replica.service"], tmp_path)
            called.append(words_of(files, tmp_path))
        given = ["example/engine:1.0", "serve", "example/model"]
        assert sorted(called) == [given + arguments for arguments in wanted]


def verify_unit(text: str, folder: Path) -> None:
    unit = folder / "moeplan-replica.service"
    unit.write_text(text, encoding="utf-8")
    done = run(program("systemd-analyze"), "verify", unit, env={"SYSTEMD_LOG_LEVEL": "warning"})
    # Unknown keys are only warned of, so any word is a failure; docker.service need not exist here.
    said = [line for line in done.stdout.splitlines() if "docker.service" not in line]
    assert (done.returncode, said) == (0, [])


def words_of(files: dict[str, str], folder: Path) -> list[str]:
    """What the script hands to `docker run` after `--entrypoint vllm`; a docker that prints stands in."""
    docker = folder / "docker"
    docker.write_text('#!/bin/bash\n[ "$1" = rm ] || printf "%s\\0" "$@"\n', encoding="utf-8")
    docker.chmod(0o755)
    command = folder / "command"
    command.write_bytes(files["/etc/moeplan/command"].encode())
    script = files["/opt/moeplan/serve"].replace("/etc/moeplan/command", str(command))
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": f"{folder}:/usr/bin:/bin"}, capture_output=True, check=True
    )
    words = done.stdout.decode().split("\0")[:-1]
    return words[words.index("--entrypoint") + 2 :]


# Slips that `terraform validate` must refuse: the place, what it becomes, what is said. All in one resource:
# what depends on a wrong one is not looked at.
SLIPS = {
    "aws": [
        ('http_tokens                 = "required"', 'http_token = "required"', "http_tokens"),
        ("volume_size ", "volume_sizes ", '"volume_sizes" is not expected'),
        ("security_groups             = [", "security_group = [", '"security_group" is not expected'),
    ],
    "gcp": [
        ("disk_size_gb ", "disk_size_gib ", '"disk_size_gib" is not expected'),
        ("scheduling {", "schedulling {", 'Blocks of type "schedulling" are not expected'),
    ],
}
# Openings and a wrong count, each of which one of the emitted tests must name.
OPENINGS = {
    "aws": [
        ('http_tokens                 = "required"', 'http_tokens = "optional"', "IMDSv2 is required"),
        (
            "associate_public_ip_address = false",
            "associate_public_ip_address = true",
            "addresses are private",
        ),
        ("encrypted             = true", "encrypted = false", "disks are encrypted"),
        ("cidr_blocks = var.client_cidrs", 'cidr_blocks = ["0.0.0.0/0"]', "only the client network"),
        (
            "desired_capacity          = ",
            "desired_capacity = 1 + ",
            "the groups must hold the plan's replicas",
        ),
    ],
    "gcp": [
        (
            "enable_secure_boot          = var.secure_boot",
            "enable_secure_boot = false",
            "Secure Boot is required",
        ),
        (
            "subnetwork = var.subnetwork",
            "subnetwork = var.subnetwork\n    access_config {}",
            "addresses are private",
        ),
        (
            "source_ranges           = var.client_cidrs",
            'source_ranges = ["0.0.0.0/0"]',
            "only the client network",
        ),
        (
            "target_size                      = ",
            "target_size = 1 + ",
            "the groups must hold the plan's replicas",
        ),
    ],
}

# The rules that the same openings break.
BROKEN = {
    "aws": {"metadata needs a session token", "no public address", "every disk is encrypted"},
    "gcp": {"no public address", "Secure Boot, virtual TPM, integrity monitoring"},
}


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_slips_are_refused(cloud: str, config: Path, tmp_path: Path) -> None:
    terraform = Terraform(changed(cloud, SLIPS[cloud], tmp_path), config)
    terraform.ok("init")
    done = terraform("validate", "-json")
    said = done.stdout
    assert done.returncode == 1
    assert [message for *_, message in SLIPS[cloud] if json.dumps(message)[1:-1] not in said] == []


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_emitted_tests_can_fail(cloud: str, config: Path, tmp_path: Path) -> None:
    terraform = Terraform(changed(cloud, OPENINGS[cloud], tmp_path), config)
    terraform.ok("init")
    runs = terraform.tests()
    said = "\n".join(problem for found in runs.values() for problem in found.get("problems", []))
    assert [message for *_, message in OPENINGS[cloud] if message not in said] == []
    assert BROKEN[cloud] <= broken_rules(cloud, runs)


def changed(cloud: str, changes: list[tuple[str, str, str]], tmp_path: Path) -> Path:
    """A region's folder of the first case of `cloud`, with its module changed."""
    case = next(case for case in CASES if case.cloud == cloud)
    case.write(tmp_path / "terraform")
    path = tmp_path / "terraform" / cloud / "module" / "main.tf"
    text = path.read_text(encoding="utf-8")
    for old, new, _ in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return next(path.parent for path in sorted(tmp_path.glob(f"terraform/{cloud}/*/plan.auto.tfvars.json")))


def test_strings_are_values(config: Path, tmp_path: Path) -> None:
    """Terraform reads the strings of plan.auto.tfvars.json as they are: no interpolation, no directive."""
    (tmp_path / "main.tf").write_text(
        'variable "plan" {\n  type = string\n}\n\noutput "plan" {\n  value = var.plan\n}\n', encoding="utf-8"
    )
    name = '"quoted" \\ ${path.module} %{ if true } {{ x }} $${y} no 012 1e16\nline é😀'
    terraform = Terraform(tmp_path, config)
    for word in (name, "no", "012", "1e16", "null", '${upper("x")}'):
        (tmp_path / "plan.auto.tfvars.json").write_text(json.dumps({"plan": word}), encoding="utf-8")
        terraform.ok("apply", "-auto-approve")
        assert json.loads(terraform.ok("output", "-json"))["plan"]["value"] == word
