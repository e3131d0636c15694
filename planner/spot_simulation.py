"""A plan folder, a spot trace -> what each spot site would have done over it: `moeplan simulate PLAN --spot
TRACE`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.spot import SpotTrace
from moeplan.planner.placing.clairvoyant import clairvoyant_bound, manageable_steps
from moeplan.planner.simulate.batch_spot import run_batch
from moeplan.planner.simulate.spot import Policy, replay, ticks_of
from moeplan.planner.spot_traces import read_spot_trace

_BATCH_STARTS = 500
Site = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRun:
    """An online site over the whole trace. `default_*` are of SkyServe's default in the trace's zones that
    the catalog prices: all of them, one replica to spare. Bills are USD per hour; the clairvoyant's is of the
    last `clairvoyant_days` days, beside our own in them."""

    column: str
    replicas: int
    zones: int
    days: float
    availability: float
    shortfall: float
    preemptions_per_day: float
    usd_per_hour: float
    on_demand_usd_per_hour: float
    default_zones: int
    default_availability: float
    default_usd_per_hour: float
    clairvoyant_days: float
    clairvoyant_usd_per_hour: float
    own_usd_per_hour_then: float
    timeline: NDArray[np.int32] = field(repr=False)  # [ticks, 3]: ready on spot, ready on-demand, lost


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRun:
    """A batch site's replica, launched at many moments of the trace: hours and USD, mean and 90 % interval.

    `resumes` says whether work outlives a preemption; `unfinished` is the share of launches that never end.
    """

    column: str
    replicas: int
    undisturbed_hours: float
    hours: tuple[float, float, float]  # mean, low, high
    usd: tuple[float, float, float]
    on_demand_usd: float
    preemptions: float
    resumes: bool
    unfinished: float


def simulate_spot(plan: Path, trace_path: Path) -> tuple[OnlineRun | BatchRun, ...]:
    """Replay a trace over every spot site of an emitted plan.

    Raises CompileError where the folder holds no plan, the trace cannot be read, or no site has a zone in it.
    """
    compiled = _plan(plan)
    catalog = load_catalog(None, Span("catalog"))
    regions = {(offer.cloud, offer.region) for offer in catalog.offers}
    trace = read_spot_trace(trace_path, Span(str(trace_path)), regions)
    spot = {
        f"{o.machine} {o.cloud}/{o.region}": o.spot_usd_per_hour
        for o in catalog.offers
        if o.spot_usd_per_hour
    }
    runs: list[OnlineRun | BatchRun] = []
    for site, choice in zip(compiled["placement"]["sites"], compiled["fleet"]["choices"], strict=True):
        columns, usd = _columns(trace, site["zones"])
        if site["market"] != "spot" or not columns:
            continue
        if site["serves"] == "online":
            machine = _machine(compiled, site["column"])
            prices = {str(z): spot.get(f"{machine} {z.cloud}/{z.region}") for z in trace.zones}
            runs.append(_online(site, trace, columns, usd, prices))
        else:
            runs.append(_batch(compiled, site, choice, trace, columns, usd))
    if not runs:
        message = "no spot site of this plan has a zone in the trace"
        zones = ", ".join(map(str, trace.zones))
        raise CompileError(
            Diagnostic(code="no-site", span=Span(str(plan)), message=message, hint=f"the trace has {zones}")
        )
    return tuple(runs)


def _plan(folder: Path) -> dict[str, Any]:
    try:
        compiled = json.loads((folder / "plan.json").read_bytes())
        sites, choices = compiled["placement"]["sites"], compiled["fleet"]["choices"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CompileError(
            Diagnostic(
                code="no-plan",
                span=Span(str(folder)),
                message="holds no plan.json that can be read",
                hint="`moeplan compile SPEC` writes the folder",
            )
        ) from None
    if len(sites) != len(choices):
        raise CompileError(Diagnostic(code="no-plan", span=Span(str(folder)), message="plan.json is damaged"))
    return dict(compiled)


def _machine(compiled: Mapping[str, Any], column: str) -> str:
    return str(next(r["policy"]["machine"]["name"] for r in compiled["replicas"] if r["name"] == column))


def _columns(trace: SpotTrace, zones: Sequence[Site]) -> tuple[list[int], NDArray[np.float64]]:
    """The trace's zones that the site uses, and their prices; a region stands for all its zones."""
    found = [
        (n, float(zone["usd_per_hour"]))
        for n, name in enumerate(trace.zones)
        for zone in zones
        if (zone["cloud"], zone["region"]) == (name.cloud, name.region)
        and zone.get("zone", "") in ("", name.zone)
    ]
    return [n for n, _ in found], np.array([usd for _, usd in found], dtype=np.float64)


def _online(
    site: Site,
    trace: SpotTrace,
    columns: Sequence[int],
    usd: NDArray[np.float64],
    prices: Mapping[str, float | None],
) -> OnlineRun:
    replicas, cold_s = int(site["replicas"]), float(site["cold_start_s"])
    on_demand = min(float(zone["on_demand_usd_per_hour"]) for zone in site["zones"])
    policy = Policy(
        replicas=replicas,
        extra=int(site["spot_overprovision"]),
        base=int(site["on_demand_base"]),
        cold_start_s=cold_s,
        fallback=bool(site["on_demand_fallback"]),
    )
    used = np.array(columns, dtype=np.int64)
    timeline = np.zeros((ticks_of(trace.steps, trace.step_s), 3), np.int32)
    run = replay(trace.capacity, trace.step_s, used, usd, policy, timeline=timeline)
    priced = [n for n, zone in enumerate(trace.zones) if prices[str(zone)] is not None]
    every = np.array([prices[str(trace.zones[n])] for n in priced], dtype=np.float64)
    usual = Policy(replicas=replicas, extra=1, cold_start_s=cold_s)
    default = (
        replay(trace.capacity, trace.step_s, np.array(priced, dtype=np.int64), every, usual)
        if priced
        else run
    )
    steps = min(trace.steps, manageable_steps(trace.step_s, cold_s, len(columns), replicas))
    part = np.ascontiguousarray(trace.capacity[-steps:, columns])
    then = replay(part, trace.step_s, np.arange(len(columns)), usd, policy)
    return OnlineRun(
        column=str(site["column"]),
        replicas=replicas,
        zones=len(columns),
        days=trace.span_s / 86400,
        availability=run.availability,
        shortfall=run.shortfall,
        preemptions_per_day=run.preemptions_per_day,
        usd_per_hour=run.usd_per_hour(on_demand),
        on_demand_usd_per_hour=_all_on_demand(site) or replicas * on_demand,
        default_zones=len(priced),
        default_availability=default.availability,
        default_usd_per_hour=default.usd_per_hour(on_demand),
        clairvoyant_days=steps * trace.step_s / 86400,
        clairvoyant_usd_per_hour=clairvoyant_bound(
            part, trace.step_s, usd, on_demand, replicas, cold_s, then.availability
        ),
        own_usd_per_hour_then=then.usd_per_hour(on_demand),
        timeline=timeline,
    )


def _all_on_demand(site: Site) -> float:
    """What the plan says that on-demand machines only would cost; 0 where it does not."""
    return float(site["outlook"]["all_on_demand_usd_per_hour"]) if site.get("outlook") else 0.0


def _batch(
    compiled: Mapping[str, Any],
    site: Site,
    choice: Mapping[str, Any],
    trace: SpotTrace,
    columns: Sequence[int],
    usd: NDArray[np.float64],
) -> BatchRun:
    """One replica's part of the work. runtime_min keeps answers as they come and loses what is in flight: on
    average each sequence is half done, which is half of what all sequences take from prompt to end."""
    policy = next(r["policy"] for r in compiled["replicas"] if r["name"] == site["column"])
    work_s = max(1.0, float(choice["hours"]) * 3600 - float(site["cold_start_s"]))
    resumes = policy["engine"] == "runtime_min"
    requests = next(c for c in compiled["workload"]["classes"] if c["name"] == "batch")
    outputs = sum(b["share"] * b["output_tokens"] for b in requests["buckets"])
    rate = float(policy["generated_tokens_per_s"]["value"])
    redone_s = min(work_s, policy["sequences"] * outputs / rate / 2) if resumes else work_s
    starts = np.unique(np.linspace(0, trace.steps - 1, _BATCH_STARTS).astype(np.int64))
    run = run_batch(
        np.ascontiguousarray(trace.capacity[:, columns]),
        trace.step_s,
        usd,
        work_s,
        float(site["cold_start_s"]),
        redone_s,
        starts,
    )
    done = np.isfinite(run.seconds)
    on_demand = min(float(zone["on_demand_usd_per_hour"]) for zone in site["zones"])
    return BatchRun(
        column=str(site["column"]),
        replicas=int(site["replicas"]),
        undisturbed_hours=float(choice["hours"]),
        hours=_spread(run.seconds[done] / 3600),
        usd=_spread(run.usd[done]),
        on_demand_usd=on_demand * float(choice["hours"]),
        preemptions=float(run.preemptions[done].mean()) if done.any() else 0.0,
        resumes=resumes,
        unfinished=float((~done).mean()),
    )


def _spread(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean, 5 % and 95 % quantile; infinite where there are none."""
    if not len(values):
        return (float("inf"),) * 3
    low, high = np.quantile(values, (0.05, 0.95))
    return float(values.mean()), float(low), float(high)


def run_lines(run: OnlineRun | BatchRun) -> list[str]:
    """What a run says, for the screen."""
    return _online_lines(run) if isinstance(run, OnlineRun) else _batch_lines(run)


def _online_lines(run: OnlineRun) -> list[str]:
    on_demand = run.on_demand_usd_per_hour
    share = run.usd_per_hour / on_demand
    gap = run.own_usd_per_hour_then - run.clairvoyant_usd_per_hour
    return [
        f"{run.column}: {run.replicas} replicas over {run.zones} zones, {run.days:.1f} d replayed",
        f"  available   {run.availability:.2%} of the time, {run.shortfall:.2%} of replicas missing",
        f"  bill        {run.usd_per_hour:.2f} USD/h, {share:.1%} of {on_demand:.2f} on-demand",
        f"  preemptions {run.preemptions_per_day:.2f} a day",
        f"  default     all {run.default_zones} zones, one spare: {run.default_availability:.2%} available, "
        f"{run.default_usd_per_hour:.2f} USD/h",
        f"  clairvoyant {run.clairvoyant_usd_per_hour:.2f} USD/h is the least in these zones in the last "
        f"{run.clairvoyant_days:.1f} d; {gap:.2f} below ours then",
    ]


def _batch_lines(run: BatchRun) -> list[str]:
    how = "answers are kept" if run.resumes else "work begins anew"
    lines = [
        f"{run.column}: {run.replicas} × {run.undisturbed_hours:.2f} h undisturbed; after a preemption {how}",
        f"  done after  {run.hours[0]:.2f} h ({run.hours[1]:.2f} to {run.hours[2]:.2f}), "
        f"{run.preemptions:.2f} preemptions",
        f"  bill        {run.usd[0]:.2f} USD ({run.usd[1]:.2f} to {run.usd[2]:.2f}) each, "
        f"{run.on_demand_usd:.2f} on-demand",
    ]
    if run.unfinished:
        lines.append(f"  never done  {run.unfinished:.0%} of launches: spells are shorter than the work")
    return lines
