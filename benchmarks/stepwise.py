"""The plain simulator that planner/simulate/schedule.py is compared with: no order is worked out beforehand,
and every running task moves forward in every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WAITS = 5  # the first column of waits


def step_through(
    rows: Sequence[Sequence[int]], lanes: int, seconds: Sequence[Any], demands: Sequence[Sequence[Any]]
) -> tuple[list[Any], list[Any]]:
    """Start and end of each task of the matrix `rows`; exact where `seconds` and `demands` are Fractions."""
    queues = [[n for n, row in enumerate(rows) if row[1] == lane] for lane in range(lanes)]
    complete = [0] * lanes
    start: dict[int, Any] = {}
    end: dict[int, Any] = {}
    left, running = list(seconds), []
    now: Any = 0
    while len(end) < len(rows):
        for lane, queue in enumerate(queues):
            task = queue[complete[lane]] if complete[lane] < len(queue) else None
            if task is None or task in start:
                continue
            if all(complete[other] >= rows[task][WAITS + other] for other in range(lanes)):
                start[task] = now
                running.append(task)
        times_longer = {task: slowness(task, running, demands) for task in running}
        step = min(left[task] * times_longer[task] for task in running)
        now = now + step
        for task in running:
            if left[task] * times_longer[task] == step:
                end[task] = now
                complete[rows[task][1]] += 1
            left[task] -= step / times_longer[task]
        running = [task for task in running if task not in end]
    tasks = range(len(rows))
    return [start[task] for task in tasks], [end[task] for task in tasks]


def slowness(task: int, running: Sequence[int], demands: Sequence[Sequence[Any]]) -> Any:
    """How many times longer `task` takes beside the others: by the most wanted resource that it uses."""
    used = [resource for resource, share in enumerate(demands[task]) if share > 0]
    return max([1, *(sum(demands[other][resource] for other in running) for resource in used)])
