"""What measured rows are worth: errors of the profile pass's laws on NVIDIA AIConfigurator's measurements.

usage: python benchmarks/profile_laws.py PATH/sample.csv

The file holds published serving measurements (ai-dynamo/aiconfigurator, silicon_sample.csv, Apache-2.0).
Taken are those of gpt-oss-120b under vLLM without expert parallelism, a group per GPU and tensor-parallel
degree. Each row is left out in turn and its time per output token predicted: by the model alone, by the
nearest other row if it is within a factor of 2, by a fit to three other rows drawn at random (fixed seed),
and by one to all others. Repeats of the left-out point are left out with it. The laws' constants are not
fitted to these rows.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tables import read_rows

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.workload import Bucket
from moeplan.planner.measured_laws import Known, Law, find_laws
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.profile_file import ProfileRow
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.figures import figures_at

MODEL = "gpt-oss-120b"
MACHINES = {"h200_sxm": "p5en.48xlarge", "b200_sxm": "p6-b200.48xlarge"}
SPEC = f"""
name: laws
model: {MODEL}
workload: {{batch: {{requests: 1000, prompt: 1024, output: 1024}}}}
machine: p5en.48xlarge
"""
DRAWS = 3


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    groups = read_groups(Path(sys.argv[1]))
    errors: dict[str, list[Outcome]] = defaultdict(list)
    for known in groups.values():
        for way, outcomes in leave_one_out(known, random.Random(0)).items():
            errors[way] += outcomes
    print(f"{MODEL} under vLLM, {len(groups)} groups, {sum(map(len, groups.values()))} rows")
    print(f"{'rows used':24} {'points':>6} {'median error':>13} {'p90':>6} {'inside 90 % interval':>21}")
    for way, outcomes in errors.items():
        sizes = sorted(abs(math.expm1(o.log_error)) for o in outcomes)
        inside = statistics.mean(abs(o.log_error) <= 1.645 * o.sigma for o in outcomes)
        print(
            f"{way:24} {len(sizes):6} {statistics.median(sizes):13.1%} "
            f"{sizes[int(0.9 * (len(sizes) - 1))]:6.0%} {inside:21.0%}"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """log(corrected / measured) of one left-out row, and the standard error that was claimed."""

    log_error: float
    sigma: float


def leave_one_out(known: Sequence[Known], numbers: random.Random) -> dict[str, list[Outcome]]:
    """Outcomes per number of rows used; a row without a near neighbour gives none for `nearest`."""
    found: dict[str, list[Outcome]] = defaultdict(list)
    for left in known:
        point = (left.row.prompt_tokens, left.row.output_tokens, left.row.batch)
        others = [k for k in known if (k.row.prompt_tokens, k.row.output_tokens, k.row.batch) != point]
        bucket = Bucket(prompt_tokens=point[0], output_tokens=point[1], share=1.0)
        found["none"].append(_outcome(left, None))
        if others:
            nearest = min(others, key=lambda k: k.distance(bucket, left.row.batch))
            if law := find_laws([nearest], bucket, left.row.batch, left.predicted).get("itl_s"):
                found["nearest, within 2 times"].append(_outcome(left, law))
        for _ in range(DRAWS if len(others) >= 3 else 0):
            drawn = numbers.sample(others, 3)
            law = find_laws(drawn, bucket, left.row.batch, left.predicted)["itl_s"]
            found["three at random"].append(_outcome(left, law))
        if len(others) > 3:
            law = find_laws(others, bucket, left.row.batch, left.predicted)["itl_s"]
            found["all others"].append(_outcome(left, law))
    return found


def _outcome(left: Known, law: Law | None) -> Outcome:
    predicted = left.predicted.itl_s
    corrected = law.at(predicted) if law else predicted
    sigma = law.sigma if law else 0.3  # of a catalog machine
    return Outcome(math.log(corrected / left.row.figures["itl_s"]), sigma)


def read_groups(path: Path) -> dict[tuple[str, int], list[Known]]:
    """The rows of each (system, tensor-parallel degree), with what the model predicts at each."""
    rows = [row for row in read_rows(path) if _wanted(row)]
    spec = parse_spec(SPEC, "spec.yaml")
    workload = build_workload(spec, load_inputs(spec))
    catalog = load_catalog(None, Span("catalog"))
    groups: dict[tuple[str, int], list[Known]] = defaultdict(list)
    for system, machine in MACHINES.items():
        roofline = find_roofline(workload, catalog.machines[machine])
        policies, _ = find_policies(workload, roofline, None)
        template: Policy = next(policy for policy in policies if policy.engine == "vllm")
        for number, row in enumerate(r for r in rows if r["system"] == system):
            gpus, batch = int(row["tp_size"]), int(row["batch_size"])
            bucket = Bucket(prompt_tokens=float(row["isl"]), output_tokens=float(row["osl"]), share=1.0)
            policy = replace(template, gpus=gpus)
            requests = workload.classes[0]
            predicted = figures_at(workload, roofline, policy, requests, bucket, batch)
            measured = ProfileRow(
                line=number,
                machine=machine,
                model=MODEL,
                engine="vllm",
                gpus=gpus,
                prompt_tokens=bucket.prompt_tokens,
                output_tokens=bucket.output_tokens,
                batch=batch,
                figures={"itl_s": float(row["silicon_tpot_ms"]) / 1e3},
            )
            groups[system, gpus].append(Known(measured, predicted))
    return groups


def _wanted(row: dict[str, str]) -> bool:
    return (
        row["mode"] == "agg"
        and row["backend"] == "vllm"
        and row["model_path"] == f"openai/{MODEL}"
        and row["system"] in MACHINES
        and row["moe_ep_size"] == "1"
        and bool(row["silicon_tpot_ms"])
    )


if __name__ == "__main__":
    main()
