"""Labels of measured serving runs are repaired by rules on labels alone; the fit finds what it was given."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from fitting import fit
from serving_rows import read_groups, shards

from moeplan.planner.serving import Sharding


def row(tensor: int, groups: int, moe_tensor: int, experts: int) -> dict[str, str]:
    sizes = (tensor, groups, moe_tensor, experts)
    keys = ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    return {key: str(size) for key, size in zip(keys, sizes, strict=True)}


@pytest.mark.parametrize(
    ("labels", "meant"),
    [
        ((4, 1, 4, 1), Sharding(tensor=4)),  # plain tensor parallelism
        ((8, 1, 1, 8), Sharding(tensor=8)),  # experts whole on eight GPUs
        ((1, 8, 1, 8), Sharding(tensor=1, groups=8)),  # attention data parallelism
        ((16, 1, 4, 4), Sharding(tensor=4)),  # a run named tp4_ep4: four GPUs, counted twice
        ((4, 4, 1, 16), Sharding(tensor=4)),  # the same run, counted as data parallelism
        ((1, 64, 8, 8), Sharding(tensor=1, groups=8)),  # tp8_ep8 with attention data parallelism
    ],
)
def test_gpus_counted_twice_count_once(labels: tuple[int, int, int, int], meant: Sharding) -> None:
    assert shards(row(*labels)) == meant


def test_rows_that_cannot_be_are_left_out(tmp_path: Path) -> None:
    """235 B weights of one byte do not fit one H200; on four they do."""
    run = {"mode": "agg", "model_path": "Qwen/Qwen3-235B-A22B-FP8", "system": "h200_sxm", "backend": "vllm"}
    run |= {"gemm_quant_mode": "fp8", "moe_quant_mode": "fp8", "pp_size": "1", "batch_size": "8"}
    run |= {"isl": "1000", "osl": "100", "silicon_ttft_ms": "100", "silicon_tpot_ms": "20"}
    rows = [run | row(1, 1, 1, 1) | {"id": "one"}, run | row(4, 1, 4, 1) | {"id": "four"}]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    groups, dropped = read_groups(tmp_path / "rows.csv")
    assert [group.rows for group in groups] == [("four",)]
    assert dropped == 1


def test_fit_finds_what_it_was_given() -> None:
    """Constants of a curve, one row in ten far off."""
    x = np.linspace(1.0, 50.0, 60)
    y = 0.4 * x + 3.0
    y[::10] *= 3.0
    found = fit(
        lambda c: np.log((c[0] * x + c[1]) / y),
        np.array([1.0, 1.0]),
        np.array([0.0, 0.0]),
        np.array([2.0, 9.0]),
    )
    assert found == pytest.approx([0.4, 3.0], rel=0.05)
