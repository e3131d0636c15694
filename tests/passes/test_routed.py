"""Routed reading: the closed form against the simulated schedule, and when the policy chooses it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import batch_spec

from moeplan.codegen.emit import report
from moeplan.planner import schedules
from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.schedule import StreamConstants
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.simulate.decode import time_passes
from moeplan.planner.programs import Step
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.routed import RoutedLayer, expected_use, routed_seconds
from moeplan.planner.strategies.stream import stream_policy
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
        hits_s=some(places),
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
        "fetch": TaskCost(seconds_of_item=(0.0, *at.fetches_s)),
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


def policy_of(catalog: Catalog, requests: int, gib: float, model: str = "qwen3-30b-a3b") -> Policy:
    spec = parse_spec(batch_spec(model=model, requests=requests), "spec.yaml")
    workload = build_workload(spec, load_inputs(spec))
    roofline = find_roofline(workload, catalog.machines["cpu-2core"])
    policy = stream_policy(workload, workload.classes[0], roofline, int(gib * 2**30))
    assert isinstance(policy, Policy)
    return policy
