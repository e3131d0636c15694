"""Every checked-in example is what its spec compiles to, from anywhere and under any hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPECS = sorted((ROOT / "examples").glob("*/spec.yaml"))

CODE = """
import sys
from moeplan.planner.cli import main
sys.argv = ["moeplan", *sys.argv[1:]]
main()
"""


def moeplan(*arguments: str, cwd: Path, seed: str = "0") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONHASHSEED": seed}
    return subprocess.run(
        [sys.executable, "-c", CODE, *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )


def test_there_are_examples() -> None:
    assert {path.parent.name for path in SPECS} >= {
        "tinymoe",
        "mixtral-t4",
        "mixtral-l4",
        "qwen3-online",
        "dbrx-4xt4",
    }


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.parent.name)
def test_example_is_current(spec: Path) -> None:
    done = moeplan("check", str(spec), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.parent.name)
def test_same_bytes_anywhere(spec: Path, tmp_path: Path) -> None:
    """Another directory, another way to name the spec, another hash seed: the same files."""
    made = {}
    for seed, cwd, name in (("1", spec.parent, "spec.yaml"), ("99", tmp_path, str(spec))):
        out = tmp_path / seed
        done = moeplan("compile", name, "-o", str(out), cwd=cwd, seed=seed)
        assert done.returncode == 0, done.stderr
        made[seed] = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    assert made["1"] == made["99"]
    checked_in = next(spec.parent.glob("*.plan"))
    assert made["1"] == {
        str(p.relative_to(checked_in)): p.read_bytes()
        for p in sorted(checked_in.rglob("*"))
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.parent.name)
def test_nothing_names_this_machine(spec: Path) -> None:
    """No absolute path, home or host name in any generated file."""
    words = [str(ROOT), str(Path.home()), os.uname().nodename]
    for path in next(spec.parent.glob("*.plan")).rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if len(word) > 4 and word in text], path
