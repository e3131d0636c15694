"""The replay that the report draws: what `moeplan simulate` says of the same plan and trace, and of a trace
that can be followed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeplan.codegen.plots import timeline_chart
from moeplan.planner.explain.case import Case, Source, solve
from moeplan.planner.explain.timeline import timelines
from moeplan.planner.ir.analysis import Timeline
from moeplan.planner.ir.plan import Plan
from moeplan.planner.spot_simulation import OnlineRun, simulate_spot

EXAMPLE = Path(__file__).parents[2] / "examples" / "qwen3-spot"


@pytest.fixture(scope="module")
def placed() -> tuple[Plan, Case]:
    spec = EXAMPLE / "spec.yaml"
    case = Source(spec.read_bytes(), str(spec)).case()
    plan = solve(case)
    assert isinstance(plan, Plan)
    return plan, case


@pytest.fixture(scope="module")
def timeline(placed: tuple[Plan, Case]) -> Timeline:
    (found,) = timelines(placed[0], placed[1].inputs)
    return found


def test_it_is_what_the_simulation_of_the_folder_says(timeline: Timeline) -> None:
    """The simulation reads the checked-in plan.json and the trace, and knows no record of ours."""
    (run,) = simulate_spot(EXAMPLE / "qwen3-spot.plan", EXAMPLE / "spot.csv")
    assert isinstance(run, OnlineRun)
    assert timeline.wanted == run.replicas
    days = timeline.rows[-1].end_s / 86400
    assert days == pytest.approx(run.days)
    for parts in (timeline.rows, timeline.columns):
        lengths = np.array([part.end_s - part.begin_s for part in parts])
        assert sum(part.preemptions for part in parts) / days == pytest.approx(run.preemptions_per_day)
        enough = sum(part.enough_share * length for part, length in zip(parts, lengths, strict=True))
        assert enough / lengths.sum() == pytest.approx(run.availability, abs=5e-4)
        means = [part.on_spot * length for part, length in zip(parts, lengths, strict=True)]
        assert sum(means) / lengths.sum() == pytest.approx(run.timeline[:, 0].mean())


def test_parts_follow_each_other(timeline: Timeline) -> None:
    """At most 14 rows of whole days, and columns without gaps to the same end."""
    assert len(timeline.rows) <= 14
    assert all(part.begin_s % 86400 == 0 for part in timeline.rows)
    for parts in (timeline.rows, timeline.columns):
        assert parts[0].begin_s == 0.0
        assert [part.end_s for part in parts[:-1]] == [part.begin_s for part in parts[1:]]
    assert timeline.rows[-1].end_s == timeline.columns[-1].end_s


def test_an_outage_by_hand(placed: tuple[Plan, Case]) -> None:
    """Nothing to be had anywhere on the second of three days: all replicas are lost once, on-demand ones
    stand in after their cold start, and spot is back a cold start after the outage."""
    plan, case = placed
    trace = case.inputs.spot_trace
    assert trace is not None
    steps = round(86400 / trace.step_s)
    capacity = np.full((3 * steps, len(trace.zones)), 8, np.int16)
    capacity[steps : 2 * steps] = 0
    inputs = replace(case.inputs, spot_trace=replace(trace, capacity=capacity))
    (found,) = timelines(plan, inputs)
    (site,) = plan.placement.sites
    first, outage, after = found.rows
    cold_days = site.cold_start_s / 86400
    assert [part.preemptions for part in found.rows] == [0, site.replicas + site.spot_overprovision, 0]
    assert first.enough_share == 1.0
    assert outage.on_spot == pytest.approx(0.0, abs=1e-3)
    assert outage.on_demand == pytest.approx(site.replicas * (1 - cold_days), rel=0.01)
    assert outage.enough_share == pytest.approx(1 - cold_days, rel=0.01)
    assert after.on_spot == pytest.approx(found.wanted * (1 - cold_days), rel=0.01)


def test_none_without_a_trace(placed: tuple[Plan, Case]) -> None:
    plan, case = placed
    assert timelines(plan, replace(case.inputs, spot_trace=None)) == ()


def test_the_chart_says_what_it_shows(timeline: Timeline) -> None:
    chart = timeline_chart(timeline)
    lost = sum(part.preemptions for part in timeline.rows)
    assert f"{lost} spot replicas are lost" in chart.alt
    assert chart == timeline_chart(timeline)
    calm = [replace(part, preemptions=0, enough_share=1.0) for part in timeline.columns]
    bare = replace(timeline, columns=tuple(calm))
    assert chart.svg.count("<use") > timeline_chart(bare).svg.count("<use")
