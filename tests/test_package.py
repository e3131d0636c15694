"""The wheel holds every folder, template and data file, and works where only it is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("planner", "codegen", "templates", "runtime_min")
DATA = {".j2", ".yaml", ".csv", ".typed", ".tf", ".hcl", ".tftpl", ".md"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows or would add, not from what builds left behind."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *FOLDERS, "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_every_source_file_is_in_the_wheel(wheel: Path) -> None:
    """A package missing from pyproject's list is silently absent: compare file by file."""
    wanted = {
        f"moeplan/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in DATA | {".py"} and "__pycache__" not in path.parts
    }
    assert wanted == {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("moeplan/")}


def test_the_wheel_compiles_a_spec_away_from_the_sources(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere and run from there, templates and catalog are found."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "name: elsewhere\nmodel: mixtral-8x7b\nmachine: g4dn.16xlarge\n"
        "workload: {batch: {requests: 100, prompt: 64, output: 32}}\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import moeplan.planner.cli as cli\n"
        f"assert cli.__file__.startswith({str(site)!r}), cli.__file__\n"
        f"sys.argv = ['moeplan', 'compile', {str(spec)!r}]\ncli.main()\n"
    )
    # -S and PYTHONPATH keep the editable install out and the dependencies in.
    dependencies = Path(pytest.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.append({str(dependencies)!r})\n{code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "elsewhere.plan" / "plan.json").is_file()
