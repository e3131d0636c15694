"""Plans for request traces in simulation: do they attain, and what would the cheapest fleet cost that does?

usage: python benchmarks/attainment.py FOLDER [TRACE ...]

FOLDER holds azure2023_conv.csv.gz, azure2023_code.csv.gz and mooncake_conversation.csv.gz, made of
Azure/AzurePublicDataset and kvcache-ai/Mooncake (docs/queueing.md); TRACE is one of these names without its
ending. For each trace, and rates up to several times its own, a plan is compiled for a market of a few
machines. Then every mix of four columns (the plan's, and those that attain alone at the least cost) up to
what the plan costs is simulated in the order of its cost, routed for the lowest peak load, until one attains:
by the plan's own rule (in a surge of 15 %), and at the planned rate. Nothing here was measured on GPUs.
"""

from __future__ import annotations

import heapq
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pulp

from moeplan.planner.arrivals import request_stream
from moeplan.planner.candidates import candidate_machines, candidate_offers
from moeplan.planner.inputs import Inputs, load_inputs
from moeplan.planner.ir.attainment import ClassAttainment, Pool
from moeplan.planner.ir.fleet import Column, Fleet, Route
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.spec import Slo, Spec
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.packing.columns import find_columns
from moeplan.planner.passes.attainment import attain, pool_of
from moeplan.planner.passes.fleet import choose_fleet
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.simulate.fleet import engines_needed, replay, split
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.laws import serving_law
from moeplan.planner.traces import RequestTrace

SPEC = """
name: benchmark
model: {model}
workload:
  online:
    trace: {trace}
    rate: {rate}/s
    slo: {slo}
market: {{clouds: [gcp], gpus: [L4, A100-80GB, H100], purchase: on-demand}}
"""
# Model, SLO, and rates in requests/s, the first the trace's own.
CASES = {
    "azure2023_conv": ("qwen3-30b-a3b", "{ttft: 2s, itl: 60ms}", (5.53, 25.0, 80.0)),
    "azure2023_code": ("qwen3-30b-a3b", "{ttft: 3s, itl: 100ms}", (2.57, 10.0, 30.0)),
    "mooncake_conversation": ("gpt-oss-20b", "{ttft: 20s, itl: 100ms}", (3.4, 10.0, 30.0)),
}
_LEAST_CAPACITY = 0.75  # of all work, each column doing its mix: below, no routing helps
_MOST_COLUMNS = 4  # in the search: those of the plan, then those that are cheapest alone


@dataclass(frozen=True)
class Case:
    """A compiled spec, as far as its fleet."""

    requests: RequestClass
    slo: Slo
    stream: RequestTrace
    columns: list[Column]
    pools: dict[str, Pool]  # of one replica each
    fleet: Fleet
    planned: tuple[Pool, ...]
    found: ClassAttainment
    seconds: float


def compiled(trace: Path, model: str, slo: str, rate_per_s: float) -> Case:
    """What the pipeline makes of a trace at a rate."""
    text = SPEC.format(model=model, trace=trace.name, rate=rate_per_s, slo=slo)
    spec = parse_spec(text, str(trace.parent / "spec.yaml"))
    return fleet_of(spec, load_inputs(spec))


def fleet_of(spec: Spec, inputs: Inputs) -> Case:
    workload: Workload = build_workload(spec, inputs)
    offers = candidate_offers(spec, inputs)
    machines = candidate_machines(spec, inputs, offers)
    rooflines = [find_roofline(workload, machine) for machine in machines]
    found = [find_policies(workload, roofline, None) for roofline in rooflines]
    policies = [policy for accepted, _ in found for policy in accepted]
    refused = [refusal for _, refusals in found for refusal in refusals]
    solves: list[float] = []

    def choose(left: Sequence[Policy], explain: bool) -> Fleet:
        started = time.perf_counter()
        fleet = choose_fleet(spec, workload, left, refused, offers, headroom=math.inf, explain=explain)
        solves.append(time.perf_counter() - started)
        return fleet

    started = time.perf_counter()
    fleet, attainment = attain(spec, workload, rooflines, policies, inputs.trace, choose)
    seconds = time.perf_counter() - started - sum(solves)
    requests = workload.request_class("online")
    assert requests.slo is not None
    columns = [c for c in find_columns(policies, offers, spec.market) if not c.policy.rehearsed_only]
    roofs = {roofline.machine.name: roofline for roofline in rooflines}
    laws = {c.name: serving_law(workload, roofs[c.policy.machine.name], c.policy) for c in columns}
    pools = {c.name: pool_of(c.name, c.policy, 1, laws[c.name], 1.0) for c in columns}
    return Case(
        requests=requests,
        slo=requests.slo,
        stream=request_stream(requests, inputs.trace),
        columns=columns,
        pools=pools,
        fleet=fleet,
        planned=attainment.pools,
        found=attainment.classes[0],
        seconds=seconds,
    )


def load(case: Case, column: Column, bucket: int) -> float:
    """Replicas that a bucket keeps busy."""
    rate = column.policy.rates[bucket].requests_per_s.value
    return case.requests.rate_per_s * case.requests.buckets[bucket].share / rate if rate > 0 else math.inf


def routes(case: Case, columns: Sequence[Column], counts: Sequence[int]) -> tuple[list[Route], float]:
    """The routing with the lowest peak load, and that load; infinite where some bucket cannot be served."""
    used = [(c, n) for c, n in zip(columns, counts, strict=True) if n]
    buckets = range(len(case.requests.buckets))
    problem = pulp.LpProblem("routes", pulp.LpMinimize)
    peak = problem.add_variable("peak", 0)
    share = {
        (b, i): problem.add_variable(f"y{b}_{i}", 0, 1)
        for b in buckets
        for i, (c, _) in enumerate(used)
        if math.isfinite(load(case, c, b))
    }
    problem += peak
    for b in buckets:
        if not any(bucket == b for bucket, _ in share):
            return [], math.inf
        problem += pulp.lpSum(y for (bucket, _), y in share.items() if bucket == b) == 1
    for i, (c, n) in enumerate(used):
        problem += pulp.lpSum(load(case, c, b) * y for (b, j), y in share.items() if j == i) <= n * peak
    problem.solve(pulp.PULP_CBC_CMD(msg=False, threads=1))
    return [
        Route(serves="online", bucket=b, column=used[i][0].name, share=y.value())
        for (b, i), y in share.items()
        if y.value() > 1e-9
    ], float(peak.value())


def by_cost(prices: Sequence[float], most_usd: float) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every mix of counts that costs at most so much, cheapest first."""
    heap = [(0.0, tuple(0 for _ in prices))]
    while heap:
        usd, counts = heapq.heappop(heap)
        yield usd, counts
        last = max((i for i, n in enumerate(counts) if n), default=0)
        for i in range(last, len(prices)):
            more = (*counts[:i], counts[i] + 1, *counts[i + 1 :])
            if usd + prices[i] <= most_usd:
                heapq.heappush(heap, (usd + prices[i], more))


def searched(case: Case) -> list[Column]:
    """The plan's columns, then those that attain alone at the least cost."""
    planned = {choice.column.name for choice in case.fleet.choices}
    buckets = range(len(case.requests.buckets))

    def alone_usd(column: Column) -> float:
        pool, whole = case.pools[column.name], sum(load(case, column, b) for b in buckets)
        if not math.isfinite(whole):
            return math.inf
        first = replace(pool, engines=max(1, math.ceil(whole)) * pool.engines)
        needed = engines_needed(case.stream, first, case.slo, case.slo.attainment, 8 * first.engines)
        return column.usd_per_hour * needed / pool.engines if needed else math.inf

    return sorted(case.columns, key=lambda c: (c.name not in planned, alone_usd(c), c.name))[:_MOST_COLUMNS]


def cheapest(case: Case, surge: bool) -> tuple[float, dict[str, int], int]:
    """The cheapest mix that attains: its USD/h, its counts, how many were simulated."""
    columns = searched(case)
    buckets = range(len(case.requests.buckets))
    loads = [sum(load(case, column, b) for b in buckets) for column in columns]
    simulated = 0
    for usd, counts in by_cost([c.usd_per_hour for c in columns], case.fleet.usd_per_hour + 1e-9):
        if not any(counts):
            continue
        if sum(n / whole for n, whole in zip(counts, loads, strict=True)) < _LEAST_CAPACITY:
            continue
        routing, peak = routes(case, columns, counts)
        factor = max(case.pools[c.name].margin for c in columns) if surge else 1.0
        if peak * factor > 1.1:  # more than a tenth overloaded for the length of the trace
            continue
        pools = [
            replace(case.pools[c.name], engines=n * case.pools[c.name].engines)
            for c, n in zip(columns, counts, strict=True)
            if n
        ]
        simulated += 1
        parts = split(case.stream, case.requests.buckets, routing, pools)
        result = replay(parts, pools, case.slo, surge)
        if result.attained_share >= case.slo.attainment:
            return usd, {c.name: n for c, n in zip(columns, counts, strict=True) if n}, simulated
    return case.fleet.usd_per_hour, {"the plan itself": 1}, simulated


def described(counts: dict[str, int]) -> str:
    return " + ".join(
        f"{n} {name.removeprefix('online-').removesuffix('-on-demand')}" for name, n in counts.items()
    )


def row(name: str, rate: float, case: Case) -> str:
    """What was planned and what simulation says of it."""
    found, counts = case.found, {c.column.name: c.replicas for c in case.fleet.choices}
    load_of_fullest = max(
        choice.utilisation * pool.capacity_share
        for choice, pool in zip(case.fleet.choices, case.planned, strict=True)
    )
    return (
        f"| {name}, {rate:g} | {described(counts)} | {case.fleet.usd_per_hour:.2f} | {load_of_fullest:.0%} "
        f"| {found.surge.attained_share:.2%}, {found.planned.attained_share:.2%} "
        f"| {found.surge.ttft.p99_s:.2f} s | {found.surge.itl.p99_s * 1e3:.0f} ms "
        f"| {found.unsimulated_usd_per_hour:.2f}, {found.unsimulated_share:.1%} | {found.fleets_tried}, "
        f"{case.seconds:.1f} s |"
    )


def compared(name: str, rate: float, case: Case) -> str:
    """The plan's cost over those of the cheapest mixes."""
    usd, cells = case.fleet.usd_per_hour, []
    for surge in (True, False):
        least, mix, tried = cheapest(case, surge)
        cells.append(f"{least:.2f}: {described(mix)} ({tried} simulated) | {usd / least:.2f}")
    return f"| {name}, {rate:g} | {usd:.2f} | {' | '.join(cells)} |"


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(CASES)
    cases = {}
    print("attained: in the surge, as planned; P99 in the surge; without simulation: USD/h, attained")
    print(
        "| trace, req/s | plan | USD/h | load | attained | TTFT | ITL | without simulation | fleets, time |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        model, slo, rates = CASES[name]
        for rate in rates:
            cases[name, rate] = compiled(folder / f"{name}.csv.gz", model, slo, rate)
            print(row(name, rate, cases[name, rate]), flush=True)
    print("\n| trace, req/s | plan | cheapest that attains in the surge | ratio | as planned | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (name, rate), case in cases.items():
        print(compared(name, rate, case), flush=True)


if __name__ == "__main__":
    main()
