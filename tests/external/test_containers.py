"""docker compose and Kubernetes' own schemas read what is generated for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ONLINE
from terraform_cases import CASES
from validators import ROOT, run, validator

from moeplan.codegen.emit import kubernetes
from moeplan.codegen.render import expanded_scalar
from moeplan.planner.pipeline import compile_plan

pytestmark = pytest.mark.external
COMPOSE = sorted((ROOT / "examples").glob("*/*.plan/compose.yaml"))
MANIFESTS = sorted((ROOT / "examples").glob("*/*.plan/kubernetes/*.yaml"))
SETTINGS = {"MODEL": "example/model", "MOEPLAN_IMAGE": "example:1", "CHECKPOINT": "/c", "REQUESTS": "/r"}
NASTY = [
    "${HOME:-x}",
    "$HOME $$",
    "%{y} {{ z }}",
    "no",
    "012",
    "1e16",
    "line\nbreak: [1]",
    '"é😀\\',
    "$(MODEL)",
]


def compose(file: Path, settings: dict[str, str]) -> tuple[int, str]:
    """The exit code and output of `docker compose config`."""
    program = next(validator("lib").glob("python*/site-packages/compose/docker-compose"))
    kept = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    done = run(program, "-f", file, "config", "--format", "json", env={**kept, **settings})
    return done.returncode, done.stdout


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.parent.name)
def test_compose(file: Path) -> None:
    code, text = compose(file, SETTINGS)
    assert code == 0, text
    read = json.loads(text)["services"]
    for name, service in yaml.safe_load(file.read_text(encoding="utf-8"))["services"].items():
        assert read[name]["command"] == [
            "example/model" if word.startswith("${MODEL") else word for word in service["command"]
        ]


@pytest.mark.parametrize("file", COMPOSE[:1], ids=lambda file: file.parent.name)
def test_compose_refuses_a_slip_and_a_missing_setting(file: Path, tmp_path: Path) -> None:
    code, text = compose(file, {})
    assert code != 0
    assert "set it" in text
    slipped = tmp_path / "compose.yaml"
    slipped.write_text(file.read_text(encoding="utf-8").replace("restart:", "restarts:"), encoding="utf-8")
    code, text = compose(slipped, SETTINGS)
    assert code != 0
    assert "restarts" in text


def test_compose_reads_strings_as_values(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    words = "".join(f"      - {expanded_scalar(word)}\n" for word in NASTY)
    file.write_text(f"name: x\nservices:\n  a:\n    image: b\n    command:\n{words}", encoding="utf-8")
    code, text = compose(file, {})
    assert code == 0, text
    # `config` writes a file that compose can read again, so it doubles each dollar once more.
    assert json.loads(text)["services"]["a"]["command"] == [word.replace("$", "$$") for word in NASTY]


def manifests() -> dict[str, str]:
    """The examples', and those of plans with on-demand machines and on Azure."""
    found = {file.name: file.read_text(encoding="utf-8") for file in MANIFESTS}
    specs = [case.spec for case in CASES if case.spec]
    specs.append(ONLINE + "market: {clouds: [azure], gpus: [A100-80GB]}\n")
    for spec in specs:
        found |= kubernetes.emit(compile_plan(spec, str(ROOT / "examples" / "qwen3-online" / "spec.yaml")))
    return found


def judged(text: str, tmp_path: Path) -> tuple[int, str]:
    file = tmp_path / "manifest.yaml"
    file.write_text(text, encoding="utf-8")
    done = run(validator("bin", "kubernetes-validate"), "--strict", "-k", "1.31", file)
    return done.returncode, done.stdout


def test_kubernetes(tmp_path: Path) -> None:
    """Strictly by the schemas of Kubernetes 1.31, and a slip is refused."""
    texts = manifests()
    assert len(texts) >= 4
    code, said = judged("\n---\n".join(texts.values()), tmp_path)
    assert code == 0, said
    code, said = judged(next(iter(texts.values())).replace("replicas:", "replica:"), tmp_path)
    assert code != 0


def test_kubernetes_names(tmp_path: Path) -> None:
    """Names and labels are as the API server wants them, which no schema says."""
    for text in manifests().values():
        for document in yaml.safe_load_all(text):
            for label in _labels(document):
                assert len(label) <= 63
                assert label.replace("-", "").replace("_", "").replace(".", "").isalnum()
            name = document["metadata"]["name"]
            assert len(name) <= 63
            assert name.replace("-", "").isalnum()
            assert name == name.lower()
            assert name[0].isalpha()
            assert not name.endswith("-")


def _labels(value: Any) -> list[str]:
    """All values of labels, selectors and node selectors."""
    found = []
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("labels", "matchLabels", "nodeSelector"):
                found += list(item.values())
            else:
                found += _labels(item)
    elif isinstance(value, list):
        found = [label for item in value for label in _labels(item)]
    return found
