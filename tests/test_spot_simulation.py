"""`moeplan simulate PLAN --spot TRACE` as a user meets it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from commands import moeplan
from conftest import batch_spec

from moeplan.codegen.timeline import Curve, timeline_svg
from moeplan.planner.spot_simulation import OnlineRun, simulate_spot

EXAMPLE = Path(__file__).parents[1] / "examples" / "qwen3-spot"
PLAN = EXAMPLE / "qwen3-spot.plan"


def test_the_plan_over_its_own_trace_does_what_it_says() -> None:
    """The replay knows plan.json only, and comes to the bill and shortfall that the plan expects."""
    import json

    (run,) = simulate_spot(PLAN, EXAMPLE / "spot.csv")
    assert isinstance(run, OnlineRun)
    (site,) = json.loads((PLAN / "plan.json").read_bytes())["placement"]["sites"]
    outlook = site["outlook"]
    assert run.usd_per_hour == pytest.approx(outlook["usd_per_hour"], rel=1e-3)
    assert run.shortfall == pytest.approx(outlook["shortfall"], rel=1e-3)
    assert outlook["availability"]["low"] <= run.availability <= outlook["availability"]["high"]
    assert run.clairvoyant_usd_per_hour <= run.own_usd_per_hour_then
    assert run.usd_per_hour < run.default_usd_per_hour


def test_screen_and_plot(tmp_path: Path) -> None:
    plot = tmp_path / "timeline.svg"
    done = moeplan("simulate", PLAN, "--spot", EXAMPLE / "spot.csv", "--plot", plot)
    assert done.returncode == 0
    assert re.search(r"available   9\d\.\d\d% of the time", done.stdout)
    assert "of 11.97 on-demand" in done.stdout
    first = plot.read_bytes()
    assert len(ET.fromstring(first).findall(".//{http://www.w3.org/2000/svg}path")) >= 4
    moeplan("simulate", PLAN, "--spot", EXAMPLE / "spot.csv", "--plot", plot)
    assert plot.read_bytes() == first


def test_batch_work_on_spot(tmp_path: Path) -> None:
    """The engine of a rented batch replica keeps nothing: a preemption costs all that was done."""
    spec = tmp_path / "spec.yaml"
    text = batch_spec(model="qwen3-30b-a3b").replace("2000", "200000")
    spec.write_text(
        text + "market: {clouds: [gcp], gpus: [L4], purchase: spot, regions: [gcp/us-central1]}\n"
    )
    assert moeplan("compile", spec).returncode == 0
    done = moeplan("simulate", tmp_path / "job.plan", "--spot", EXAMPLE / "spot.csv")
    assert done.returncode == 0
    found = re.search(r"done after  ([\d.]+) h", done.stdout)
    undisturbed = re.search(r"× ([\d.]+) h undisturbed; after a preemption work begins anew", done.stdout)
    assert found is not None
    assert undisturbed is not None
    assert float(found[1]) > float(undisturbed[1])


def test_what_cannot_be_simulated(tmp_path: Path) -> None:
    done = moeplan("simulate", tmp_path, "--spot", EXAMPLE / "spot.csv")
    assert (done.returncode, "no plan.json" in done.stderr) == (2, True)
    done = moeplan("simulate", PLAN, "--spot", tmp_path / "none.csv")
    assert (done.returncode, "No such file" in done.stderr) == (2, True)
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_text("# step_seconds: 60\nstep,us-east-1a\n0,3\n1,2\n")
    done = moeplan("simulate", PLAN, "--spot", elsewhere)
    assert (done.returncode, "no spot site of this plan has a zone" in done.stderr) == (2, True)
    assert moeplan("simulate", PLAN).returncode == 2


def test_timeline_is_to_scale() -> None:
    """Half the time two of two, half one: the spot area is at the line and then at half of it."""
    curve = Curve(name="a & b", wanted=2, tick_s=30.0, spot=[2] * 10 + [1] * 10, on_demand=[0] * 20)
    root = ET.fromstring(timeline_svg("x", [curve]))
    rects = root.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len([r for r in rects if r.get("height") == "5"]) == 10
    assert "a &amp; b" in timeline_svg("x", [curve])


def test_levels_can_be_dumped(tmp_path: Path) -> None:
    done = moeplan("compile", EXAMPLE / "spec.yaml", "-o", tmp_path / "out", "--dump-ir", tmp_path / "ir")
    assert done.returncode == 0
    assert "europe-west4-b" in next((tmp_path / "ir").glob("*-inputs.json")).read_text()
