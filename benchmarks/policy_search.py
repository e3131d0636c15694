"""How long the policy pass takes over every machine of the catalog.

usage: python benchmarks/policy_search.py
"""

from __future__ import annotations

import time

from workloads import workload_of

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.roofline import find_roofline

SPEC = """
name: search
model: {model}
workload: {{batch: {{requests: {requests}, prompt: 77, output: 128}}}}
"""


def main() -> None:
    catalog = load_catalog(None, Span("catalog"))
    print(f"{'model':16} {'requests':>8} machines  total s  mean ms  worst ms")
    for model in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"):
        for requests in (8, 5000):
            spec = SPEC.format(model=model, requests=requests)
            workload = workload_of(catalog, catalog.models[model], spec)
            seconds = []
            for machine in catalog.machines.values():
                roofline = find_roofline(workload, machine)
                started = time.perf_counter()
                find_policies(workload, roofline, None)
                seconds.append(time.perf_counter() - started)
            total = sum(seconds)
            mean, worst = 1e3 * total / len(seconds), 1e3 * max(seconds)
            print(f"{model:16} {requests:8} {len(seconds):8}  {total:7.2f}  {mean:7.1f}  {worst:8.1f}")


if __name__ == "__main__":
    main()
