"""How long the policy pass takes over every machine of the catalog.

usage: python benchmarks/policy_search.py [--rounds N]

Processor seconds of this process, the least of the rounds for each machine, so that others at work on this
computer count little. "200 machines" is what as many like the catalog's would take.
"""

from __future__ import annotations

import argparse
import time

from workloads import workload_of

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.roofline import find_roofline

SPEC = """
name: search
model: {model}
workload: {{batch: {{requests: {requests}, prompt: 77, output: 128}}}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    catalog = load_catalog(None, Span("catalog"))
    print(f"{'model':16} {'requests':>8} machines  200 machines s  mean ms  worst ms")
    for model in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3"):
        for requests in (8, 5000):
            spec = SPEC.format(model=model, requests=requests)
            workload = workload_of(catalog, catalog.models[model], spec)
            rooflines = [find_roofline(workload, machine) for machine in catalog.machines.values()]
            seconds = [min(_seconds(workload, roofline) for _ in range(rounds)) for roofline in rooflines]
            mean, worst = sum(seconds) / len(seconds), max(seconds)
            print(
                f"{model:16} {requests:8} {len(seconds):8}  {200 * mean:14.2f}  {1e3 * mean:7.1f}"
                f"  {1e3 * worst:8.1f}"
            )


def _seconds(workload: Workload, roofline: Roofline) -> float:
    started = time.process_time()
    find_policies(workload, roofline, None)
    return time.process_time() - started


if __name__ == "__main__":
    main()
