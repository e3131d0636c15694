"""report.md says each thing once, and nothing that does not hold of the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ONLINE, batch_spec

from moeplan.codegen.emit import report, report_html
from moeplan.planner.explain.analyse import analyse
from moeplan.planner.explain.case import Source, solve
from moeplan.planner.ir.plan import Plan

EXAMPLES = Path(__file__).parents[2] / "examples"
SPOT = ONLINE + "market: {clouds: [gcp], gpus: [A100-80GB, H100], purchase: spot}\n"


def text_of(plan: Plan) -> str:
    return report.emit(plan)["report.md"]


def test_a_lone_refused_machine_is_named_once(compile_text: Callable[[str], Plan]) -> None:
    plan = compile_text(batch_spec(machine="g4dn.16xlarge"))
    (line,) = (line for line in text_of(plan).splitlines() if line.startswith("- batch, gpu memory: "))
    assert line.count("g4dn.16xlarge") == 1


def test_a_load_is_promised_only_to_a_deadline(compile_text: Callable[[str], Plan]) -> None:
    spec = batch_spec(machine="g4dn.16xlarge")
    assert "% load" not in text_of(compile_text(spec))
    timed = compile_text(spec.replace("batch: {", "batch: {deadline: 100h, ", 1))
    (choice,) = timed.fleet.choices
    assert f"The batch's deadline is planned to at most {choice.target:.0%} load." in text_of(timed)


def test_online_load_is_not_called_a_plan_to_all_of_it(compile_text: Callable[[str], Plan]) -> None:
    text = text_of(compile_text(SPOT))
    assert "The load of online replicas is of what queues leave of their throughput." in text
    assert "% load" not in text


def test_regions_are_called_regions(compile_text: Callable[[str], Plan]) -> None:
    plan = compile_text(SPOT)
    assert not any(zone.zone for site in plan.placement.sites for zone in site.zones)
    assert "| region, cheapest first |" in text_of(plan)
    assert "| zone, cheapest first |" not in text_of(plan)


@pytest.mark.parametrize("kind", ["report.md", "report.html"])
def test_measured_kernels_are_no_measured_run(kind: str) -> None:
    path = EXAMPLES / "tinymoe" / "spec.yaml"
    case = Source(path.read_bytes(), str(path)).case()
    plan = solve(case)
    assert isinstance(plan, Plan)
    assert plan.replicas[0].policy.generated_tokens_per_s.provenance == "measured"
    files = report.emit(plan) | report_html.emit(plan, analyse(plan, case.inputs))
    assert report.UNRUN_KERNELS in files[kind]
    assert "| measured |" not in files[kind]
    assert "<td>measured</td>" not in files[kind]
