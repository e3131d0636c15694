"""Schedule -> schedule.py: the program's own text with this plan's constants, compiled by Numba on first
use."""

from __future__ import annotations

import re
from importlib import resources

from moeplan.codegen.render import render
from moeplan.planner.ir.schedule import Schedule
from moeplan.runtime_min.plan_file import SCHEDULE_FORMAT

_MARK = "# --- emitted from here ---\n"
_FIELD = re.compile(r"    (\w+): int(?:  # (.*))?$", re.MULTILINE)


def schedule_text(schedule: Schedule) -> str:
    """The text of schedule.py for `schedule`."""
    meanings = _meanings(type(schedule.constants).__name__)
    return render(
        "schedule/schedule.py.j2",
        name=schedule.name,
        kind=schedule.kind,
        schedule_format=SCHEDULE_FORMAT,
        constants=[(k, v, meanings[k]) for k, v in schedule.constants._asdict().items()],
        order=_emitted("programs", "order"),
        program=_emitted("programs", schedule.kind),
    )


def _source(folder: str, module: str) -> str:
    return resources.files("moeplan.planner").joinpath(folder, f"{module}.py").read_text(encoding="utf-8")


def _emitted(folder: str, module: str) -> str:
    """What follows the mark in a program's source."""
    return _source(folder, module).partition(_MARK)[2].strip()


def _meanings(record: str) -> dict[str, str]:
    """The comments at the fields of a record of constants."""
    text = _source("ir", "schedule").partition(f"class {record}(")[2].partition("\n\n\n")[0]
    return dict(_FIELD.findall(text))
