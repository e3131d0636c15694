"""Why this fleet, in words: a tie is called one, and a fleet whose queues nobody simulated says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import EXAMPLES, example_plan

from moeplan.codegen.fleet_text import TIE_RULE, fleet_lines
from moeplan.planner.explain.case import Source, decide
from moeplan.planner.explain.outcomes import outcome_of
from moeplan.planner.ir.fleet import UNSIMULATED, Fleet, Mix
from moeplan.planner.ir.plan import Plan


@pytest.fixture(scope="module")
def tied() -> Plan:
    return example_plan("qwen3-online")


def line_of(plan: Plan, start: str) -> str:
    (line,) = (line for line in fleet_lines(plan) if line.startswith(start))
    return line


def test_a_runner_up_at_the_same_cost_is_called_equal(tied: Plan) -> None:
    runner_up = tied.fleet.sensitivity.runner_up
    assert runner_up
    assert runner_up.cost == pytest.approx(tied.fleet.cost, abs=1e-3)
    assert line_of(tied, "best with one column per class").endswith(": this fleet")
    assert line_of(tied, "runner-up").endswith(f"; equal in cost: {TIE_RULE}")


def test_a_dearer_runner_up_is_not(tied: Plan) -> None:
    runner_up = Mix(parts=(("other", 2),), cost=2 * tied.fleet.cost)
    why = replace(tied.fleet.sensitivity, runner_up=runner_up)
    plan = replace(tied, fleet=replace(tied.fleet, sensitivity=why))
    assert line_of(plan, "runner-up").endswith(f"{UNSIMULATED}; this fleet saves 50.0% of that")


def test_an_unsimulated_runner_up_may_fail_in_simulation() -> None:
    """By throughput two g6e.12xlarge would do; with that GPU forced, queues ask for a dearer fleet."""
    plan = example_plan("qwen3-aws")
    assert UNSIMULATED in line_of(plan, "runner-up")
    assert line_of(plan, "best with one column per class").endswith(": this fleet")
    path = EXAMPLES / "qwen3-aws" / "spec.yaml"
    forced = decide(Source(path.read_bytes(), str(path)).case(("market.gpus=[L40S]",)))
    assert isinstance(forced, Fleet)
    assert plan.fleet.sensitivity.runner_up
    assert outcome_of(forced).usd_per_hour > plan.fleet.sensitivity.runner_up.cost
