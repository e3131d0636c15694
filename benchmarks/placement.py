"""What placements chosen on the first days of a trace do on later days, beside fixed policies; what intervals
are worth; how long a decision takes; how often all zones are down in the generator.

usage: python benchmarks/placement.py H100.csv.gz H100_PRICES.csv AWS3.csv.gz AWS3_PRICES.csv.gz
[OTHER.csv.gz...]

H100_PRICES has columns region and spot_over_us_on_demand; AWS3_PRICES is a trace of USD per hour (on-demand
3.06). Other traces count with spot at 0.36 of on-demand in all zones. Three replicas; cold starts of 2 and 5
minutes. The target of a row is what SkyServe's default (all zones, one spare) would itself be accepted for on
the first days, less 0.3 points, and round ones. Splits by day: everything before learns, the week after (or
what is left) scores.
"""

from __future__ import annotations

import csv
import gzip
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tables import show

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.spot import SpotTrace
from moeplan.planner.placing.decide import (
    DAY_S,
    Market,
    Wanted,
    candidates,
    choose,
    decide,
    replay_candidate,
    replayed,
    zone_lists,
)
from moeplan.planner.placing.outlook import WEEK_DAYS, availability_interval
from moeplan.planner.placing.shocks import fit_shocks, joint_down
from moeplan.planner.simulate.spot import Policy, replay
from moeplan.planner.spot_traces import read_spot_trace

REPLICAS, COLD_STARTS_S = 3, (120.0, 300.0)
TARGETS = (0.95, 0.97, 0.98)
MOST_SPLITS = 4
LEAST_SAVING, MOST_LOSS = 0.25, 0.003
USUAL_RATIO, AWS3_ON_DEMAND = 0.36, 3.06


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace and its prices, relative to an on-demand machine."""

    name: str
    trace: SpotTrace
    usd: NDArray[np.float64]

    def days(self, first: int, last: int | None) -> Market:
        per_day = int(DAY_S / self.trace.step_s)
        rows = slice(first * per_day, None if last is None else last * per_day)
        return Market(
            capacity=np.ascontiguousarray(self.trace.capacity[rows]),
            step_s=self.trace.step_s,
            usd_per_hour=self.usd,
            on_demand_usd_per_hour=np.ones(len(self.usd)),
            domains=np.arange(len(self.usd)),
        )

    def splits(self) -> Iterator[tuple[int, Market, Market]]:
        whole = int(self.trace.span_s / DAY_S + 1e-6)
        first, last = min(7, whole // 2), whole - min(WEEK_DAYS, whole // 2)
        for known in sorted({round(d) for d in np.linspace(first, last, MOST_SPLITS)}):
            yield known, self.days(0, known), self.days(known, min(whole, known + WEEK_DAYS))


def read_cases(arguments: list[str]) -> list[Case]:
    offers = load_catalog(None, Span("catalog")).offers
    regions = {(offer.cloud, offer.region) for offer in offers}

    def trace(path: str) -> SpotTrace:
        return read_spot_trace(Path(path), Span(path), regions)

    h100, aws3 = trace(arguments[0]), trace(arguments[2])
    with open(arguments[1], newline="") as file:
        ratio = {row["region"]: float(row["spot_over_us_on_demand"]) for row in csv.DictReader(file)}
    with gzip.open(arguments[3], "rt") as file:
        rows = [line.split(",")[1:] for line in file if line[0].isdigit()]
    prices = np.array(rows, dtype=np.float64).mean(axis=0) / AWS3_ON_DEMAND
    cases = [
        Case(name="H100", trace=h100, usd=np.array([ratio[zone.region] for zone in h100.zones])),
        Case(name="AWS3", trace=aws3, usd=prices),
    ]
    for path in arguments[4:]:
        other = trace(path)
        usd = np.full(len(other.zones), USUAL_RATIO) + 1e-4 * np.arange(len(other.zones))
        cases.append(Case(name=Path(path).name.split(".")[0], trace=other, usd=usd))
    return cases


def fixed_policies(market: Market, cold_start_s: float) -> dict[str, tuple[float, float]]:
    """Availability and bill, in shares of on-demand, of policies that choose nothing."""
    usual = Policy(replicas=REPLICAS, extra=1, cold_start_s=cold_start_s)
    policies = {
        "default": usual,
        "no spare": replace(usual, extra=0),
        "two spares": replace(usual, extra=2),
        "one on-demand": replace(usual, base=1),
        "round robin": replace(usual, rule="round-robin", fallback=False),
        "even spread": replace(usual, rule="even-spread", fallback=False),
    }
    columns = np.arange(len(market.usd_per_hour))
    found = {}
    for name, policy in policies.items():
        run = replay(market.capacity, market.step_s, columns, market.usd_per_hour, policy)
        found[name] = run.availability, run.usd_per_hour(1.0) / REPLICAS
    return found


def compare(cases: list[Case]) -> None:
    """Held-out figures of chosen plans, means over splits and cold starts."""
    rows = []
    for case in cases:
        scores: dict[str, list[tuple[float, ...]]] = {}
        for known, train, test in case.splits():
            for cold_start_s in COLD_STARTS_S:
                for target, figures in scored(train, test, cold_start_s).items():
                    scores.setdefault(f"{target}{', 2 weeks' if known >= 14 else ''}", []).append(figures)
        for target, figures in sorted(scores.items()):
            kept, ours, cost, lost, saved, *others = np.array(figures, dtype=np.float64).T
            fixed = np.array(others).reshape(-1, 2, len(figures)).mean(axis=2)
            worse = int(((fixed[:, 0] > ours.mean()) & (fixed[:, 1] < cost.mean())).sum())
            both = (saved >= LEAST_SAVING) & (lost <= MOST_LOSS)
            rows.append(
                [
                    case.name,
                    target,
                    str(len(figures)),
                    f"{kept.mean():.0%}",
                    f"{ours.mean():.2%}",
                    f"{cost.mean():.1%}",
                    f"{lost.mean() * 100:+.2f}",
                    f"{saved.mean():.0%}",
                    f"{both.mean():.0%}",
                    f"{worse} of {len(fixed)}",
                ]
            )
    heads = ["trace", "target", "splits", "kept", "available", "of on-demand", "points lost", "saved", "both"]
    show([*heads, "beaten by"], rows)
    print(
        "lost, saved: against SkyServe's default on the same days; both: at least 25 % for at most 0.3 points"
    )
    print("beaten by: fixed policies that were, over all splits, more available and cheaper\n")


def scored(train: Market, test: Market, cold_start_s: float) -> dict[str, tuple[float, ...]]:
    """How the plan for each target that the first days accept does on later days."""
    every = tuple(range(len(train.usd_per_hour)))
    wanted = Wanted(replicas=REPLICAS, cold_start_s=cold_start_s, availability=0.5)
    found = candidates(train, wanted)
    fixed = fixed_policies(test, cold_start_s)
    available, price = fixed["default"]
    others = [figure for figures in fixed.values() for figure in figures]
    accepted = replay_candidate(train, wanted, every, 1, 0).bound_availability
    results = {}
    for name, target in {**{f"{t:.0%}": t for t in TARGETS}, "default's": accepted - MOST_LOSS}.items():
        asked = replace(wanted, availability=target)
        decision = choose(found, train, asked)
        if decision is None or not decision.kept:
            continue
        best = decision.best
        run = replayed(test, asked, best.zones, best.extra, best.base)
        cost = run.usd_per_hour(1.0) / REPLICAS
        lost, saved = available - run.availability, 1 - cost / price
        results[name] = run.availability >= target, run.availability, cost, lost, saved, *others
    return results


def intervals(cases: list[Case]) -> None:
    """How often the 90 % interval of the first days holds the availability of the week after."""
    inside: Counter[tuple[str, str]] = Counter()
    asked: Counter[tuple[str, str]] = Counter()
    widths: Counter[tuple[str, str]] = Counter()
    for case in cases:
        for known, train, test in case.splits():
            lists = zone_lists(train)
            for cold_start_s in (120.0, 600.0):
                for extra in (0, 1):
                    wanted = Wanted(replicas=REPLICAS, cold_start_s=cold_start_s, availability=0.9)
                    zones = lists[len(lists) // 2]
                    interval = availability_interval(train, wanted, zones, extra, 0)
                    seen = replayed(test, wanted, zones, extra, 0).availability
                    key = case.name, "two weeks or more" if known >= 14 else "less than two weeks"
                    asked[key] += 1
                    inside[key] += interval.low - 1e-9 <= seen <= interval.high + 1e-9
                    widths[key] += interval.high - interval.low  # type: ignore[assignment]
    rows = [
        [*key, str(asked[key]), f"{inside[key] / asked[key]:.0%}", f"{widths[key] / asked[key] * 100:.1f}"]
        for key in sorted(asked)
    ]
    total = sum(inside.values()) / sum(asked.values())
    show(["trace", "days known", "splits", "inside", "mean width, points"], rows)
    print(f"all: {total:.0%} of {sum(asked.values())} splits inside the 90 % interval\n")


def main() -> None:
    cases = read_cases(sys.argv[1:])
    compare(cases)
    intervals(cases)
    for case in cases:
        market = case.days(0, None)
        wanted = Wanted(replicas=REPLICAS, cold_start_s=300.0, availability=0.98)
        started = time.perf_counter()
        decision = decide(market, wanted)
        seconds = time.perf_counter() - started
        tried = decision.tried if decision else 0
        down = float((market.capacity == 0).all(axis=1).mean())
        independent = float((market.capacity == 0).mean(axis=0).prod())
        print(
            f"{case.name}: {len(case.usd)} zones decided in {seconds:.2f} s ({tried} candidates); all down "
            f"{down:.2e} measured, {joint_down(fit_shocks(case.trace)):.2e} in the generator, "
            f"{independent:.1e} were zones independent"
        )


if __name__ == "__main__":
    main()
