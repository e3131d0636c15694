"""AWS folders applied for real, by the genuine provider, against a moto server on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from terraform_cases import CASES, Case
from validators import Terraform, genuine_mirror, run, validator

pytestmark = pytest.mark.external
PROVIDER = """\
provider "aws" {{
  access_key                  = "testing"
  secret_key                  = "testing"
  skip_credentials_validation = true
  skip_metadata_api_check     = true
  skip_requesting_account_id  = true

  endpoints {{
    autoscaling = "{url}"
    ec2         = "{url}"
    iam         = "{url}"
    sts         = "{url}"
  }}
}}
"""
VERSION = """\
terraform {{
  required_providers {{
    aws = {{
      source  = "hashicorp/aws"
      version = "{version}"
    }}
  }}
}}
"""


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The address of a running moto server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [str(validator("bin", "moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/moto-api/", server)
        yield url
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.poll() is None, "the moto server ended"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail("the moto server does not answer")


def account(url: str, region: str) -> dict[str, Any]:
    """What moto holds in the region."""
    script = Path(__file__).with_name("moto_account.py")
    done = run(validator("bin", "python"), script, url, region)
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case.cloud == "aws"], ids=str)
def test_apply(case: Case, moto: str, tmp_path: Path) -> None:
    """Apply, an empty plan after it, groups as planned, destroy, nothing left: in each region."""
    config, version = genuine_mirror(tmp_path / "mirror")
    case.write(tmp_path / "terraform")
    if version:
        for folder in (tmp_path / "terraform" / "aws").iterdir():
            (folder / "versions_override.tf").write_text(VERSION.format(version=version), encoding="utf-8")
    machines = {"spot": 0, "on_demand": 0}
    for variables in sorted(tmp_path.glob("terraform/aws/*/plan.auto.tfvars.json")):
        plan = json.loads(variables.read_text(encoding="utf-8"))
        terraform = Terraform(variables.parent, config)
        before = account(moto, plan["region"])
        prepare(variables.parent, moto, before)
        terraform.ok("init")
        terraform.ok("apply", "-auto-approve")
        again = terraform("plan", "-detailed-exitcode")
        assert again.returncode == 0, again.stdout
        held = account(moto, plan["region"])
        check_groups(held, plan)
        for group in held["groups"]:
            base = split(group)["OnDemandBaseCapacity"]
            machines["on_demand"] += base
            machines["spot"] += group["DesiredCapacity"] - base
        terraform.ok("destroy", "-auto-approve")
        after = account(moto, plan["region"])
        assert {key: after[key] for key in ("groups", "templates", "roles")} == {
            key: before[key] for key in ("groups", "templates", "roles")
        }
    assert machines == case.wanted()


def prepare(folder: Path, url: str, network: dict[str, Any]) -> None:
    """What only the account knows, and the provider pointed at moto."""
    (folder / "provider_override.tf").write_text(PROVIDER.format(url=url), encoding="utf-8")
    (folder / "mine.auto.tfvars.json").write_text(
        json.dumps(
            {
                "model": "example/model",
                "ami_id": network["image"],
                "vpc_id": network["vpc"],
                "subnets": network["subnets"],
                "client_cidrs": ["10.0.0.0/16"],
            }
        ),
        encoding="utf-8",
    )


def split(group: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = group["MixedInstancesPolicy"]["InstancesDistribution"]
    return found


def check_groups(held: dict[str, Any], plan: dict[str, Any]) -> None:
    """moto's groups against the plan's: machine type, market, zones."""
    wanted = sorted(
        (group["instance_type"], group["on_demand"], group["on_demand"] + group["spot"], group["spot"] > 0)
        for group in plan["groups"].values()
    )
    types = {template["InstanceType"] for template in held["templates"]}
    assert types == {group["instance_type"] for group in plan["groups"].values()}
    (machine,) = types  # one column in each of these plans
    found = sorted(
        (machine, split(g)["OnDemandBaseCapacity"], g["DesiredCapacity"], bool(g["CapacityRebalance"]))
        for g in held["groups"]
    )
    assert found == wanted
    zones = {group["zone"] for group in plan["groups"].values()}
    for group in held["groups"]:
        assert split(group)["SpotAllocationStrategy"] == "price-capacity-optimized"
        assert set(group["AvailabilityZones"]) == (set(held["subnets"]) if zones == {""} else zones)
