"""What report.html adds to a compilation: processor seconds with and without it, and its size.

python benchmarks/report_time.py [ROUNDS]

Processor seconds of the whole process and its solvers, the least of some rounds taken in turn, so that other
work on the machine matters little. Times of the first compilation on a machine include compiling with Numba.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOEPLAN = Path(sys.executable).with_name("moeplan")


def processor_s(*arguments: str) -> float:
    """User and system seconds of one run and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([MOEPLAN, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{'example':14} {'without':>9}  {'with':>9}  {'added':>9} {'size':>9}")
    for spec in sorted((ROOT / "examples").glob("*/spec.yaml")):
        with tempfile.TemporaryDirectory() as folder:
            without, whole = [], []
            for _ in range(rounds):
                without.append(processor_s("compile", str(spec), "-o", f"{folder}/a", "--no-html"))
                whole.append(processor_s("compile", str(spec), "-o", f"{folder}/b"))
            size = (Path(folder) / "b" / "report.html").stat().st_size
        added = min(whole) - min(without)
        seconds = "  ".join(f"{value:7.2f} s" for value in (min(without), min(whole), added))
        print(f"{spec.parent.name:14} {seconds} {size / 1e3:6.0f} kB")


if __name__ == "__main__":
    main()
