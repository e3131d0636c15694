"""`moeplan simulate`: what the compiler found, found again from the plan folder; and refusals in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ONLINE, batch_spec

from moeplan.codegen.emit import emit_all
from moeplan.planner.arrivals import request_stream
from moeplan.planner.diagnostics import CompileError
from moeplan.planner.ir.plan import Plan
from moeplan.planner.replay import read_service, replay_requests
from moeplan.planner.simulate.fleet import replay, split

MARKET = "market: {clouds: [gcp], gpus: [A100-80GB, H100], purchase: on-demand}\n"


@pytest.fixture
def plan(compile_text: Callable[[str], Plan]) -> Plan:
    return compile_text(ONLINE + MARKET)


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    (tmp_path / "plan.json").write_text(emit_all(plan)["plan.json"])
    return tmp_path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    times = np.cumsum(np.random.RandomState(5).exponential(1 / 8, 2000))
    rows = [f"{at},{300 + n % 900},{50 + n % 100}" for n, at in enumerate(times)]
    (tmp_path / "requests.csv").write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    return tmp_path / "requests.csv"


def test_the_folder_holds_all_that_a_simulation_needs(plan: Plan, folder: Path) -> None:
    """The stream of the compiler, on what plan.json says: the same figures, but for rounding."""
    service = read_service(folder)
    (found,) = plan.attainment.classes
    parts = split(
        request_stream(plan.workload.classes[0], None), service.buckets, service.routes, service.pools
    )
    again = replay(parts, service.pools, service.slo, surge=True)
    assert again.attained_share == pytest.approx(found.surge.attained_share, abs=2e-4)
    assert again.ttft.p99_s == pytest.approx(found.surge.ttft.p99_s, rel=0.02)
    assert again.itl.p50_s == pytest.approx(found.surge.itl.p50_s, rel=5e-3)


def test_what_is_printed(folder: Path, trace: Path) -> None:
    text = replay_requests(folder, trace)
    assert "2,000 requests at 7.89" in text
    assert "(planned for 8/s)" in text
    assert "at this rate: attained by 100.00%" in text
    assert "15% faster: attained by" in text
    assert "simulated: nothing was measured" in text


def test_a_higher_rate_is_never_better(folder: Path, trace: Path) -> None:
    def attained(rate: str) -> float:
        line = next(x for x in replay_requests(folder, trace, rate).splitlines() if "at this rate" in x)
        return float(line.split("attained by ")[1].split("%")[0])

    shares = [attained(rate) for rate in ("60/min", "20/s", "100/s", "1000/s")]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 100.0
    assert shares[-1] < 90.0


def test_rows_that_are_not_read_are_told(folder: Path, trace: Path) -> None:
    trace.write_text(trace.read_text() + "\n1,2\n")
    assert "not read    1 of 2,001 rows not read, first: requests.csv:2002" in replay_requests(folder, trace)


@pytest.mark.parametrize("rate", ["20", "fast", "0/s", "-1/s", "8/day"])
def test_bad_rates(folder: Path, trace: Path, rate: str) -> None:
    with pytest.raises(CompileError, match="is not a rate"):
        replay_requests(folder, trace, rate)


def test_no_plan(folder: Path, trace: Path, compile_text: Callable[[str], Plan]) -> None:
    with pytest.raises(CompileError, match="no plan folder"):
        replay_requests(folder / "elsewhere", trace)
    batch = compile_text(batch_spec("cpu-2core", "olmoe-1b-7b"))
    (folder / "plan.json").write_text(emit_all(batch)["plan.json"])
    with pytest.raises(CompileError, match="no online work to simulate"):
        replay_requests(folder, trace)


@pytest.mark.parametrize("change", ["no attainment", "no law", "no json", "a list"])
def test_a_changed_plan_is_refused(folder: Path, trace: Path, change: str) -> None:
    path = folder / "plan.json"
    data = json.loads(path.read_text())
    if change == "no attainment":
        del data["attainment"]
    if change == "no law":
        del data["attainment"]["pools"][0]["law"]["step_s"]
    path.write_text({"no json": "{", "a list": "[]"}.get(change, json.dumps(data)))
    with pytest.raises(CompileError, match="not a plan with what a simulation needs"):
        replay_requests(folder, trace)
