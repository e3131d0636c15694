"""The arrows of docs/architecture.md, read off the imports of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("planner", "codegen", "templates", "runtime_min")

# What the modules below a prefix may import of ours; the longest prefix that matches decides.
ALLOWED = {
    "moeplan.planner.cli": ("moeplan",),
    "moeplan.planner.diagnostics": (),
    "moeplan.planner.units": (),
    "moeplan.planner.suggest": (),
    "moeplan.planner.ir": ("moeplan.planner.ir", "moeplan.planner.diagnostics"),
    "moeplan.planner": ("moeplan.planner",),
    "moeplan.codegen": (
        "moeplan.codegen",
        "moeplan.templates",
        "moeplan.planner.ir",
        "moeplan.planner.units",
        "moeplan.runtime_min.plan_file",
    ),
    "moeplan.templates": (),
    "moeplan.runtime_min": ("moeplan.runtime_min",),
}
FORBIDDEN = {
    "moeplan.planner": ("torch", "jinja2", "tokenizers", "safetensors", "transformers"),
    "moeplan.codegen": ("torch",),
    "moeplan.runtime_min": ("transformers", "networkx", "pulp", "typer"),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append((".".join(("moeplan", *parts)).removesuffix(".__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def rule(table: dict[str, tuple[str, ...]], module: str) -> tuple[str, ...]:
    matching = [prefix for prefix in table if module == prefix or module.startswith(prefix + ".")]
    return table[max(matching, key=len)] if matching else ()


def below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_arrows(module: str, path: Path) -> None:
    allowed, forbidden = rule(ALLOWED, module), rule(FORBIDDEN, module)
    for name in imports(path):
        packages = ("moeplan", "moeplan.planner", "moeplan.codegen", "moeplan.runtime_min")
        if name.startswith("moeplan") and name not in packages:
            assert below(name, allowed), f"{module} must not import {name}"
        assert not below(name, forbidden), f"{module} must not import {name}"


def loaded_by(code: str) -> set[str]:
    """Top-level packages in sys.modules after running `code` in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sorted(sys.modules))"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


HELP = """
import sys
from moeplan.planner.cli import main
sys.argv = ["moeplan", "--help"]
try:
    main()
except SystemExit:
    pass
"""


def test_help_is_light() -> None:
    assert not loaded_by(HELP) & {"torch", "numpy", "numba", "pulp", "networkx", "yaml", "jinja2"}


def test_plan_file_is_standard_library() -> None:
    assert not loaded_by("import moeplan.runtime_min.plan_file") & {"torch", "numpy", "numba", "yaml"}
