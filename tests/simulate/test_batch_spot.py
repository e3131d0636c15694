"""Batch jobs on machines that are taken away: worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from moeplan.planner.simulate.batch_spot import BatchRuns, run_batch

STEP_S = 600.0


def run(columns: list[list[int]], work_s: float, redone_s: float, cold_s: float = 300.0) -> BatchRuns:
    capacity = np.array(columns, np.int16).T
    usd = np.arange(1.0, 1.0 + len(columns))
    return run_batch(capacity, STEP_S, usd, work_s, cold_s, redone_s, np.array([0]))


def test_undisturbed() -> None:
    done = run([[1] * 10], work_s=1500.0, redone_s=1500.0)
    assert done.seconds.tolist() == [1800.0]
    assert done.usd[0] == pytest.approx(0.5)
    assert done.preemptions.tolist() == [0]


def test_waiting_for_a_machine_costs_time_only() -> None:
    done = run([[0, 0, 1, 1, 1, 1]], work_s=900.0, redone_s=0.0)
    assert done.seconds.tolist() == [2400.0]
    assert done.usd[0] == pytest.approx(1200 / 3600)


def test_resuming_saves_what_was_done() -> None:
    """Lost after 1,200 s, of which 900 s were work: the resumed job still needs 600 s and a cold start."""
    up = [1, 1, 0, 1, 1, 1, 1, 1]
    resumed = run([up], work_s=1500.0, redone_s=100.0)
    anew = run([up], work_s=1500.0, redone_s=1500.0)
    assert resumed.seconds.tolist() == [1800.0 + 300.0 + 700.0]
    assert anew.seconds.tolist() == [1800.0 + 300.0 + 1500.0]
    assert resumed.preemptions.tolist() == anew.preemptions.tolist() == [1]


def test_the_next_zone_takes_over_at_its_price() -> None:
    done = run([[1, 0, 0, 0], [1, 1, 1, 1]], work_s=1200.0, redone_s=0.0)
    assert done.seconds.tolist() == [600.0 + 300.0 + 900.0]
    assert done.usd[0] == pytest.approx((600 * 1.0 + 1200 * 2.0) / 3600)


def test_spells_shorter_than_the_work_never_end_it() -> None:
    assert np.isinf(run([[1, 0]], work_s=900.0, redone_s=900.0).seconds[0])
    assert np.isfinite(run([[1, 0]], work_s=900.0, redone_s=0.0).seconds[0])
