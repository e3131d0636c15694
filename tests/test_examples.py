"""Every checked-in example is what its spec compiles to, from anywhere and under any hash seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import moeplan

ROOT = Path(__file__).parents[1]
SPECS = sorted((ROOT / "examples").glob("*/spec.yaml"))

# Compiles every (folder to be in, name of the spec, folder for the plan), all in one process.
CODE = """
import json, os, sys
from moeplan.planner.cli import main
for folder, name, out in json.loads(sys.argv[1]):
    os.chdir(folder)
    sys.argv = ["moeplan", "compile", name, "-o", out]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            sys.exit(f"{name} in {folder}: exit code {stop.code}")
assert not {"torch", "transformers", "tokenizers"} & sys.modules.keys()
"""
Files = dict[str, dict[str, bytes]]


def compiled(seed: str, jobs: list[tuple[Path, str, Path]]) -> Files:
    """Every file of every plan, by the example's name and its own."""
    env = {**os.environ, "PYTHONHASHSEED": seed}
    told = json.dumps([list(map(str, job)) for job in jobs])
    done = subprocess.run([sys.executable, "-c", CODE, told], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {out.name: files(out) for _, _, out in jobs}


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Compiled in another folder, in reverse order, with another hash seed, and without importing torch."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return compiled("99", [(folder, str(spec), folder / spec.parent.name) for spec in reversed(SPECS)])


def test_there_are_examples() -> None:
    assert {path.parent.name for path in SPECS} >= {
        "tinymoe",
        "mixtral-t4",
        "mixtral-l4",
        "qwen3-online",
        "dbrx-4xt4",
    }


def test_examples_are_current() -> None:
    """Compiled beside the spec, one after the other."""
    done = moeplan("check", *SPECS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("are current") == len(SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.parent.name)
def test_same_bytes_anywhere(spec: Path, elsewhere: Files) -> None:
    """Another directory, another way to name the spec, another hash seed, other specs before: the same files,
    which are the checked-in ones."""
    assert elsewhere[spec.parent.name] == files(next(spec.parent.glob("*.plan")))


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.parent.name)
def test_nothing_names_this_machine(spec: Path) -> None:
    """No absolute path, home or host name in any generated file."""
    words = [str(ROOT), str(Path.home()), os.uname().nodename]
    for path in next(spec.parent.glob("*.plan")).rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert not [word for word in words if len(word) > 4 and word in text], path
