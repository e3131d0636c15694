"""Routed reading: the closed form against the simulated schedule, and when the policy chooses it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import batch_spec

from moeplan.codegen.emit import report
from moeplan.planner import schedules
from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.schedule import StreamConstants
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.programs import Step
from moeplan.planner.simulate.decode import time_passes
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.routed import RIGHT_SHARE, RoutedLayer, expected_use, routed_seconds
from moeplan.planner.strategies.stream import _point_of, stream_policy
from moeplan.planner.strategies.task_costs import TaskCost, TaskCosts

Compile = Callable[[str], Plan]
PASSES = 6


def drawn(source: random.Random) -> tuple[RoutedLayer, StreamConstants]:
    """A layer's tasks of any length, and a schedule for them."""
    places, resident, layers = source.randint(1, 6), source.randint(0, 3), source.randint(1, 6)
    guesses = source.randint(0, places)
    slots = source.randint(max(1, guesses + (resident == 0)), places + 4)
    pages = max(1, resident) + places + source.randint(0, 5)

    def some(count: int) -> tuple[float, ...]:
        return tuple(source.uniform(0.01, 5.0) for _ in range(count))

    at = RoutedLayer(
        attention_s=some(1)[0],
        attention_read_s=some(1)[0] if resident == 0 else 0.0,
        expect_s=some(1)[0] if guesses else 0.0,
        resident_s=some(max(0, resident - 1)),
        hits_s=some(guesses + places),
        fetches_s=some(places),
        guesses=guesses,
        guess_s=some(1)[0],
    )
    sizes = StreamConstants(
        layers, pages, resident, slots, places=places, guesses=guesses, lead=0, across=0, barrier=0, lean=0
    )
    return at, sizes


def costs_of(at: RoutedLayer, pages: int, ends_s: float) -> TaskCosts:
    return {
        "embed": TaskCost(),
        "read": TaskCost(seconds_of_item=(at.attention_read_s, *[0.0] * pages)),
        "attention": TaskCost(seconds=at.attention_s),
        "route": TaskCost(),
        "experts": TaskCost(seconds_of_item=(0.0, *at.resident_s)),
        "head": TaskCost(seconds=ends_s),
        "expect": TaskCost(seconds=at.expect_s),
        "guess": TaskCost(seconds=at.guess_s),
        "place": TaskCost(),
        "fetch": TaskCost(seconds_of_item=(0.0, *[0.0] * at.guesses, *at.fetches_s)),
        "hit": TaskCost(seconds_of_item=(0.0, *at.hits_s)),
    }


def test_the_closed_form_is_the_simulated_schedule() -> None:
    """The second of two passes, for sizes drawn at random."""
    source = random.Random(5)
    for _ in range(80):
        at, sizes = drawn(source)
        schedule = schedules.named(sizes, "paged")
        two = (Step(1, 0, 1),) * 2
        simulated = time_passes(schedule, two, costs_of(at, sizes.pages, 0.7))
        if sizes.slots > 1:  # with one slot nothing is read across passes
            assert routed_seconds(at, sizes.slots, sizes.layers, 0.7) == pytest.approx(simulated.seconds)


def test_expected_use_sums_to_the_pages_hit() -> None:
    assert expected_use(2.5, 5) == (1.0, 1.0, 0.5, 0.0, 0.0)


def problem_of(catalog: Catalog, requests: int) -> tuple[Workload, Roofline]:
    text = batch_spec(model="qwen3-30b-a3b").replace("requests: 2000", f"requests: {requests}")
    spec = parse_spec(text, "spec.yaml")
    workload = build_workload(spec, load_inputs(spec))
    return workload, find_roofline(workload, catalog.machines["cpu-2core"])


def policy_of(catalog: Catalog, requests: int, gib: float) -> Policy:
    workload, roofline = problem_of(catalog, requests)
    policy = stream_policy(workload, workload.classes[0], roofline, int(gib * 2**30))
    assert isinstance(policy, Policy)
    return policy


@pytest.mark.parametrize("requests", [1, 4, 8])
def test_small_batches_read_what_routing_hits(requests: int, catalog: Catalog) -> None:
    """128 experts, 8 a token: the bytes of a pass are those of the pages expected, and it is faster."""
    policy = policy_of(catalog, requests, 12)
    pages = policy.pages
    moving = pages.pages_per_layer - pages.resident_pages
    assert policy.sequences == requests
    assert 0 < pages.places <= moving
    assert pages.hit_pages == pytest.approx(moving * (1 - (1 - 8 / 128) ** requests))
    disk_s = next(lane.seconds for lane in policy.decode.lanes if lane.lane == "disk")
    expert_bytes, bytes_per_s = 3 * 2048 * 768 * 2, 2.0e9
    wrong = pages.guesses * (1 - RIGHT_SHARE)
    least_s = 48 * (pages.hit_pages + wrong) * expert_bytes / bytes_per_s
    assert least_s * 0.999 <= disk_s <= 1.5 * least_s  # the cores slow the disk down meanwhile


def test_large_batches_read_whole_layers(catalog: Catalog) -> None:
    pages = policy_of(catalog, 256, 12).pages
    assert (pages.places, pages.guesses, pages.hit_pages) == (0, 0, 0.0)


def test_weights_in_memory_are_not_routed(catalog: Catalog) -> None:
    assert policy_of(catalog, 1, 100).pages.places == 0


def test_without_a_right_guess_the_rate_is_in_the_interval(catalog: Catalog) -> None:
    """Guesses that are never hit make a pass slower; the plan's interval reaches down to that."""
    workload, roofline = problem_of(catalog, 1)
    policy = policy_of(catalog, 1, 12)
    point = _point_of(workload, workload.classes[0], roofline, policy, 1)
    blind = replace(point, right_share=0.0).decode_tokens_per_s
    assert policy.pages.guesses > 0
    assert policy.decode_tokens_per_s.low < blind < policy.decode_tokens_per_s.value
    whole = policy_of(catalog, 256, 12)
    assert policy.decode_tokens_per_s.sigma > whole.decode_tokens_per_s.sigma


def test_the_plan_says_so(compile_text: Compile) -> None:
    """Report, runtime.json and schedule.py; the schedule is proved when the plan is compiled."""
    text = batch_spec("cpu-2core", model="qwen3-30b-a3b").replace("requests: 2000", "requests: 2")
    plan = compile_text(text)
    pages, pipeline = plan.replicas[0].policy.pages, plan.replicas[0].pipeline
    assert pipeline is not None
    constants = pipeline.schedule.constants
    assert isinstance(constants, StreamConstants)
    assert (constants.places, constants.guesses) == (pages.places, pages.guesses) != (0, 0)
    assert pipeline.pass_s == pytest.approx(plan.replicas[0].policy.decode.seconds, rel=0.02)
    said = " ".join("".join(report.emit(plan).values()).split())
    moving = pages.pages_per_layer - pages.resident_pages
    expected = f"decode reads only the experts that routing hits: {pages.hit_pages:.1f} of {moving} a layer"
    assert expected in said
