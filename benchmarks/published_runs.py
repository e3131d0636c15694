"""Predicted against measured: MoE-Lightning's published single-GPU runs of Mixtral-8x7B.

usage: python benchmarks/published_runs.py PATH/moe_lightning.json

The file holds the runs published with the paper (github.com/caoshiyi/artifacts, branch asplos25): setting,
generated length, mean or padded prompt length, requests, tokens/s and micro-batch. Each is predicted at its
own micro-batch and number of requests from the catalog's figures for its machine. Three of these figures (the
two GPUs' prefill efficiency under offloading, the share of the link that staged copies reach) come from fits
of the same runs: the level is in sample for them, the ranking is a test.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.machine import Machine
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.offload import offload_policy_at

SPEC = """
name: published
model: {{name: mixtral-8x7b, dtype: fp16}}
workload: {{batch: {{requests: {requests}, prompt: {prompt}, output: {output}}}}}
machine: cpu-2core
"""


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = json.loads(Path(sys.argv[1]).read_text())["measured_runs"]["rows"]
    catalog = load_catalog(None, Span("catalog"))
    hosts = {
        "S1": catalog.machines["n1-custom-48-196608+1xT4"],
        "S2": replace(catalog.machines["g2-standard-48"], gpus=1),
    }
    print(f"{'setting':12} {'n':>4} {'μ':>4} {'N':>5}  measured  predicted  ratio  bottleneck")
    measured, predicted = [], []
    for row in rows:
        policy_rate, bottleneck = predict(catalog, hosts[row["setting"][:2]], row)
        measured.append(row["throughput"])
        predicted.append(policy_rate)
        sizes = f"{row['gen_len']:4} {row['micro_batch']:4} {row['derived_requests_finished']:5.0f}"
        print(
            f"{row['setting']:12} {sizes}"
            f"  {measured[-1]:8.1f}  {policy_rate:9.1f}  {policy_rate / measured[-1]:5.2f}  {bottleneck}"
        )
    logs = [math.log(p / m) for p, m in zip(predicted, measured, strict=True)]
    print(f"Spearman {spearman(measured, predicted):.3f}; ", end="")
    print(f"median ratio {math.exp(statistics.median(logs)):.2f}; ", end="")
    print(f"rms log error {math.sqrt(statistics.mean(e * e for e in logs)):.3f}")


def predict(catalog, machine: Machine, row: dict) -> tuple[float, str]:  # type: ignore[no-untyped-def, type-arg]
    """Generated tokens/s and bottleneck at the row's own policy."""
    requests = max(1, round(row["derived_requests_finished"]))
    text = SPEC.format(requests=requests, prompt=row["pad_or_avg_prompt"], output=row["gen_len"])
    model = catalog.models["mixtral-8x7b"]
    inputs = Inputs(catalog=catalog, model=model, machine=machine, prompts=None, trace=None)
    workload = build_workload(parse_spec(text, "published"), inputs)
    policy = offload_policy_at(
        workload,
        workload.classes[0],
        find_roofline(workload, machine),
        row["micro_batch"],
        math.ceil(requests / row["micro_batch"]),
    )
    return policy.generated_tokens_per_s.value, str(policy.bottleneck)


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation of two lists without ties."""
    ranks = [[sorted(x).index(v) for v in x] for x in (a, b)]
    n = len(a)
    return 1 - 6 * sum((p - q) ** 2 for p, q in zip(*ranks, strict=True)) / (n * (n * n - 1))


if __name__ == "__main__":
    main()
