"""Micro-batches chosen by simulation: a shorter run, and a policy as whole as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import batch_spec

from moeplan.planner import verify
from moeplan.planner.ir.plan import Plan
from moeplan.planner.passes.regroup import regroup
from moeplan.planner.passes.schedule import build_schedule
from moeplan.planner.strategies.offload import regrouped

Compile = Callable[[str], Plan]


@pytest.fixture
def plan(compile_text: Compile) -> Plan:
    return compile_text(batch_spec("g4dn.16xlarge"))


def test_two_micro_batches_become_three(plan: Plan) -> None:
    """Two leave the pipeline a bubble that HRM does not see: a third is worth it."""
    replica, requests = plan.replicas[0], plan.workload.request_class("batch")
    assert replica.policy.micro_batches == 3
    two = regrouped(plan.workload, requests, replica.roofline, replica.policy, 2)
    assert two is not None
    passes = [build_schedule(plan.workload, replica.roofline, p).pass_s for p in (two, replica.policy)]
    assert passes[1] / replica.policy.sequences < 0.95 * passes[0] / two.sequences
    assert regroup(plan.workload, replica.roofline, two).micro_batches == 3


def test_fleet_and_replica_have_the_same_policy(plan: Plan) -> None:
    assert plan.fleet.choices[0].column.policy == plan.replicas[0].policy


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_a_regrouped_policy_keeps_its_promises(plan: Plan, count: int) -> None:
    replica, requests = plan.replicas[0], plan.workload.request_class("batch")
    other = regrouped(plan.workload, requests, replica.roofline, replica.policy, count)
    assert other is not None
    verify.verify_policy(other)
    assert other.micro_batches == count
    assert other.sequences >= replica.policy.sequences
    verify.verify_schedule(build_schedule(plan.workload, replica.roofline, other).schedule, other)


def test_more_sequences_than_requests_are_refused(plan: Plan) -> None:
    replica = plan.replicas[0]
    few = replace(plan.workload.request_class("batch"), requests=replica.policy.sequences)
    assert regrouped(plan.workload, few, replica.roofline, replica.policy, 4) is None


def test_measurements_are_kept(compile_text: Compile, tmp_path: Path) -> None:
    """What the user measured is applied to the regrouped policy, not lost with the old one."""
    text = batch_spec("g4dn.16xlarge")
    policy = compile_text(text).replicas[0].policy
    head = "machine,model,engine,gpus,prompt_tokens,output_tokens,batch,decode_tokens_per_s"
    row = f"g4dn.16xlarge,mixtral-8x7b,runtime_min,1,77,128,{policy.sequences},40"
    (tmp_path / "own.csv").write_text(f"{head}\n{row}\n")
    measured = compile_text(text + "profile: own.csv\n").replicas[0].policy
    assert measured.decode_tokens_per_s.provenance == "measured"
    assert measured.decode_tokens_per_s.value == pytest.approx(40)
    assert measured.corrections
