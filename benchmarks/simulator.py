"""How fast schedules are simulated, on one core: task events per second of a decode pass of 94 layers and 32
micro-batches, issued as CGOPipe does, and of the plain simulator that the tests compare with.

usage: python benchmarks/simulator.py [PASSES]

A task is one event. "alone" and "shared" time an order that is worked out already; "simulate" does all from
the matrix on. Best of many runs. Compiling is timed in a process of its own with an empty cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from stepwise import step_through

from moeplan.planner.simulate.schedule import makespan, order_of, simulate, stretch

LAYERS, MICRO_BATCHES, AHEAD, SLOTS = 94, 32, 2, 34
LANES = GPU, H2D, D2H, CPU, COPIER, DISK = range(6)
PRE, OFFLOAD, ATTEND, LOAD, STAGE, READ, COPY, POST = range(8)
MILLISECONDS = np.array([0.4, 0.1, 2.6, 0.1, 1.3, 1.5, 1.1, 1.9])  # by operation; the CPU is busy longest
# By operation: the shares of DRAM bandwidth, the link up, the link down and cores.
DEMANDS = np.array(
    [
        [0.0, 0.0, 0.0, 0.0],
        [0.1, 0.0, 1.0, 0.0],
        [0.7, 0.0, 0.0, 0.9],
        [0.1, 1.0, 0.0, 0.0],
        [0.5, 0.0, 0.0, 0.1],
        [0.1, 0.0, 0.0, 0.1],
        [0.2, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
)
COLD = """
import time
started = time.perf_counter()
import numpy as np
from moeplan.planner.simulate.schedule import makespan, order_of
imported = time.perf_counter()
order = order_of(np.array([[0, 0, 0, 0, -1, 0, 0], [0, 1, 0, 0, -1, 0, 0]]), 2)
makespan(order, np.ones(2))
alone = time.perf_counter()
makespan(order, np.ones(2), np.ones((2, 1)))
print(imported - started, alone - imported, time.perf_counter() - alone)
"""

Key = tuple[int, int]  # operation, and layer and item counted on


class Issue:
    """Rows in the making: a task waits for those that are named, if they have been issued."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self._counts = [0] * len(LANES)
        self._issued: dict[Key, tuple[int, int]] = {}

    def put(self, op: int, lane: int, number: int, *after: Key) -> None:
        waits = [0] * len(LANES)
        for key in after:
            other, count = self._issued.get(key, (lane, 0))
            waits[other] = max(waits[other], count)
        self._counts[lane] += 1
        self._issued[op, number] = lane, self._counts[lane]
        self.rows.append([op, lane, *divmod(number, MICRO_BATCHES), -1, *waits])


def schedule(passes: int) -> NDArray[np.int64]:
    """The rows of `passes` decode passes, about 21,000 each."""
    issue, n = Issue(), MICRO_BATCHES
    last = passes * LAYERS * n
    for number in range(AHEAD):
        attend(issue, number)
    for number in range(last):
        issue.put(LOAD, H2D, number, (ATTEND, number))
        from_disk = number % 8 == 7
        issue.put(READ if from_disk else STAGE, DISK if from_disk else COPIER, number, (COPY, number - SLOTS))
        layer_before = number - number % n - 1
        issue.put(COPY, H2D, number, (STAGE, number), (READ, number), (POST, layer_before - n))
        issue.put(POST, GPU, number, (LOAD, number), (COPY, layer_before))
        if number + AHEAD < last:
            attend(issue, number + AHEAD)
    return np.array(issue.rows, np.int64)


def attend(issue: Issue, number: int) -> None:
    before = number - MICRO_BATCHES
    issue.put(PRE, GPU, number, (POST, before), (OFFLOAD, before))
    issue.put(OFFLOAD, D2H, number, (PRE, number), (ATTEND, before))
    issue.put(ATTEND, CPU, number, (OFFLOAD, number), (LOAD, before))


def best(work: Callable[[], object], least_s: float) -> float:
    """The least seconds of `work` over repetitions that fill `least_s` seconds, two at least."""
    taken: list[float] = []
    end = time.perf_counter() + least_s
    while len(taken) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def compile_seconds() -> list[float]:
    with tempfile.TemporaryDirectory() as cache:
        command, environment = [sys.executable, "-c", COLD], {**os.environ, "NUMBA_CACHE_DIR": cache}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    passes = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    rows, lanes = schedule(passes), len(LANES)
    noise = np.random.default_rng(0).uniform(0.9, 1.1, len(rows))
    seconds, demands = MILLISECONDS[rows[:, 0]] / 1e3 * noise, DEMANDS[rows[:, 0]]
    order = order_of(rows, lanes)
    timeline = simulate(rows, lanes, seconds, demands)
    whole = stretch(timeline)
    print(f"{len(rows)} tasks, {lanes} lanes, {len(order.before) / len(rows):.2f} predecessors a task")
    print(f"makespan {makespan(order, seconds):.3f} s alone, {whole.seconds:.3f} s shared")

    table = {
        "alone": lambda: makespan(order, seconds),
        "shared": lambda: makespan(order, seconds, demands),
        "order": lambda: order_of(rows, lanes),
        "simulate, shared": lambda: simulate(rows, lanes, seconds, demands),
        "stretch": lambda: stretch(timeline),
    }
    speeds = {name: len(rows) / best(work, 1.0) for name, work in table.items()}
    for name, uses in (("alone", np.empty((len(rows), 0))), ("shared", demands)):
        work = partial(step_through, rows.tolist(), lanes, seconds.tolist(), uses.tolist())
        speeds[f"plain Python, {name}"] = len(rows) / best(work, 0.0)
    print(f"{'':22} tasks/s  of plain")
    for name, speed in speeds.items():
        plain = speeds["plain Python, alone" if name.endswith("alone") else "plain Python, shared"]
        print(f"{name:22} {speed / 1e6:7.2f} M  {speed / plain:6.0f}")
    for name, compiled_s in zip(("import", "order and alone", "shared"), compile_seconds(), strict=True):
        print(f"cold {name:16} {compiled_s:6.2f} s")


if __name__ == "__main__":
    main()
