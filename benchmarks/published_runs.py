"""Predicted against measured: MoE-Lightning's published runs of Mixtral, as they stand and calibrated.

usage: python benchmarks/published_runs.py [PATH/moe_lightning.json]

Each run is predicted at its own micro-batch and number of requests: first from the catalog's figures, then
with two figures of each GPU, prefill efficiency and link efficiency, fitted by least squares on the log error
of the single-GPU runs. "out" leaves a run out of the fit that predicts it, "setting" all runs of its setting.
Without an argument the runs are those of benchmarks/moe_lightning.yaml.
In sample: the catalog's offload_prefill_efficiency of T4 and L4 and the exponent by which lanes overlap were
chosen on these runs. The share of the link that staged copies reach plays no part: by our rule these hosts
hold the weights pinned.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import workloads
import yaml

from moeplan.planner.catalog import Catalog, load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.strategies.offload import offload_policy_at

FACTS = Path(__file__).with_name("moe_lightning.yaml")
SPEC = """
name: published
model: {{name: {model}, dtype: fp16}}
workload: {{batch: {{requests: {requests}, prompt: {prompt}, output: {output}}}}}
machine: cpu-2core
"""
# Setting: model, machine, GPUs used (one of the four L4 of a g2-standard-48).
SETTINGS = {
    "S1": ("mixtral-8x7b", "n1-custom-48-196608+1xT4", 1),
    "S2": ("mixtral-8x7b", "g2-standard-48", 1),
    "S6": ("mixtral-8x22b", "n1-custom-64-425984+2xT4", 2),
    "S7": ("mixtral-8x22b", "n1-custom-64-425984+4xT4", 4),
}
# Candidates of the fit, 2 % apart: prefill efficiency, link efficiency.
PREFILL = np.geomspace(0.03, 0.7, 160)
LINK = np.geomspace(0.3, 1.0, 62)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One published run; `setting` is that of the paper, with "(p)" where prompts were padded."""

    setting: str
    prompt: int
    output: int
    requests: int
    micro_batch: int
    tokens_per_s: float

    @property
    def box(self) -> str:
        return self.setting[:2]


def read_runs(path: Path) -> list[Run]:
    """The runs of our own facts or of a moe_lightning.json, those without a measured figure left out."""
    if path.suffix == ".json":
        keys = (
            "setting",
            "pad_or_avg_prompt",
            "gen_len",
            "derived_requests_finished",
            "micro_batch",
            "throughput",
        )
        rows = [[row[key] for key in keys] for row in json.loads(path.read_text())["measured_runs"]["rows"]]
    else:
        rows = yaml.safe_load(path.read_text())["runs"]
    return [
        Run(
            setting=setting,
            prompt=prompt,
            output=output,
            requests=max(1, round(requests)),
            micro_batch=micro_batch,
            tokens_per_s=rate,
        )
        for setting, prompt, output, requests, micro_batch, rate in rows
        if None not in (requests, micro_batch, rate)
    ]


def machine_of(catalog: Catalog, run: Run) -> Machine:
    _, name, gpus = SETTINGS[run.box]
    return replace(catalog.machines[name], gpus=gpus)


def workload_of(catalog: Catalog, run: Run) -> Workload:
    model = SETTINGS[run.box][0]
    text = SPEC.format(model=model, requests=run.requests, prompt=run.prompt, output=run.output)
    return workloads.workload_of(catalog, catalog.models[model], text)


def predict(workload: Workload, machine: Machine, run: Run) -> Policy:
    """The run's own policy as we predict it."""
    roofline = find_roofline(workload, machine)
    micro_batches = math.ceil(run.requests / run.micro_batch)
    return offload_policy_at(workload, workload.classes[0], roofline, run.micro_batch, micro_batches)


def with_figures(machine: Machine, prefill: float, link: float) -> Machine:
    """The machine with prefill efficiency and link efficiency replaced."""
    changes = {"gpu": {"offload_prefill_efficiency": prefill}, "dram": {"up_efficiency": link}}
    levels = tuple(replace(level, **changes.get(level.name, {})) for level in machine.levels)
    return replace(machine, levels=levels)


def log_errors(catalog: Catalog, run: Run) -> np.ndarray:  # [len(PREFILL), len(LINK)]
    """Log of predicted over measured at every candidate of the fit."""
    workload, machine = workload_of(catalog, run), machine_of(catalog, run)
    return tabulate(
        lambda prefill, link: math.log(
            predict(workload, with_figures(machine, prefill, link), run).generated_tokens_per_s.value
            / run.tokens_per_s
        )
    )


def tabulate(log_error: Callable[[float, float], float]) -> np.ndarray:
    """A function of prefill and link efficiency at every candidate."""
    return np.array([[log_error(float(prefill), float(link)) for link in LINK] for prefill in PREFILL])


def fit(errors: Sequence[np.ndarray]) -> tuple[int, int]:
    """Indices of the candidate with the least squared log error over some runs."""
    squares = np.sum(np.square(errors), axis=0)
    best = np.unravel_index(np.argmin(squares), squares.shape)
    return int(best[0]), int(best[1])


def calibrated(runs: Sequence[Run], errors: Sequence[np.ndarray]) -> list[tuple[float, float, float]]:
    """Log errors of each run of one GPU: fitted on all, on all but it, on all of other settings."""
    everything = fit(errors)
    rows = []
    for i, run in enumerate(runs):
        others = [error for j, error in enumerate(errors) if j != i]
        elsewhere = [e for e, other in zip(errors, runs, strict=True) if other.setting != run.setting]
        picks = (everything, fit(others), fit(elsewhere))
        rows.append((errors[i][picks[0]], errors[i][picks[1]], errors[i][picks[2]]))
    return [(float(a), float(b), float(c)) for a, b, c in rows]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def summary(name: str, logs: Sequence[float]) -> str:
    rms = math.sqrt(statistics.fmean(e * e for e in logs))
    worst = math.exp(max(abs(e) for e in logs)) - 1
    middle = math.exp(statistics.median(logs))
    return f"{name}: rms log error {rms:.3f}, worst {worst:.0%}, median ratio {middle:.2f}"


def main() -> None:
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    runs = read_runs(Path(sys.argv[1]) if len(sys.argv) == 2 else FACTS)
    catalog = load_catalog(None, Span("catalog"))
    _print_catalog(catalog, runs)
    _print_calibrated(catalog, [run for run in runs if SETTINGS[run.box][2] == 1])


def _print_catalog(catalog: Catalog, runs: Sequence[Run]) -> None:
    print(f"{'setting':12} {'n':>4} {'μ':>4} {'N':>5}  measured  predicted  ratio  bottleneck")
    predicted = []
    for run in runs:
        policy = predict(workload_of(catalog, run), machine_of(catalog, run), run)
        rate = policy.generated_tokens_per_s.value
        predicted.append(rate)
        sizes = f"{run.output:4} {run.micro_batch:4} {run.requests:5}  {run.tokens_per_s:8.1f}"
        print(f"{run.setting:12} {sizes}  {rate:9.1f}  {rate / run.tokens_per_s:5.2f}  {policy.bottleneck}")
    print(f"Spearman {spearman([run.tokens_per_s for run in runs], predicted):.3f}")
    logs = [math.log(p / run.tokens_per_s) for p, run in zip(predicted, runs, strict=True)]
    print(summary("catalog's figures", logs))


def _print_calibrated(catalog: Catalog, runs: Sequence[Run]) -> None:
    rows: list[tuple[float, float, float]] = []
    print("\ncalibrated: predicted / measured, fitted on    all   out  setting")
    for box, group in groupby(sorted(runs, key=lambda run: run.box), key=lambda run: run.box):
        own = list(group)
        errors = [log_errors(catalog, run) for run in own]
        prefill, link = fit(errors)
        rate = LINK[link] * machine_of(catalog, own[0]).level("dram").up_bytes_per_s / 1e9
        print(f"{box}: prefill {PREFILL[prefill]:.3f} of the peak, link {rate:.1f} GB/s")
        for run, logs in zip(own, calibrated(own, errors), strict=True):
            ratios = "  ".join(f"{math.exp(e):4.2f}" for e in logs)
            print(f"  {run.setting:12} {run.output:4}                            {ratios}")
            rows.append(logs)
    for name, logs in zip(("all", "out", "setting"), zip(*rows, strict=True), strict=True):
        print(summary(name, logs))


if __name__ == "__main__":
    main()
