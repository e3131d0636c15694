"""Two plans compared by meaning: what changed is told with both values, what did not is not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ONLINE, batch_spec

from moeplan.codegen import plan_diff
from moeplan.codegen.emit import plan_json
from moeplan.planner.ir.plan import Plan

Compile = Callable[[str], Plan]


def data(plan: Plan) -> dict[str, Any]:
    return dict(json.loads(plan_json.emit(plan)["plan.json"]))


def changed(difference: plan_diff.Difference) -> dict[tuple[str, str], plan_diff.Change]:
    return {(change.part, change.what): change for change in difference.changes}


def test_a_plan_equals_itself(compile_text: Compile) -> None:
    plan = data(compile_text(ONLINE))
    difference = plan_diff.compare(plan, copy.deepcopy(plan))
    assert difference.changes == ()
    assert plan_diff.markdown(difference) == "**chat**: nothing changes in meaning; plan.json is the same\n"


def test_more_requests_cost_what_the_plans_say(compile_text: Compile) -> None:
    """Both values of each change are those of the plans, and the ratio is theirs."""
    slow, fast = compile_text(ONLINE), compile_text(ONLINE.replace("rate: 8/s", "rate: 80/s"))
    difference = plan_diff.compare(data(slow), data(fast))
    rate = changed(difference)["work", "online rate"]
    assert (rate.before, rate.after) == (
        plan_diff.Fact(text="8/s", number=8),
        plan_diff.Fact(text="80/s", number=80),
    )
    cost = changed(difference)["cost", "USD per hour"]
    assert cost.before is not None
    assert cost.after is not None
    assert cost.before.number == pytest.approx(slow.fleet.usd_per_hour)
    assert cost.after.number == pytest.approx(fast.fleet.usd_per_hour)
    assert cost.ratio == pytest.approx(fast.fleet.usd_per_hour / slow.fleet.usd_per_hour, rel=1e-4)
    assert ("work", "model") not in changed(difference)
    lines = plan_diff.markdown(difference).splitlines()
    assert lines[0].startswith("**chat**: USD per hour ")
    assert all(line.count("|") == 6 for line in lines[2:])


def test_batch_work_is_told_by_its_bill_first(compile_text: Compile) -> None:
    """The slower machine costs less an hour and more in all: the headline is what is paid."""
    text = batch_spec(model="qwen3-30b-a3b")
    fast, slow = (
        compile_text(f"{text}market: {{clouds: [gcp], gpus: [{gpu}]}}\n") for gpu in ("A100-80GB", "L4")
    )
    assert slow.fleet.usd_per_hour < fast.fleet.usd_per_hour
    bills = [f"{plan.fleet.choices[0].usd:.2f}" for plan in (fast, slow)]
    headline = plan_diff.headline(plan_diff.compare(data(fast), data(slow)))
    assert headline.startswith(f"USD in all for the batch work {bills[0]} → {bills[1]} (+")


def test_backwards_is_the_mirror_image(compile_text: Compile) -> None:
    t4, l4 = (data(compile_text(batch_spec(machine=name))) for name in ("g4dn.16xlarge", "gr6.8xlarge"))
    there, back = plan_diff.compare(t4, l4), plan_diff.compare(l4, t4)
    assert {(c.part, c.what, c.before, c.after) for c in there.changes} == {
        (c.part, c.what, c.after, c.before) for c in back.changes
    }


def test_another_machine_is_one_line_of_the_fleet(compile_text: Compile) -> None:
    """Replicas of other names that do the same work are compared with each other."""
    t4, l4 = (data(compile_text(batch_spec(machine=name))) for name in ("g4dn.16xlarge", "gr6.8xlarge"))
    found = changed(plan_diff.compare(t4, l4))
    assert [what for part, what in found if part == "fleet"] == ["batch replica: machine"]
    assert found["fleet", "batch replica: machine"].before == plan_diff.Fact(text="g4dn.16xlarge, owned")
    assert all(change.before and change.after for (part, _), change in found.items() if part == "prediction")


def test_replicas_that_come_and_go(compile_text: Compile) -> None:
    plan = data(compile_text(ONLINE))
    more = copy.deepcopy(plan)
    again = copy.deepcopy(more["fleet"]["choices"][0])
    again["column"]["name"] += "-2"
    more["fleet"]["choices"].append(again)
    more["replicas"].append({**copy.deepcopy(more["replicas"][0]), "name": again["column"]["name"]})
    new = [c for c in plan_diff.compare(plan, more).changes if c.part == "fleet"]
    assert new
    assert all(change.before is None and change.what.startswith(again["column"]["name"]) for change in new)


def test_what_has_no_fact_is_named_by_its_section(compile_text: Compile) -> None:
    plan = data(compile_text(ONLINE))
    other = {**copy.deepcopy(plan), "facts_sha256": "0"}
    text = plan_diff.markdown(plan_diff.compare(plan, other))
    assert text == "**chat**: nothing changes in meaning; only other values differ, under facts_sha256\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "not a plan"),
        ("[]", "format None"),
        ('{"format": 99}', "format 99, this version reads 1"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(plan_diff.PlanFileError, match=says):
        plan_diff.read_plan(tmp_path)


def test_a_plan_of_other_fields_is_refused_not_a_crash(compile_text: Compile) -> None:
    plan = data(compile_text(ONLINE))
    del plan["placement"]["sites"]
    with pytest.raises(plan_diff.PlanFileError, match="'sites'"):
        plan_diff.compare(plan, plan)


def test_simulated_latency_and_availability_are_compared_where_there_are_any(compile_text: Compile) -> None:
    before = data(compile_text(ONLINE))
    after = copy.deepcopy(before)
    for plan, share in ((before, 0.99), (after, 0.95)):
        simulated = {"serves": "online", "planned": {"attained_share": share, "ttft": {"p99_s": 1.5}}}
        plan["attainment"] = {"classes": [simulated]}
        plan["placement"]["sites"][0]["outlook"] = {"usd_per_hour": 2.0, "availability": {"value": share}}
    found = changed(plan_diff.compare(before, after))
    assert found["prediction", "online: SLO kept, simulated"].ratio == pytest.approx(0.95 / 0.99)
    assert [what for part, what in found if part == "placement"] == [
        f"{before['fleet']['choices'][0]['column']['name']}: enough replicas ready"
    ]
