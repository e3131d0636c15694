"""Schedules compared in simulation at MoE-Lightning's published settings, on the same predicted tasks.

usage: python benchmarks/schedules.py [PATH/moe_lightning.json]

Each row is a published run of Mixtral on one GPU at its own micro-batch and number of requests: seconds of a
decode pass under FlexGen's schedules (S4, S3), with whole layers (S2), under CGOPipe, and under the best that
our rewrites find; "work" is the busiest lane's. The last column is what prefill in the same passes as decode
would save of a batch's run time, requests joining as others leave. Nothing here is measured on a GPU.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import published_runs
import tables
import yaml

from moeplan.planner.catalog import Catalog, load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.schedule import OffloadConstants
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.schedule import constants_of, costs_of, improved, known_schedules
from moeplan.planner.programs import Step
from moeplan.planner.programs.proof import first_offence
from moeplan.planner.simulate.decode import Timed, time_passes
from moeplan.planner.strategies.offload import point_of
from moeplan.planner.strategies.offload_tasks import decode_tasks, prefill_tasks

NAMES = ("S4 (FlexGen)", "S3 (FlexGen, CPU attention)", "S2 (whole layers)", "CGOPipe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One published run: seconds of a decode pass by schedule, of the busiest lane, and what overlap
    saves."""

    run: published_runs.Run
    micro_batches: int
    balance: int
    seconds: dict[str, float]
    best: Timed
    work_s: float
    mixed_gain: float
    proved: bool


def compare(workload: Workload, roofline: Roofline, run: published_runs.Run) -> Compared:
    """Time every schedule on the tasks of the run's policy."""
    policy = published_runs.predict(workload, roofline.machine, run)
    requests = workload.classes[0]
    costs, constants = (
        costs_of(workload, requests, roofline, policy),
        constants_of(workload, requests, policy),
    )
    n = policy.micro_batches
    known = {timed.schedule.name: timed for timed in known_schedules(constants, n, costs)}
    best = improved(known["CGOPipe"], n, costs)
    return Compared(
        run=run,
        micro_batches=n,
        balance=balance(roofline, policy),
        seconds={name: known[name].seconds for name in NAMES},
        best=best,
        work_s=max(known["CGOPipe"].stretch.busy_s),
        mixed_gain=mixed_gain(workload, roofline, policy, best),
        proved=first_offence(best.schedule, best.issued) is None,
    )


def balance(roofline: Roofline, policy: Policy) -> int:
    """n_ub from which GPU memory traffic hides the link's: ceil((1 - r_w)·B_gpu/B_link)."""
    rate = roofline.roof("gpu").bytes_per_s * policy.gpus / roofline.roof("dram").up_bytes_per_s
    return math.ceil((1.0 - policy.resident_share) * rate)


def mixed_gain(workload: Workload, roofline: Roofline, policy: Policy, best: Timed) -> float:
    """The share of a batch's run time saved where each decode pass prefills the requests that join in it.

    Apart: one prefill pass, then a decode pass for each token after the first. Together: as many passes as
    tokens, each with its share of the prompts.
    """
    requests, c = workload.classes[0], best.schedule.constants
    assert isinstance(c, OffloadConstants)
    problem, point = point_of(workload, requests, roofline, policy, policy.sequences)
    prefill, decode = prefill_tasks(problem, point, c), decode_tasks(problem, point, c)
    n, tokens = policy.micro_batches, requests.mean_output_tokens()
    alone = time_passes(best.schedule, (Step(0, c.pieces, 0),) * 2, prefill).seconds
    apart = alone + (tokens - 1) * best.seconds
    pieces = max(1, math.ceil(c.pieces / tokens))
    part = c.pieces / tokens / pieces  # of a full piece's tokens
    own = {op: cost for op, cost in prefill.items() if op not in decode}
    joined = {op: replace(cost, seconds=cost.seconds * part) for op, cost in own.items()}
    mixed = time_passes(best.schedule, (Step(n, pieces, n),) * 3, {**joined, **decode}).seconds
    return 1.0 - tokens * mixed / apart


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else published_runs.FACTS
    catalog = load_catalog(None, Span("benchmarks"))
    rows = []
    for run in published_runs.read_runs(path):
        machine = published_runs.machine_of(catalog, run)
        if machine.gpus == 1:
            workload = published_runs.workload_of(catalog, run)
            rows.append(compare(workload, find_roofline(workload, machine), run))
    tables.show(HEADS, [cells(row) for row in rows])
    for line in [*summary(rows), *published_orders(catalog)]:
        print(line)


HEADS = ("setting", "prompt", "output", "μ", "n_ub", "balance", "S4 s", "S3 s", "S2 s", "CGOPipe s", "best s")
HEADS += ("work s", "work/CGOPipe", "gain", "found by", "mixed saves")


def cells(row: Compared) -> list[str]:
    """A row of the table."""
    run, cgopipe, best = row.run, row.seconds["CGOPipe"], row.best.seconds
    sizes = (run.prompt, run.output, run.micro_batch, row.micro_batches, row.balance)
    return [
        run.setting,
        *map(str, sizes),
        *(f"{row.seconds[name]:.2f}" for name in NAMES),
        f"{best:.2f}",
        f"{row.work_s:.2f}",
        f"{row.work_s / cgopipe:.1%}",
        f"{1 - best / cgopipe:.2%}",
        row.best.schedule.name.removeprefix("CGOPipe").removeprefix(" + ") or "-",
        f"{row.mixed_gain:.1%}",
    ]


def summary(rows: list[Compared]) -> list[str]:
    """How often what the paper says holds."""
    s4, s3, s2, cgopipe = ([row.seconds[name] for row in rows] for name in NAMES)
    count, slack = len(rows), 1 + 1e-9
    never = sum(c <= min(others) * slack for c, *others in zip(cgopipe, s2, s3, s4, strict=True))
    full = [row for row in rows if row.work_s >= 0.95 * row.seconds["CGOPipe"]]
    past = [row for row in rows if row.micro_batches >= row.balance]
    better = sum(row.best.seconds < row.seconds["CGOPipe"] for row in rows)
    worse = sum(row.best.seconds > row.seconds["CGOPipe"] * slack for row in rows)
    return [
        f"CGOPipe is never slower than S2, S3 and S4: {never} of {count}",
        f"S2 < S4: {below(s2, s4)} of {count}; S3 < S4: {below(s3, s4)} of {count}",
        f"work is at least 95 % of CGOPipe's pass: {len(full)} of {count}; at or past the balance point "
        f"{sum(row in full for row in past)} of {len(past)}",
        f"our rewrites are faster than CGOPipe: {better} of {count}, slower: {worse}",
        f"proved: {sum(row.proved for row in rows)} of {count}",
    ]


def below(less: list[float], more: list[float]) -> int:
    """In how many places the first is less."""
    return sum(a < b for a, b in zip(less, more, strict=True))


def published_orders(catalog: Catalog) -> list[str]:
    """What was measured of FlexGen's schedules, and the same in simulation, prefill included."""
    facts = yaml.safe_load(published_runs.FACTS.read_text())
    agree = 0
    for setting, prompt, output, micro_batch, n, on_gpu, on_cpu in facts["flexgen"]:
        run = published_runs.Run(
            setting=setting,
            prompt=prompt,
            output=output,
            requests=micro_batch * n,
            micro_batch=micro_batch,
            tokens_per_s=on_gpu,
        )
        seconds = run_seconds(catalog, run)
        agree += (seconds["S4 (FlexGen)"] < seconds["S3 (FlexGen, CPU attention)"]) == (on_gpu > on_cpu)
    ablation = facts["ablation"]
    measured = ablation.pop("cgopipe") / ablation.pop("flexgen")
    seconds = run_seconds(catalog, published_runs.Run(**ablation, tokens_per_s=0.0))
    simulated = seconds["S4 (FlexGen)"] / seconds["CGOPipe"]
    return [
        f"S4 and S3 in the order measured (S4 faster in all): {agree} of {len(facts['flexgen'])}",
        f"CGOPipe against FlexGen's schedule at one policy (Table 5): measured {measured:.2f} times as fast, "
        f"simulated {simulated:.2f}",
    ]


def run_seconds(catalog: Catalog, run: published_runs.Run) -> dict[str, float]:
    """Seconds of one batch under each schedule, the same prefill before all."""
    workload, machine = published_runs.workload_of(catalog, run), published_runs.machine_of(catalog, run)
    roofline = find_roofline(workload, machine)
    policy = published_runs.predict(workload, machine, run)
    requests = workload.classes[0]
    constants, costs = (
        constants_of(workload, requests, policy),
        costs_of(workload, requests, roofline, policy),
    )
    known = known_schedules(constants, policy.micro_batches, costs)
    return {t.schedule.name: policy.prefill.seconds + (run.output - 1) * t.seconds for t in known}


if __name__ == "__main__":
    main()
