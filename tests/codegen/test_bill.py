"""Costs in words: machines deployed, bill expected and fleet solved are three amounts, told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import example_plan

from moeplan.codegen.bill import cost_lines, deployed, deployed_usd_per_hour, token_prices
from moeplan.codegen.emit import report
from moeplan.codegen.summary import summary
from moeplan.planner.ir.plan import Plan


@pytest.fixture(scope="module")
def traced() -> Plan:
    """A site that a trace placed: fewer replicas than were solved for."""
    return example_plan("qwen3-spot")


def test_deployed_expected_and_solved_are_told_apart(traced: Plan) -> None:
    (choice,), (site,) = traced.fleet.choices, traced.placement.sites
    assert site.outlook
    assert deployed(site) < choice.replicas
    now, expected, solved = cost_lines(traced)
    machines = [row.split(" | ") for row in report.emit(traced)["report.md"].splitlines() if row[:3] == "| o"]
    assert now.startswith(f"{machines[0][5]} USD/h while everything runs, if all ran in the cheapest place")
    dearest = max(zone.usd_per_hour for zone in site.zones)
    assert f"{deployed(site) * dearest:.2f} in the dearest" in now
    assert f": {site.outlook.usd_per_hour:.2f} USD/h expected" in expected
    assert solved.startswith(f"{choice.replicas * choice.column.usd_per_hour:.2f} USD/h as solved")


def test_report_and_summary_tell_the_same(traced: Plan) -> None:
    text, screen = report.emit(traced)["report.md"], summary(traced, "x.plan", 1, "")
    for line in cost_lines(traced):
        assert f"- {line}.\n" in text
        assert f"  cost        {line}" in screen


def test_a_million_tokens_cost_their_share_of_the_expected_bill(traced: Plan) -> None:
    ((serves, price, bill),) = token_prices(traced)
    (requests,), (site,) = traced.workload.classes, traced.placement.sites
    assert site.outlook
    tokens_per_hour = requests.rate_per_s * requests.mean_output_tokens() * 3600
    assert price.value == pytest.approx(site.outlook.usd_per_hour / tokens_per_hour * 1e6)
    assert (serves, bill) == ("online", "of the expected bill, at the spec's rate")


def test_without_evidence_the_deployed_machines_are_the_bill(traced: Plan) -> None:
    """As many as were solved for, in one place: one amount, and the planner's price of a million tokens."""
    (choice,), (site,) = traced.fleet.choices, traced.placement.sites
    plain = replace(site, outlook=None, replicas=choice.replicas, spot_overprovision=0, zones=site.zones[:1])
    plan = replace(traced, placement=replace(traced.placement, sites=(plain,)))
    assert cost_lines(plan) == [f"{plan.fleet.usd_per_hour:.2f} USD/h while everything runs"]
    assert deployed_usd_per_hour(plan) == pytest.approx(plan.fleet.usd_per_hour)
    ((_, price, bill),) = token_prices(plan)
    assert price.value == pytest.approx(plan.fleet.usd_per_million_tokens[0][1].value)
    assert bill == "of the machines deployed, at the spec's rate"
