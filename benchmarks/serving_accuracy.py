"""Predicted against measured inter-token latency of models served from GPU memory.

usage: python benchmarks/serving_accuracy.py PATH/silicon/sample.csv [PATH/accuracy/e2e_peer_predictions.csv]

The first file is NVIDIA AIConfigurator's table of measured serving runs (ai-dynamo/aiconfigurator@095f58a,
Apache-2.0), the second the subset of it on which other predictors were run. Ten constants (five efficiencies,
a cost per layer and engine, two of all-reduces) are fitted to all groups but those of one (model, GPU), then
of one model, and tested on what was left out; nothing is fitted per row. "Calibrated" adds one factor per
(GPU, engine, tensor-parallel degree). Time to first token has four more constants, for vLLM only; it depends
on how requests arrive, which the table does not say, and is predicted less well. `shipped` are the constants
in planner/, which come from all rows.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fitting import Array, fit
from serving_rows import Group, batch_in_memory, read_groups
from tables import read_rows

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
_FIRST_TOKEN = {
    "first_steps": (1.0, 0.0, 10.0),
    "first_prefill": (1.0, 0.5, 6.0),
    "queued": (0.1, 0.0, 1.0),
    "prefill_moe_layer_s": (3e-4, 0.0, 3e-3),
}
NAMES, FIRST_NAMES = tuple(_CONSTANTS), tuple(_FIRST_TOKEN)
_START, _LOW, _HIGH = (np.array([c[i] for c in _CONSTANTS.values()]) for i in range(3))
_FIRST_BOUNDS = tuple(np.array([c[i] for c in _FIRST_TOKEN.values()]) for i in range(3))


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The rows of all groups as one, with the log error of each prediction."""

    groups: list[Group]
    log_error: Array

    def of(self, value: Callable[[Group], object]) -> np.ndarray:  # type: ignore[type-arg]
        """`value` of each row's group."""
        return np.array([value(group) for group in self.groups for _ in group.rows])


def engine_of(group: Group, value: dict[str, float]) -> serving.Engine:
    """The group's engine with some constants; those of the first token are 0 where `value` lacks them."""
    named = {
        name: value[name] for name in ("moe_layer_s", "all_reduce_s", "peer_efficiency", "mixed_prefill")
    }
    first = {name: value.get(name, 0.0) for name in FIRST_NAMES}
    return serving.Engine(layer_s=value[f"layer_s.{group.engine}"], **named, **first)


def predict(group: Group, constants: Array) -> Array:
    """Seconds per output token of each row: a decode step, and its share of other requests' prefill."""
    return _step_and_prefill(group, dict(zip(NAMES, constants, strict=True)))[0]


def _step_and_prefill(group: Group, value: dict[str, float]) -> tuple[Array, Array]:
    """Seconds between tokens and of the prefill of each row."""
    level = replace(group.gpu, **{name: value[name] for name in NAMES[:4]})
    roof, engine = level_roof(level, group.workload.dtype), engine_of(group, value)
    batch = batch_in_memory(group)
    shared = (group.workload, roof, group.peer_bytes_per_s, group.sharding, engine)
    parts = serving.step_parts(*shared, batch, group.prompt + group.output / 2)
    prefill = serving.prefill_s(*shared, group.prompt)
    between = serving.inter_token_s(parts, prefill, engine, batch, group.output)
    return np.asarray(between), np.asarray(prefill)


def first_token_errors(groups: list[Group], constants: Array, first: Array) -> Array:
    """Log errors of the time to first token; 0 where requests queue for cache, whose wait nobody predicts."""
    value = dict(zip(NAMES + FIRST_NAMES, [*constants, *first], strict=True))
    found = []
    for group in groups:
        between, prefill = _step_and_prefill(group, value)
        batch = batch_in_memory(group)
        seconds = serving.first_token_s(group.workload, engine_of(group, value), prefill, between, batch)
        found.append(np.where(batch < group.batch, 0.0, np.log(np.asarray(seconds) / group.ttft_s)))
    return np.concatenate(found)


def shipped() -> Array:
    """The constants that planner/ uses: the catalog's defaults and its engines."""
    from moeplan.planner.strategies.in_memory import VLLM

    value = {name: getattr(machines, name.upper()) for name in NAMES[:4]}
    value |= {name: getattr(VLLM, name) for name in NAMES[4:8]} | {"layer_s.vllm": VLLM.layer_s}
    return np.array([value.get(name, np.nan) for name in NAMES])


def errors(groups: list[Group], constants: Array) -> Array:
    return np.concatenate([np.log(predict(group, constants) / group.itl_s) for group in groups])


def _equal_groups(groups: list[Group]) -> Array:
    """Weights of rows, with which every (model, GPU, engine) counts the same however many its rows."""
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for group in groups:
        counts[group.family, group.system, group.engine] += len(group.rows)
    weight = np.array([counts[g.family, g.system, g.engine] ** -0.5 for g in groups for _ in g.rows])
    return np.asarray(weight / weight.mean())


def fitted(groups: list[Group]) -> Array:
    """Constants of least error."""
    weight = _equal_groups(groups)
    return fit(lambda constants: weight * errors(groups, constants), _START, _LOW, _HIGH)


def first_token_left_out(groups: list[Group]) -> Table:
    """Times to first token of vLLM's rows, each (model, GPU) left out of both fits."""
    vllm = [group for group in groups if group.engine == "vllm"]
    order: list[Group] = []
    found = []
    for label in dict.fromkeys((g.family, g.system) for g in vllm):
        held, rest = ([g for g in vllm if ((g.family, g.system) == label) is same] for same in (True, False))
        constants = fitted([g for g in groups if (g.family, g.system) != label])
        weight = _equal_groups(rest)
        first = fit(lambda x, c=constants, w=weight, r=rest: w * first_token_errors(r, c, x), *_FIRST_BOUNDS)
        order += held
        found.append(first_token_errors(held, constants, first))
    return Table(groups=order, log_error=np.concatenate(found))


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
    rows = {row["id"]: row for row in read_rows(file)}
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


def show_first_token(groups: list[Group], constants: Array) -> None:
    vllm = [group for group in groups if group.engine == "vllm"]
    weight = _equal_groups(vllm)
    first = fit(lambda x: weight * first_token_errors(vllm, constants, x), *_FIRST_BOUNDS)
    print(
        "\ntime to first token, vLLM: "
        + ", ".join(f"{n} {v:.3g}" for n, v in zip(FIRST_NAMES, first, strict=True))
    )
    table = first_token_left_out(groups)
    served = table.log_error != 0.0
    dense = table.of(lambda g: g.dense)
    plain, scaled = relative(table.log_error), relative(calibrated(table))
    for name, of in (("dense", dense & served), ("MoE", ~dense & served)):
        print(
            f"  (model, GPU) left out, {name}, {of.sum()} rows: median error {np.median(plain[of]):.1%}, "
            f"calibrated {np.median(scaled[of]):.1%}"
        )


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
    show_first_token(groups, everything)
    if len(sys.argv) == 3:
        show_peers("model left out", by_model, Path(sys.argv[2]))


if __name__ == "__main__":
    main()
