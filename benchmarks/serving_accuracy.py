"""Predicted against measured inter-token latency of models served from GPU memory.

usage: python benchmarks/serving_accuracy.py PATH/silicon/sample.csv [PATH/accuracy/e2e_peer_predictions.csv]

The first file is NVIDIA AIConfigurator's table of measured serving runs (ai-dynamo/aiconfigurator@095f58a,
Apache-2.0), the second the subset of it on which other predictors were run. Ten constants (five efficiencies,
a cost per layer and engine, two of all-reduces) are fitted to all groups but those of one (model, GPU), then
of one model, and tested on what was left out; nothing is fitted per row. "Calibrated" adds one factor per
(GPU, engine, tensor-parallel degree). `shipped` are the constants in planner/, which come from all rows.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fitting import Array, fit
from serving_rows import Group, batch_in_memory, read_groups

from moeplan.planner import serving
from moeplan.planner.catalog import machines
from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.passes.roofline import level_roof

# name: start, low, high
_CONSTANTS = {
    "memory_efficiency": (0.8, 0.3, 0.98),
    "expert_memory_efficiency": (0.7, 0.2, 0.98),
    "attention_memory_efficiency": (0.7, 0.2, 0.98),
    "compute_efficiency": (0.5, 0.1, 0.9),
    "mixed_prefill": (0.8, 0.4, 2.0),
    "moe_layer_s": (20e-6, 0.0, 100e-6),
    "all_reduce_s": (15e-6, 1e-6, 60e-6),
    "peer_efficiency": (0.5, 0.1, 1.0),
    "layer_s.vllm": (50e-6, 1e-6, 200e-6),
    "layer_s.sglang": (50e-6, 1e-6, 200e-6),
    "layer_s.trtllm": (50e-6, 1e-6, 200e-6),
}
NAMES = tuple(_CONSTANTS)
_START, _LOW, _HIGH = (np.array([c[i] for c in _CONSTANTS.values()]) for i in range(3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of all groups as one, with the log error of each prediction."""

    groups: list[Group]
    log_error: Array

    def of(self, value: Callable[[Group], object]) -> np.ndarray:  # type: ignore[type-arg]
        """`value` of each row's group."""
        return np.array([value(group) for group in self.groups for _ in group.rows])


def predict(group: Group, constants: Array) -> Array:
    """Seconds per output token of each row: a decode step, and its share of other requests' prefill."""
    value = dict(zip(NAMES, constants, strict=True))
    level = replace(group.gpu, **{name: value[name] for name in NAMES[:4]})
    roof = level_roof(level, group.workload.dtype)
    engine = serving.Engine(
        layer_s=value[f"layer_s.{group.engine}"],
        **{name: value[name] for name in ("moe_layer_s", "all_reduce_s", "peer_efficiency", "mixed_prefill")},
    )
    batch = batch_in_memory(group)
    context = group.prompt + group.output / 2
    shared = (group.workload, roof, group.peer_bytes_per_s, group.sharding, engine)
    parts = serving.step_parts(*shared, batch, context)
    prefill = serving.prefill_s(*shared, group.prompt)
    return np.asarray(serving.inter_token_s(parts, prefill, engine, batch, group.output))


def shipped() -> Array:
    """The constants that planner/ uses: the catalog's defaults and its engines."""
    from moeplan.planner.strategies.in_memory import VLLM

    value = {name: getattr(machines, name.upper()) for name in NAMES[:4]}
    value |= {name: getattr(VLLM, name) for name in NAMES[4:8]} | {"layer_s.vllm": VLLM.layer_s}
    return np.array([value.get(name, np.nan) for name in NAMES])


def errors(groups: list[Group], constants: Array) -> Array:
    return np.concatenate([np.log(predict(group, constants) / group.itl_s) for group in groups])


def fitted(groups: list[Group]) -> Array:
    """Constants of least error, where every (model, GPU, engine) weighs the same however many its rows."""
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for group in groups:
        counts[group.family, group.system, group.engine] += len(group.rows)
    weight = np.array(
        [counts[g.family, g.system, g.engine] ** -0.5 for g in groups for _ in g.rows], dtype=float
    )
    weight /= weight.mean()
    return fit(lambda constants: weight * errors(groups, constants), _START, _LOW, _HIGH)


def left_out(groups: list[Group], label: Callable[[Group], object]) -> Table:
    """Every row predicted with constants fitted to the groups of all other labels."""
    order: list[Group] = []
    found = []
    for value in dict.fromkeys(label(group) for group in groups):
        held = [group for group in groups if label(group) == value]
        constants = fitted([group for group in groups if label(group) != value])
        order += held
        found.append(errors(held, constants))
    return Table(groups=order, log_error=np.concatenate(found))


def calibrated(table: Table) -> Array:
    """Log errors after one factor per (GPU, engine, tensor-parallel degree)."""
    key = table.of(lambda g: f"{g.system} {g.engine} {g.sharding.tensor}")
    found = table.log_error.copy()
    for value in np.unique(key):
        found[key == value] -= np.median(found[key == value])
    return found


def relative(log_error: Array) -> Array:
    return np.abs(np.expm1(log_error))


def coverage(log_error: Array, sigma: float) -> float:
    """Share of measured values inside the 90 % interval of a prediction with this sigma."""
    width = np.log(Estimate(value=1.0, sigma=sigma, provenance="analytic").high)
    return float(np.mean(np.abs(log_error) <= width))


def show(name: str, table: Table) -> None:
    dense = table.of(lambda g: g.dense)
    plain, scaled = relative(table.log_error), relative(calibrated(table))
    print(
        f"{name:34} median error: dense {np.median(plain[dense]):.1%}, MoE {np.median(plain[~dense]):.1%};"
        f" calibrated: dense {np.median(scaled[dense]):.1%}, MoE {np.median(scaled[~dense]):.1%};"
        f" all, mean {plain.mean():.1%}"
    )


def show_groups(table: Table) -> None:
    label = table.of(lambda g: f"{g.model_path} on {g.system}, {g.engine}")
    print(f"\n{'left out':58} rows  median error  median ratio predicted/measured")
    for value in sorted(set(label)):
        e = table.log_error[label == value]
        print(f"{value:58} {len(e):4}  {np.median(relative(e)):12.1%}  {np.exp(np.median(e)):8.2f}")


def show_peers(name: str, table: Table, file: Path) -> None:
    """The rows on which other predictors were run, theirs beside ours."""
    rows = {row["id"]: row for row in csv.DictReader(file.open(newline=""))}
    ids = [row for group in table.groups for row in group.rows]
    ours = {row: error for row, error in zip(ids, relative(table.log_error), strict=True) if row in rows}
    print(f"\n{name}, {len(ours)} of {len(rows)} rows: mean {_stats(ours.values())}")
    common = [row for row in ours if rows[row]["in_common_set"] == "1"]
    print(f"on the {len(common)} rows that every predictor answered: mean {_stats(ours[r] for r in common)}")
    for column in ("aic_silicon", "aic_sol", "roofline", "topk_only"):
        theirs = (
            abs(float(rows[r][f"{column}_tpot_ms"]) / float(rows[r]["measured_tpot_ms"]) - 1) for r in common
        )
        print(f"  {column:12} mean {_stats(theirs)}")


def _stats(values: Iterable[float]) -> str:
    found = np.array(list(values))
    return f"{found.mean():.1%}, median {np.median(found):.1%}"


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    groups, dropped = read_groups(Path(sys.argv[1]))
    rows = sum(len(group.rows) for group in groups)
    print(f"{rows} rows in {len(groups)} groups; {dropped} rows left out (labels that cannot be)")
    everything = fitted(groups)
    print("fitted to all: " + ", ".join(f"{n} {v:.3g}" for n, v in zip(NAMES, everything, strict=True)))
    print("shipped:       " + ", ".join(f"{n} {v:.3g}" for n, v in zip(NAMES, shipped(), strict=True)))
    show("in sample", Table(groups=groups, log_error=errors(groups, everything)))
    by_group = left_out(groups, lambda g: (g.family, g.system))
    show("(model, GPU) left out", by_group)
    by_model = left_out(groups, lambda g: g.family)
    show("model left out", by_model)
    sigmas = (machines.SIGMA["datasheet"], machines.SIGMA["calibrated"])
    print(
        f"inside the 90 % interval, (model, GPU) left out: {coverage(by_group.log_error, sigmas[0]):.1%};"
        f" calibrated: {coverage(calibrated(by_group), sigmas[1]):.1%}"
    )
    show_groups(by_group)
    if len(sys.argv) == 3:
        show_peers("model left out", by_model, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
