"""Schedule -> schedule.py: the program's loops with this plan's constants, compiled by Numba on first use."""

from __future__ import annotations

from moeplan.codegen.render import render
from moeplan.planner.ir.schedule import LANES, OPS, Schedule
from moeplan.runtime_min.plan_file import SCHEDULE_FORMAT


def schedule_text(schedule: Schedule) -> str:
    """The text of schedule.py for `schedule`."""
    return render(
        f"schedule/{schedule.kind}.py.j2",
        schedule=schedule,
        schedule_format=SCHEDULE_FORMAT,
        lanes=LANES[schedule.kind],
        ops=OPS[schedule.kind],
    )
