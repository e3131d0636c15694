"""The verifiers bite: each promise of each level, broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import ONLINE, batch_spec

from moeplan.planner import verify
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.schedule import Schedule
from moeplan.planner.verify import VerificationError

Compile = Callable[[str], Plan]


@pytest.fixture
def plan(compile_text: Compile) -> Plan:
    return compile_text(ONLINE + "market: {quota: {H100: 64, L4: 64}}\n")


def test_workload_shares(plan: Plan) -> None:
    requests = plan.workload.classes[0]
    halved = replace(requests.buckets[0], share=requests.buckets[0].share / 2)
    broken = replace(requests, buckets=(halved, *requests.buckets[1:]))
    with pytest.raises(VerificationError, match="shares sum to 1"):
        verify.verify_workload(replace(plan.workload, classes=(broken,)))


def test_workload_operators(plan: Plan) -> None:
    with pytest.raises(VerificationError, match="operators hold all matrices"):
        verify.verify_workload(replace(plan.workload, operators=plan.workload.operators[1:]))


def test_roofline_links(plan: Plan) -> None:
    roofline = plan.replicas[0].roofline
    gpu, dram, *rest = roofline.roofs
    fast = replace(dram, up_bytes_per_s=gpu.bytes_per_s * 2)
    with pytest.raises(VerificationError, match="link is slower"):
        verify.verify_roofline(replace(roofline, roofs=(gpu, fast, *rest)))


def test_policy_memory(plan: Plan) -> None:
    policy = plan.replicas[0].policy
    swollen = tuple(replace(use, bytes=use.bytes * 3) for use in policy.memory)
    with pytest.raises(VerificationError, match="gpu holds the policy"):
        verify.verify_policy(replace(policy, memory=swollen))


def test_policy_batch(plan: Plan) -> None:
    policy = plan.replicas[0].policy
    with pytest.raises(VerificationError, match="micro-batches hold the sequences"):
        verify.verify_policy(replace(policy, sequences=policy.sequences + 1))


def test_fleet_routes(plan: Plan) -> None:
    with pytest.raises(VerificationError, match="is routed"):
        verify.verify_fleet(plan.spec, plan.workload, replace(plan.fleet, routes=plan.fleet.routes[1:]))


def test_fleet_load(plan: Plan) -> None:
    full = tuple(replace(choice, utilisation=1.01 * choice.target) for choice in plan.fleet.choices)
    with pytest.raises(VerificationError, match="is not overloaded"):
        verify.verify_fleet(plan.spec, plan.workload, replace(plan.fleet, choices=full))


def test_fleet_quota(plan: Plan) -> None:
    gpu = plan.fleet.choices[0].column.policy.machine.gpu
    strict = replace(plan.spec, market=replace(plan.spec.market, quota={gpu: 0}))
    with pytest.raises(VerificationError, match=f"keeps the {gpu} quota"):
        verify.verify_fleet(strict, plan.workload, plan.fleet)


def test_fleet_budget(plan: Plan) -> None:
    strict = replace(plan.spec, market=replace(plan.spec.market, budget_usd_per_hour=0.1))
    with pytest.raises(VerificationError, match="keeps the budget"):
        verify.verify_fleet(strict, plan.workload, plan.fleet)


def offloaded(compile_text: Compile) -> tuple[Schedule, Policy]:
    made = compile_text(batch_spec("n1-custom-48-196608+1xT4")).replicas[0]
    assert made.pipeline is not None
    return made.pipeline.schedule, made.policy


def test_schedule_races(compile_text: Compile) -> None:
    """A ring of one slot cannot hold two pages that are staged ahead."""
    schedule, policy = offloaded(compile_text)
    verify.verify_schedule(schedule, policy)
    one_slot = replace(schedule, constants=schedule.constants._replace(slots=1, lead=2))
    with pytest.raises(VerificationError, match="copy_page of layer 1 finds another's work"):
        verify.verify_schedule(one_slot, policy)


def test_schedule_pages(compile_text: Compile) -> None:
    """The pages in flight take exactly the memory that the policy has for them."""
    schedule, policy = offloaded(compile_text)
    smaller = replace(policy, pages=replace(policy.pages, slot_bytes=policy.pages.slot_bytes // 2))
    with pytest.raises(VerificationError, match="weight pages are"):
        verify.verify_schedule(schedule, smaller)


def test_placement_counts(plan: Plan) -> None:
    site = plan.placement.sites[0]
    short = replace(
        plan.placement, sites=(replace(site, replicas=site.replicas + 1), *plan.placement.sites[1:])
    )
    with pytest.raises(VerificationError, match="is placed"):
        verify.verify_placement(plan.spec, plan.fleet, short)
