"""The stream strategy: overlap against brute force, and monotone in every figure of the machine."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from conftest import batch_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.policy import Policy
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.runtime_costs import kernels_of
from moeplan.planner.strategies.stream import overlapped, stream_policy

PAGES = st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(0.01, 5.0)), min_size=1, max_size=6)


def policy_of(machine: Machine, gib: float = 3) -> Policy:
    spec = parse_spec(batch_spec(model="olmoe-1b-7b"), "spec.yaml")
    workload = build_workload(spec, load_inputs(spec))
    roofline = find_roofline(workload, machine)
    policy = stream_policy(workload, workload.classes[0], roofline, int(gib * 2**30))
    assert isinstance(policy, Policy)
    return policy


@settings(max_examples=60)
@given(pages=PAGES, slots=st.integers(1, 5), layers=st.integers(1, 8), ends=st.floats(0.0, 3.0))
def test_a_pass_takes_at_least_its_busier_lane(
    pages: list[tuple[float, float]], slots: int, layers: int, ends: float
) -> None:
    """Never less than either lane alone, never more than one after the other."""
    compute, reads = zip(*pages, strict=True)
    cores, disk = layers * sum(compute) + ends, layers * sum(reads)
    seconds = overlapped(compute, reads, slots, layers, ends)
    slack = 1e-9 * (cores + disk)
    assert cores - slack <= seconds <= cores + disk + slack
    if slots == 1:  # nothing is read ahead while the only slot is computed from
        assert seconds >= disk + layers * sum(compute) - max(compute) - slack


@settings(max_examples=60)
@given(pages=PAGES, slots=st.integers(1, 4), layers=st.integers(1, 8))
def test_more_slots_and_faster_reads_never_wait_longer(
    pages: list[tuple[float, float]], slots: int, layers: int
) -> None:
    compute, reads = zip(*pages, strict=True)
    base = overlapped(compute, reads, slots, layers, 1.0)
    # Two passes hardly settle: what one gains may be charged to the other, a page at most.
    page = max(reads) + max(compute)
    assert overlapped(compute, reads, slots + 1, layers, 1.0) <= base + page * slots
    assert overlapped(compute, [r / 2 for r in reads], slots, layers, 1.0) <= base + page * slots


def test_resident_pages_cost_arithmetic_only() -> None:
    assert overlapped([1.0, 2.0], [0.0, 0.0], 4, 3, 0.5) == pytest.approx(9.5)


def test_a_slow_disk_bounds_a_pass() -> None:
    """Reads of 2 s a page, arithmetic of 0.1 s: the pass takes what its reads take."""
    assert overlapped([0.1] * 4, [2.0] * 4, 4, 8, 0.1) == pytest.approx(64.0, rel=0.01)


@pytest.mark.parametrize(("level", "field"), [("disk", "up_bytes_per_s"), ("dram", "bytes_per_s")])
def test_more_bandwidth_is_never_slower(catalog: Catalog, level: str, field: str) -> None:
    machine = catalog.machines["cpu-2core"]
    speeds = []
    for factor in (0.5, 1.0, 2.0, 4.0):
        levels = tuple(
            replace(v, **{field: getattr(v, field) * factor}) if v.name == level else v
            for v in machine.levels
        )
        speeds.append(policy_of(replace(machine, levels=levels)).generated_tokens_per_s.value)
    assert all(b >= a * 0.995 for a, b in itertools.pairwise(speeds))


def test_faster_operators_are_never_slower(catalog: Catalog) -> None:
    """Halve each figure in seconds and double each rate of the estimated kernels, one after the other."""
    machine = catalog.machines["cpu-2core"]
    spec = parse_spec(batch_spec(model="olmoe-1b-7b"), "spec.yaml")
    workload = build_workload(spec, load_inputs(spec))
    kernels = kernels_of(find_roofline(workload, machine))[-1]
    kernels = replace(kernels, decode_s=((1, kernels.attention_s), (64, 2 * kernels.attention_s)))
    base = policy_of(replace(machine, kernels=(kernels,))).generated_tokens_per_s.value
    for name in kernels.__dataclass_fields__:
        value = getattr(kernels, name)
        if name in ("threads", "dtype"):
            continue
        factor = 2.0 if name.endswith("_per_s") else 0.5
        faster = tuple((at, factor * v) for at, v in value) if isinstance(value, tuple) else factor * value
        changed = replace(machine, kernels=(replace(kernels, **{name: faster}),))
        assert policy_of(changed).generated_tokens_per_s.value >= base * 0.995, name


def test_experts_that_never_move_are_one_page(catalog: Catalog) -> None:
    machine = catalog.machines["cpu-2core"]
    held, streamed = policy_of(machine, 60), policy_of(machine, 3)
    assert (held.pages.pages_per_layer, held.pages.resident_pages, held.pages.slots) == (2, 2, 0)
    assert streamed.pages.pages_per_layer > 2
    assert streamed.pages.resident_pages < streamed.pages.pages_per_layer


def test_an_unsteady_disk_widens_what_it_is_read_for(catalog: Catalog) -> None:
    """Intervals of a plan that streams, by the part of its time that the disk works; of no other plan."""
    machine = catalog.machines["cpu-2core"]
    unsteady = replace(machine, disk_sigma=0.4)
    for gib, streams in ((3, True), (60, False)):
        steady, wide = (policy_of(m, gib).decode_tokens_per_s for m in (machine, unsteady))
        assert (wide.value, wide.sigma > steady.sigma) == (steady.value, streams)
        assert wide.sigma <= math.hypot(steady.sigma, 0.4) + 1e-9


def test_slower_overlap_is_never_faster(catalog: Catalog) -> None:
    machine = catalog.machines["cpu-2core"]
    base = policy_of(machine).generated_tokens_per_s.value
    for field in ("compute_kept", "disk_kept"):
        assert policy_of(replace(machine, **{field: 0.5})).generated_tokens_per_s.value <= base * 1.005
