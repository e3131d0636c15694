"""schedule.py: the same rows as the planner issues, compiled and in plain Python, without importing
moeplan."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moeplan.codegen.emit.schedule_py import schedule_text
from moeplan.planner import programs, schedules
from moeplan.planner.ir.schedule import OffloadConstants, Schedule, StreamConstants
from moeplan.planner.programs.proof import neighbours

CGOPIPE = schedules.begin_next_step(
    schedules.named(OffloadConstants(3, 4, 2, 4, 6, 1, 1, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0), "CGOPipe")
)
PAGED = schedules.named(StreamConstants(3, 5, 1, 3, 0, 0, 0, 0, 0, 0), "paged")


def load(schedule: Schedule, folder: Path) -> ModuleType:
    path = folder / f"{schedule.kind}_schedule.py"
    path.write_text(schedule_text(schedule))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def expected(schedule: Schedule) -> list[list[int]]:
    rows: list[list[int]] = programs.issue(schedule, neighbours(schedule)).rows.tolist()
    return rows


@pytest.mark.parametrize("schedule", [CGOPIPE, PAGED], ids=lambda s: s.kind)
def test_compiled(schedule: Schedule, tmp_path: Path) -> None:
    module = load(schedule, tmp_path)
    clock, rows = module.new_clock(), []
    for step in neighbours(schedule):
        rows += module.issue(clock, *step).tolist()
    assert rows == expected(schedule)
    assert schedule.kind == module.KIND
    assert programs.lanes(schedule) == module.LANES
    assert module.SCHEDULE._asdict() == schedule.constants._asdict()


_PLAIN = """
import json, runpy, sys
module = runpy.run_path(sys.argv[1])
clock = module["new_clock"]()
rows = [row for step in json.loads(sys.argv[2]) for row in module["issue"](clock, *step).tolist()]
assert not [name for name in sys.modules if name.startswith("moeplan")]
print(json.dumps(rows))
"""


@pytest.mark.parametrize("schedule", [CGOPIPE, PAGED], ids=lambda s: s.kind)
def test_plain_python(schedule: Schedule, tmp_path: Path) -> None:
    """The same text without Numba's compiler, in a process of its own: it needs nothing of ours."""
    path = tmp_path / "schedule.py"
    path.write_text(schedule_text(schedule))
    steps = json.dumps(neighbours(schedule))
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, str(path), steps],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected(schedule)


def test_constants_are_explained() -> None:
    """Every constant of the emitted file says what it is."""
    text = schedule_text(CGOPIPE)
    for name, value in CGOPIPE.constants._asdict().items():
        assert f"    {name}: int  # " in text
        assert f"    {name}={value},\n" in text
