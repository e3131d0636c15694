"""Schedule, costs of its tasks -> how one of many decode passes goes: where the time is, and what idles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from moeplan.planner.ir.schedule import Schedule, TaskTime
from moeplan.planner.programs import Issued, Step, issue, lanes, ops
from moeplan.planner.programs.order import WAIT
from moeplan.planner.simulate.schedule import Stretch, Timeline, simulate, stretch
from moeplan.planner.strategies.task_costs import TaskCosts, of_rows

_LAYER = 2
_PASSES = 3  # simulated; the last is in the steady state


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A schedule and the passes that were simulated; all figures are of the last of them."""

    schedule: Schedule
    steps: tuple[Step, ...]
    issued: Issued
    timeline: Timeline

    @property
    def seconds(self) -> float:
        """From the end of the pass before to its own."""
        return self.timeline.makespan_s - self._begin_s

    @property
    def stretch(self) -> Stretch:
        """Where its time goes."""
        return stretch(self.timeline, self.issued.starts[-1])

    @property
    def tasks(self) -> int:
        """How many it has."""
        return len(self.issued.rows) - self.issued.starts[-1]

    @property
    def waits(self) -> int:
        """How many its tasks wait for."""
        return _waits(self.issued)

    @property
    def implied_waits(self) -> int:
        """Those that others imply, and that a lean schedule is without."""
        every = replace(self.schedule, constants=self.schedule.constants._replace(lean=0))
        return _waits(issue(every, self.steps)) - self.waits

    def window(self, most: int) -> tuple[TaskTime, ...]:
        """The tasks of the last layers of the pass before and the first layers of this one: of at least one
        layer each, of more as long as they are no more than `most`. What this pass fetches for the next one's
        first layers comes long after and is left out."""
        rows, layers = self.issued.rows, self.schedule.constants.layers
        before, first = self.issued.starts[-2:]
        shift = np.where(np.arange(len(rows)) >= first, layers, 0)
        distance = rows[:, _LAYER] + shift - layers  # in layers, from the boundary between the passes
        distance[:before] = -layers
        near = [np.flatnonzero((distance >= -n) & (distance < n)) for n in range(1, layers + 1)]
        chosen = max((at for at in near if len(at) <= most), key=len, default=near[0])
        return _unbroken([self._task_time(int(at), self._begin_s) for at in chosen])

    @property
    def _begin_s(self) -> float:
        return float(self.timeline.end_s[: self.issued.starts[-1]].max(initial=0.0))

    def _task_time(self, at: int, zero_s: float) -> TaskTime:
        op, lane, layer, item = self.issued.rows[at, :4].tolist()
        return TaskTime(
            lane=lanes(self.schedule)[lane],
            op=ops(self.schedule)[op],
            layer=layer,
            item=item,
            start_s=float(self.timeline.start_s[at]) - zero_s,
            end_s=float(self.timeline.end_s[at]) - zero_s,
        )


def _unbroken(tasks: list[TaskTime]) -> tuple[TaskTime, ...]:
    """The tasks up to the first stretch, longer than any of them, in which none runs."""
    longest_s = max(task.end_s - task.start_s for task in tasks)
    latest_s, late_s = -math.inf, math.inf
    for task in sorted(tasks, key=lambda task: task.start_s):
        if task.start_s > latest_s + longest_s > 0.0:
            late_s = task.start_s
            break
        latest_s = max(latest_s, task.end_s)
    return tuple(task for task in tasks if task.start_s < late_s)


def time_passes(schedule: Schedule, steps: tuple[Step, ...], costs: TaskCosts) -> Timed:
    """Simulate consecutive passes. Raises KeyError where an operation has no cost."""
    issued = issue(schedule, steps)
    seconds, demands = of_rows(issued.rows, ops(schedule), costs)
    timeline = simulate(issued.rows, len(lanes(schedule)), seconds, demands)
    return Timed(schedule=schedule, steps=steps, issued=issued, timeline=timeline)


def time_decode(schedule: Schedule, micro_batches: int, costs: TaskCosts) -> Timed:
    """Simulate full decode passes, each followed by another, to the steady state."""
    return time_passes(schedule, (Step(micro_batches, 0, micro_batches),) * _PASSES, costs)


def _waits(issued: Issued) -> int:
    return int((issued.rows[issued.starts[-1] :, WAIT:] > 0).sum())
