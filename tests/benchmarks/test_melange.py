"""Mélange's published fleets, where their tables are at hand: MOEPLAN_ACCURACY_DATA's melange.json."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import melange
import pytest

TABLES = Path(os.environ.get("MOEPLAN_ACCURACY_DATA", "no such folder")) / "melange.json"


@pytest.mark.skipif(not TABLES.is_file(), reason="needs MOEPLAN_ACCURACY_DATA")
def test_published_costs_and_savings() -> None:
    """36 rows follow from their allocations; two printed costs of single types do not, both misprints."""
    rows = melange.read_rows(TABLES)
    assert len(rows) == 36
    assert all(row.recomputed == pytest.approx(row.printed, abs=0.006) for row in rows)
    wrong = {(row.name, gpu) for row in rows for gpu in row.misprints}
    assert wrong == {("arena 120 ms 8/s", "A10G"), ("arena 40 ms 8/s", "H100")}
    savings = [row.saving for row in rows]
    assert statistics.median(savings) == pytest.approx(0.183, abs=5e-4)
    assert max(savings) == pytest.approx(0.405, abs=5e-4)
    assert savings.count(0.0) == 4
