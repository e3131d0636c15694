"""A plan for packed experts: what makes the checkpoint, what runs it, what the report says of the choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from moeplan.codegen.emit import compose, report, runtime, skypilot
from moeplan.codegen.summary import summary
from moeplan.planner.explain.decisions import decisions
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.plan import Plan
from moeplan.runtime_min.__main__ import _parser
from moeplan.runtime_min.plan_file import load

SPEC = """\
name: job
model: {name: mixtral-8x7b, quantize: int8}
workload: {batch: {requests: 64, prompt: 4, output: 128}}
machine: {name: cpu-2core, memory: 20 GiB}
"""


@pytest.fixture
def plan(compile_text: Callable[[str], Plan]) -> Plan:
    return compile_text(SPEC)


def test_the_runtime_is_told_the_packing(plan: Plan, tmp_path: Path) -> None:
    for name, text in runtime.emit(plan).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    loaded = load(file.parent)
    assert loaded.model.packing == "int8"
    assert loaded.pages.slot_bytes < 2 * 1.1 * loaded.model.expert_parameters


def test_the_next_commands_are_ones_that_the_parsers_take(plan: Plan) -> None:
    lines = summary(plan, "job.plan", 3, " --checkpoint ../mixtral").splitlines()
    first, then = (line.split("next        ")[1] for line in lines if line.startswith("  next        "))
    assert first == "runtime_min quantize ../mixtral ../mixtral-int8 --to int8"
    assert _parser().parse_args(first.split()[1:]).to == "int8"
    assert then.startswith("moeplan run job.plan --checkpoint ../mixtral-int8 --input ")
    beside = summary(plan, "some/job.plan", 3, "")
    assert "moeplan run some/job.plan --input" in beside


def test_the_report_has_the_alternatives(plan: Plan) -> None:
    text = report.emit(plan)["report.md"]
    assert "weights packed in int8 streamed from disk" in text
    assert "`runtime_min quantize CHECKPOINT CHECKPOINT-int8 --to int8`" in text
    stored, packed = (option.generated_tokens_per_s for option in plan.replicas[0].policy.weights_options)
    rows = [line for line in text.splitlines() if "tokens/s |" in line and "GiB" in line]
    assert [row.split("|")[1].strip() for row in rows] == ["weights, as stored", "weights, int8, chosen"]
    assert f"{stored:.3g} tokens/s" in rows[0]
    assert f"{packed:.3g} tokens/s" in rows[1]
    assert "(tinymoe)" in rows[1]


def test_it_is_a_decision(plan: Plan) -> None:
    found = next(d for d in decisions(plan, load_inputs(plan.spec)) if d.chosen.startswith("experts in int8"))
    assert "on tinymoe" in found.chosen
    assert found.value == pytest.approx(plan.replicas[0].policy.generated_tokens_per_s.value, rel=0.02)


def test_compose_asks_for_the_packed_folder(plan: Plan) -> None:
    text = compose.emit(plan)["compose.yaml"]
    assert (
        "CHECKPOINT_INT8: the folder that `runtime_min quantize CHECKPOINT CHECKPOINT-int8 --to int8`" in text
    )
    (service,) = yaml.safe_load(text)["services"].values()
    assert any("CHECKPOINT_INT8" in str(volume.get("source")) for volume in service["volumes"])


OWN_OFFERS = """\
cloud,region,instance,on_demand_usd_per_hour,spot_usd_per_hour,date,source
aws,us-east-1,cpu-32core,1.5,,2026-01-01,test
"""


def test_a_rented_machine_packs_what_it_fetches(compile_text: Callable[[str], Plan], tmp_path: Path) -> None:
    (tmp_path / "catalog").mkdir()
    (tmp_path / "catalog" / "offers.csv").write_text(OWN_OFFERS)
    market = "market: {machines: [cpu-32core]}\ncatalog: catalog"
    text = SPEC.replace("machine: {name: cpu-2core, memory: 20 GiB}", market)
    plan = compile_text(text.replace("mixtral-8x7b", "mixtral-8x22b"))
    assert plan.replicas[0].policy.weights_dtype == "int8"
    (job,) = skypilot.emit(plan).values()
    setup = yaml.safe_load(job)["setup"]
    assert "runtime_min quantize ~/checkpoint ~/packed --to int8" in setup
    assert setup.index("hf download") < setup.index("quantize") < setup.index("mv ~/packed ~/checkpoint")


def test_the_plan_file_says_what_was_considered(plan: Plan) -> None:
    from moeplan.codegen.emit import plan_json

    policy = json.loads(plan_json.emit(plan)["plan.json"])["replicas"][0]["policy"]
    assert policy["weights_dtype"] == "int8"
    assert [option["dtype"] for option in policy["weights_options"]] == ["checkpoint", "int8"]
    assert policy["weights_options"][1]["quality"][0]["source"].startswith("python benchmarks/packing.py")
