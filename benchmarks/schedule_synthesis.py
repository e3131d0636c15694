"""How long schedules take to make, prove and compile: 94 layers, 32 micro-batches, and a first use.

usage: python benchmarks/schedule_synthesis.py

The emitted module is imported and asked for a first pass in a fresh interpreter with an empty cache, and
again with the cache that this left; the time of importing Numba is in both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from moeplan.codegen.emit.schedule_py import schedule_text
from moeplan.planner import programs, schedules
from moeplan.planner.ir.schedule import OffloadConstants, StreamConstants
from moeplan.planner.programs.proof import first_offence, neighbours

LAYERS, MICRO_BATCHES = 94, 32
SIZES = OffloadConstants(*[0] * len(OffloadConstants._fields))._replace(
    layers=LAYERS,
    micro_batches=MICRO_BATCHES,
    pieces=10,
    pages=MICRO_BATCHES,
    slots=MICRO_BATCHES + 2,
    cpu_attended=MICRO_BATCHES,
)
STREAM = StreamConstants(*[0] * len(StreamConstants._fields))._replace(layers=32, pages=9, slots=4)
FIRST_USE = """
import importlib.util, sys, time
start = time.perf_counter()
spec = importlib.util.spec_from_file_location("schedule", sys.argv[1])
module = sys.modules["schedule"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.issue(module.new_clock(), 1, 1, 1)
print(time.perf_counter() - start)
"""


def synthesis() -> tuple[float, float, int]:
    """Seconds to issue the passes that the proof looks at and to prove them, and how many tasks these
    have."""
    schedule = schedules.named(SIZES, "CGOPipe")
    steps = neighbours(schedule)
    begin = time.perf_counter()
    issued = programs.issue(schedule, steps)
    middle = time.perf_counter()
    if first_offence(schedule, issued):
        raise SystemExit("the schedule is not free of races")
    return middle - begin, time.perf_counter() - middle, len(issued.rows)


def first_use(name: str, text: str) -> None:
    """Print seconds until a module has issued a pass, with an empty cache and with a full one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "schedule.py"
        path.write_text(text)
        command = [sys.executable, "-c", FIRST_USE, str(path)]
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        taken = [
            float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
            for _ in range(2)
        ]
    print(f"{name:8} first use {taken[0]:.2f} s, then {taken[1]:.2f} s")


def main() -> None:
    synthesis()  # loads the compiled functions, or compiles them
    issue_s, proof_s, tasks = synthesis()
    print(f"{LAYERS} layers, {MICRO_BATCHES} micro-batches, {tasks:,} tasks in the passes that are proved:")
    print(f"issue {issue_s:.3f} s, proof {proof_s:.3f} s")
    first_use("offload", schedule_text(schedules.named(SIZES, "CGOPipe")))
    first_use("stream", schedule_text(schedules.named(STREAM, "paged")))


if __name__ == "__main__":
    main()
