"""How long the packing of a fleet takes, against Mélange's own program (8 slices per bucket).

    python benchmarks/fleet_milp.py [SECONDS]

Random markets of GPU types of random speed, price and taste; some cannot serve the costliest sizes. Both
programs have the same target utilisation and are solved by CBC on one thread; Mélange's stops after SECONDS
(default 60). CPU seconds count the solver's process, so that they hold on a busy machine. HiGHS is not used.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from fleet_instances import in_regions, random_problem, slice_ilp
from tables import show

from moeplan.planner.packing import solver
from moeplan.planner.packing.milp import solve_fleet
from moeplan.planner.packing.problem import Problem

_T = TypeVar("_T")
_SLICES = 8


def markets() -> list[tuple[str, Problem, bool]]:
    """Name, problem, and whether Mélange's program is worth trying."""
    small = [(f"{types} types x 60", random_problem(1, types, 60, 32.0), True) for types in (4, 16, 64)]
    regions = [
        (f"64 types in 4 regions x 60, seed {s}", in_regions(random_problem(s, 64, 60, 32.0), 4, s), s == 0)
        for s in range(3)
    ]
    distinct = [(f"256 types x 60, seed {s}", random_problem(s, 256, 60, 32.0), False) for s in range(3)]
    large = [
        (
            f"250 types in 4 regions x 100, seed {s}",
            in_regions(random_problem(s, 250, 100, 32.0), 4, s),
            False,
        )
        for s in range(3)
    ]
    return [*small, *regions, *distinct, *large]


def _cpu_s() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _timed(step: Callable[[], _T]) -> tuple[_T, float, float]:
    """The result, elapsed seconds, CPU seconds with those of child processes."""
    started, cpu = time.perf_counter(), _cpu_s()
    result = step()
    return result, time.perf_counter() - started, _cpu_s() - cpu


def _row(name: str, problem: Problem, both: bool, most_s: float) -> list[str]:
    ours, elapsed, cpu = _timed(lambda: solve_fleet(problem))
    assert ours is not None
    row = [name, f"{elapsed:.1f}", f"{cpu:.1f}", f"{ours.usd:.3f}", ours.status, f"{ours.gap:.2%}"]
    if not both:
        return [*row, "-", "-", "-", ""]
    (usd, proven), elapsed, cpu = _timed(lambda: slice_ilp(problem, _SLICES, most_s))
    found = f"{usd:.3f}" if math.isfinite(usd) else "none"
    return [*row, f"{elapsed:.1f}", f"{cpu:.1f}", found, "optimal" if proven else "stopped"]


def main() -> None:
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    most_s = float(sys.argv[1]) if len(sys.argv) == 2 else 60.0
    solver._has_highs = lambda: False  # type: ignore[assignment]
    rows = []
    for name, problem, both in markets():
        rows.append(_row(name, problem, both, most_s))
        print(f"  {name}: {' '.join(rows[-1][1:])}", file=sys.stderr, flush=True)
    heads = ["market", "s", "CPU s", "USD/h", "", "gap", "slices: s", "CPU s", "USD/h", ""]
    show(heads, rows)
    used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(f"memory at most: {used[0] / 2**10:.0f} MiB here, {used[1] / 2**10:.0f} MiB in the solver")


if __name__ == "__main__":
    main()
