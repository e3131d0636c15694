"""Accuracy on measured data that is not part of the project: MOEPLAN_ACCURACY_DATA names a folder with
silicon/sample.csv and accuracy/*.csv (see the benchmarks' own texts for where they come from)."""

from __future__ import annotations

import os
from pathlib import Path

import kernel_accuracy as kernels
import numpy as np
import pytest
import serving_accuracy as accuracy
from serving_rows import Group, read_groups

from moeplan.planner.catalog import Catalog, machines

DATA = Path(os.environ.get("MOEPLAN_ACCURACY_DATA", "no such folder"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not DATA.is_dir(), reason="needs MOEPLAN_ACCURACY_DATA")]


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return read_groups(DATA / "silicon" / "sample.csv")[0]


@pytest.fixture(scope="module")
def left_out(groups: list[Group]) -> accuracy.Table:
    return accuracy.left_out(groups, lambda g: (g.family, g.system))


def medians(table: accuracy.Table, log_error: accuracy.Array) -> tuple[float, float]:
    dense = table.of(lambda g: g.dense)
    error = accuracy.relative(log_error)
    return float(np.median(error[dense])), float(np.median(error[~dense]))


def test_inter_token_latency_of_left_out_models(left_out: accuracy.Table) -> None:
    dense, moe = medians(left_out, left_out.log_error)
    assert dense <= 0.20
    assert moe <= 0.35
    dense, moe = medians(left_out, accuracy.calibrated(left_out))
    assert dense <= 0.12
    assert moe <= 0.20


def test_intervals_hold_what_they_promise(left_out: accuracy.Table) -> None:
    for errors, kind in ((left_out.log_error, "datasheet"), (accuracy.calibrated(left_out), "calibrated")):
        assert 0.80 <= accuracy.coverage(errors, machines.SIGMA[kind]) <= 0.98


def test_kernels_of_left_out_shapes(catalog: Catalog) -> None:
    """Distinct experts are right; charging a token's k experts is clearly worse."""
    shapes, _ = kernels.read_shapes(DATA / "accuracy")
    distinct, topk = (
        np.concatenate(list(kernels.left_out(catalog, shapes, only).values())) for only in (False, True)
    )
    assert distinct.mean() <= 0.15
    assert topk.mean() > 2 * distinct.mean()
