"""Schedules at the published settings, in simulation: CGOPipe is what its paper says, and rewrites beat
it."""

from __future__ import annotations

import published_runs
import pytest
import schedules
from published_runs import FACTS, machine_of, read_runs, workload_of

from moeplan.planner.catalog import Catalog
from moeplan.planner.passes.roofline import find_roofline


@pytest.fixture(scope="module")
def rows(catalog: Catalog) -> list[schedules.Compared]:
    runs = [run for run in read_runs(FACTS) if published_runs.SETTINGS[run.box][2] == 1]
    found = [(workload_of(catalog, run), machine_of(catalog, run), run) for run in runs[::2]]
    return [schedules.compare(work, find_roofline(work, machine), run) for work, machine, run in found]


def test_cgopipe_is_never_slower(rows: list[schedules.Compared]) -> None:
    for row in rows:
        others = [seconds for name, seconds in row.seconds.items() if name != "CGOPipe"]
        assert row.seconds["CGOPipe"] <= min(others)
        assert row.work_s >= 0.95 * row.seconds["CGOPipe"]


def test_rewrites_are_never_slower_and_sometimes_faster(rows: list[schedules.Compared]) -> None:
    gains = [1 - row.best.seconds / row.seconds["CGOPipe"] for row in rows]
    assert min(gains) >= 0
    assert max(gains) > 0.001
    assert all(row.proved for row in rows)
