"""The load of a trace in buckets at their means, over the load of each of its requests by itself.

usage: python benchmarks/buckets.py TRACE ... (CSV or JSON lines, as for `trace:` in a spec)

Load is machine seconds under the cost law of vLLM (predicted): qwen3-30b-a3b on one A100-80GB with an ITL of
200 ms and on two H100 with 50 ms. 1,500 requests of each trace are drawn; those longer than 40,000 tokens, or
that alone break the SLO, are left out. "cells" is the mean error of single buckets, weighted by load; "right
edges" puts each request at the upper corner of its bucket, as Mélange does; "one mean" takes all requests at
one size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from moeplan.planner.buckets import nearest_buckets, size_buckets
from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.policy import Rejection
from moeplan.planner.ir.spec import Slo
from moeplan.planner.ir.workload import Bucket
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.in_memory import in_memory_policy
from moeplan.planner.traces import read_trace

SPEC = """
name: benchmark
model: qwen3-30b-a3b
workload:
  online: {rate: 1/s, sizes: [{prompt: 39000, output: 1000}], slo: {ttft: 1000s, itl: 1s}}
"""
MACHINES = {"a2-ultragpu-1g": 0.2, "a3-highgpu-2g": 0.05}
_DRAWN, _LONGEST = 1500, 40_000
Load = Callable[[float, float], float]


def load_law(machine: str, itl_s: float) -> Load:
    """Machine seconds of a request of a size, as one bucket by itself."""
    catalog = load_catalog(None, Span("benchmark"))
    model = catalog.models["qwen3-30b-a3b"]
    inputs = Inputs(catalog=catalog, model=model, machine=None, prompts=None, trace=None)
    workload = build_workload(parse_spec(SPEC, "benchmark"), inputs)
    requests = replace(workload.classes[0], slo=Slo(ttft_s=1000.0, itl_s=itl_s, attainment=0.99))
    roofline = find_roofline(workload, catalog.machines[machine])

    def seconds(prompt: float, output: float) -> float:
        bucket = Bucket(prompt_tokens=prompt, output_tokens=output, share=1.0)
        found = in_memory_policy(workload, replace(requests, buckets=(bucket,)), roofline)
        return math.nan if isinstance(found, Rejection) else 1.0 / found.rates[0].requests_per_s.value

    return seconds


def row(name: str, machine: str, load: Load, prompt: np.ndarray, output: np.ndarray) -> str:
    each = np.array([load(p, o) for p, o in zip(prompt, output, strict=True)])
    served = np.isfinite(each)
    each, prompt, output = each[served], prompt[served], output[served]
    buckets = size_buckets(prompt, output)
    found = np.array([len(prompt) * b.share * load(b.prompt_tokens, b.output_tokens) for b in buckets])
    own = nearest_buckets(buckets, prompt, output)
    cells = [(own == n) for n in range(len(buckets)) if (own == n).any()]
    means = [load(prompt[cell].mean(), output[cell].mean()) * cell.sum() for cell in cells]
    error = sum(abs(mean - each[cell].sum()) for mean, cell in zip(means, cells, strict=True)) / each.sum()
    edges = sum(load(prompt[cell].max(), output[cell].max()) * cell.sum() for cell in cells)
    one = load(prompt.mean(), output.mean()) * len(prompt)
    ratios = " | ".join(f"{total / each.sum():.3f}" for total in (found.sum(), edges, one))
    return f"| {name} | {machine} | {ratios} | {error:.1%} |"


def main() -> None:
    print("| trace | machine | buckets | right edges | one mean | cells |")
    print("| --- | --- | --- | --- | --- | --- |")
    for path in map(Path, sys.argv[1:]):
        trace = read_trace(path, Span(str(path)))
        short = np.flatnonzero(trace.prompt_tokens + trace.output_tokens < _LONGEST)
        drawn = np.random.RandomState(0).choice(short, min(_DRAWN, len(short)), replace=False)
        for machine, itl_s in MACHINES.items():
            law = load_law(machine, itl_s)
            print(row(path.name, machine, law, trace.prompt_tokens[drawn], trace.output_tokens[drawn]))


if __name__ == "__main__":
    main()
