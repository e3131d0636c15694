"""How long the command line takes: `moeplan --help` and compiling each example, beside a bare interpreter.

usage: python benchmarks/startup.py [RUNS]

Whole processes, in turn, so that a machine whose speed drifts treats all alike; medians, and ratios to the
bare interpreter. Plans are written once before the timing, as in everyday use.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOEPLAN = [sys.executable, "-c", "from moeplan.planner.cli import main; main()"]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as out:
        commands = {
            "bare interpreter": [sys.executable, "-c", "pass"],
            "moeplan --help": [*MOEPLAN, "--help"],
        }
        for spec in sorted(ROOT.glob("examples/*/spec.yaml")):
            name = spec.parent.name
            commands[f"compile {name}"] = [*MOEPLAN, "compile", str(spec), "-o", f"{out}/{name}"]
        for command in commands.values():
            seconds(command)
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                taken[name].append(seconds(command))
    bare = statistics.median(taken["bare interpreter"])
    print(f"{'':28}  median s  min s  max s  ratio")
    for name, times in taken.items():
        middle = statistics.median(times)
        print(f"{name:28}  {middle:8.3f}  {min(times):5.3f}  {max(times):5.3f}  {middle / bare:5.1f}")


if __name__ == "__main__":
    main()
