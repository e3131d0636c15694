"""The decisions that mattered: alternatives cost what a spec that asks for them compiles to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ONLINE, batch_spec

from moeplan.codegen.summary import summary
from moeplan.planner.explain.case import Source
from moeplan.planner.explain.decisions import _of_a_replica, decisions
from moeplan.planner.ir.analysis import Decision
from moeplan.planner.ir.plan import Plan
from moeplan.planner.pipeline import compile_inputs

Compile = Callable[[str], Plan]
MARKET = ONLINE + "market: {clouds: [gcp], gpus: [A100-80GB, H100]}\n"


def decided(text: str, folder: Path) -> tuple[Plan, tuple[Decision, ...]]:
    case = Source(text.encode(), str(folder / "spec.yaml")).case()
    plan = compile_inputs(case.spec, case.inputs)
    return plan, decisions(plan, case.inputs)


def test_another_gpu_and_another_market(tmp_path: Path, compile_text: Compile) -> None:
    plan, found = decided(MARKET, tmp_path)
    by_choice = {decision.chosen: decision for decision in found}
    bought = {choice.column.market for choice in plan.fleet.choices}
    assert bought == {"spot"}
    on_demand = compile_text(MARKET.replace("clouds:", "purchase: on-demand, clouds:"))
    assert by_choice["spot"].value == plan.fleet.usd_per_hour
    assert by_choice["spot"].other == pytest.approx(on_demand.fleet.usd_per_hour)
    (gpu,) = {choice.column.policy.machine.gpu for choice in plan.fleet.choices}
    other = compile_text(MARKET.replace(f"{gpu}, ", "").replace(f", {gpu}", ""))
    assert by_choice[gpu].other == pytest.approx(other.fleet.usd_per_hour)


@pytest.mark.parametrize("machine", ["g4dn.16xlarge", "gr6.8xlarge", "cpu-2core"])
def test_a_machine_of_ones_own(machine: str, tmp_path: Path) -> None:
    """At most three, the worst alternative first, and each figure of the plan is the plan's."""
    plan, found = decided(batch_spec(machine=machine), tmp_path)
    assert 1 <= len(found) <= 3
    times = [decision.times_worse for decision in found]
    assert times == sorted(times, reverse=True)
    assert times[-1] >= 1.005
    rate = plan.replicas[0].policy.generated_tokens_per_s.value
    assert all(d.value == pytest.approx(rate, rel=0.02) for d in found if d.unit == "tokens/s")


def test_how_several_gpus_share_experts(tmp_path: Path, compile_text: Compile) -> None:
    """128 small experts come out whole; what parts of each would give is told. One GPU has no such choice."""
    plan, _ = decided(batch_spec(model="qwen3-30b-a3b", machine="g2-standard-24"), tmp_path)
    (replica,) = plan.replicas
    assert (replica.policy.gpus, replica.policy.expert_shares) == (2, "whole")
    told = {decision.chosen: decision for decision in _of_a_replica(plan.workload, replica)}
    shared = told["whole experts on each GPU"]
    assert shared.alternative == "a part of every expert on each GPU"
    assert shared.value == pytest.approx(replica.policy.generated_tokens_per_s.value, rel=0.02)
    assert shared.other != shared.value
    alone = compile_text(batch_spec(machine="g4dn.16xlarge"))
    assert not [d for d in _of_a_replica(alone.workload, alone.replicas[0]) if "each GPU" in d.chosen]


def test_the_screen_says_them(tmp_path: Path) -> None:
    plan, found = decided(MARKET, tmp_path)
    lines = summary(plan, "chat.plan", 3, "", found, "report.html").splitlines()
    assert len(lines) <= 24
    told = [line for line in lines if line.startswith("  decided     ")]
    assert len(told) == len(found) == 3
    spot = next(line for line in told if "spot, not on-demand only (" in line)
    assert f"{plan.fleet.usd_per_hour:.2f} USD/h, not " in spot
    assert any("read chat.plan/report.html" in line for line in lines)
