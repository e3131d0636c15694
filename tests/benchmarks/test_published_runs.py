"""The benchmark on published runs: its own arithmetic, and the ranking that it claims."""

from __future__ import annotations

import math

import numpy as np
import published_runs as published
import pytest

from moeplan.planner.catalog import Catalog


def test_spearman_shares_ranks_among_equals() -> None:
    """By hand: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3 correlate with 4.5 / sqrt(4.5 * 5)."""
    assert published.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert published.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert published.spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)


def test_the_fit_recovers_known_figures() -> None:
    """Synthetic runs: time = a/prefill + b/link, measured with 0.12 and 0.6; 2 % between candidates."""
    known = {"prefill": 0.12, "link": 0.6}
    errors = [
        published.tabulate(
            lambda prefill, link, a=a: math.log(
                (a / known["prefill"] + 10 / known["link"]) / (a / prefill + 10 / link)
            )
        )
        for a in (0.2, 2.0, 20.0)
    ]
    prefill, link = published.fit(errors)
    assert published.PREFILL[prefill] == pytest.approx(known["prefill"], rel=0.02)
    assert published.LINK[link] == pytest.approx(known["link"], rel=0.02)


def test_a_run_left_out_does_not_help_its_own_fit() -> None:
    """Two runs agree on one candidate, the third on another: left out, it is missed."""
    shape = (len(published.PREFILL), len(published.LINK))
    agree, odd = np.ones(shape), np.ones(shape)
    agree[3, 4], odd[5, 6] = 0.0, 0.0
    runs = [published.read_runs(published.FACTS)[i] for i in (0, 4, 6)]
    logs = published.calibrated(runs, [agree, agree, odd])
    assert logs[0] == (0.0, 0.0, 0.0)
    assert logs[2] == (1.0, 1.0, 1.0)


def test_figures_are_replaced_where_they_count(catalog: Catalog) -> None:
    run = published.read_runs(published.FACTS)[0]
    machine = published.with_figures(published.machine_of(catalog, run), 0.2, 0.5)
    assert machine.level("gpu").offload_prefill_efficiency == 0.2
    assert machine.level("dram").up_efficiency == 0.5


def test_uncalibrated_predictions_rank_the_runs(catalog: Catalog) -> None:
    runs = published.read_runs(published.FACTS)
    assert len(runs) == 15
    predicted = [
        published.predict(published.workload_of(catalog, run), published.machine_of(catalog, run), run)
        for run in runs
    ]
    rates = [policy.generated_tokens_per_s.value for policy in predicted]
    assert published.spearman([run.tokens_per_s for run in runs], rates) >= 0.95
