"""The offload search against brute force and a MILP that know nothing of bounds and bisection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pulp
import pytest
from conftest import batch_spec
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.workload import ExpertPopularity
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.offload_lanes import Costs, Lanes, Layout, Point, Shapes, take, total
from moeplan.planner.strategies.offload_search import (
    MICRO_BATCH_SIZES,
    MICRO_BATCHES,
    Sharing,
    batch_seconds,
    best_cpu_experts,
    bound,
    every_shape,
    every_split,
    fastest,
    lowest_point,
    most_on_gpu,
    sharings,
)
from moeplan.runtime_min.shares import whole_heads

CASES = [
    (model, machine, requests, prompt)
    for model, machine in (
        ("mixtral-8x7b", "gr6.8xlarge"),
        ("mixtral-8x7b", "g4dn.16xlarge"),
        ("qwen3-30b-a3b", "g6.8xlarge"),
        ("deepseek-v3", "p4d.24xlarge"),
        ("dbrx", "n1-custom-64-425984+4xT4"),
        ("qwen3-30b-a3b", "g2-standard-24"),
    )
    for requests, prompt in ((3, 40), (8, 3000))
]


def costs_of(catalog: Catalog, model: str, machine: str, requests: int, prompt: int) -> Costs:
    text = batch_spec(model=model).replace(
        "requests: 2000, prompt: 77", f"requests: {requests}, prompt: {prompt}"
    )
    spec = parse_spec(text, "spec.yaml")
    workload = build_workload(spec, load_inputs(spec))
    roofline = find_roofline(workload, catalog.machines[machine])
    return Costs(workload, workload.classes[0], roofline, roofline.roof("dram").bytes * 0.8)


def every_point(problem: Costs, layout: Layout) -> list[Point]:
    """Each layout with every number of experts on the CPU; of whole ones the same number for each GPU."""
    return [
        problem.point(layout, np.full_like(layout.on_gpu, number))
        for number in range(problem.workload.model.experts + 1)
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_search_finds_what_brute_force_finds(catalog: Catalog, case: tuple[str, str, int, int]) -> None:
    """Every shape, split and number of CPU experts; the plateau rule may give half a percent away."""
    problem = costs_of(catalog, *case)
    units = every_shape(problem, sharings(problem), most_sequences=case[2])
    points = every_point(problem, every_split(problem, units, most_on_gpu(problem, units)))
    best = min(batch_seconds(problem, point).min() for point in points)
    found = fastest(problem, units)
    assert found is not None
    assert best <= batch_seconds(problem, found)[0] * (1 + 1e-9)
    assert batch_seconds(problem, found)[0] <= best * 1.0051


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bound_is_never_above_the_time(catalog: Catalog, case: tuple[str, str, int, int]) -> None:
    problem = costs_of(catalog, *case)
    units = every_shape(problem, sharings(problem), most_sequences=case[2])
    layout = every_split(problem, units, most_on_gpu(problem, units))
    least, _ = bound(problem, layout)
    for point in every_point(problem, layout):
        assert (least <= batch_seconds(problem, point) * (1 + 1e-9)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("near", [True, False])
def test_shares_on_the_cpu_are_the_best_of_all(
    catalog: Catalog, case: tuple[str, str, int, int], near: bool
) -> None:
    """Every number of experts on the CPU, wherever the search begins."""
    assert_best_of_all(costs_of(catalog, *case), case[2], near)


@pytest.mark.parametrize("skew", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("machine", ["n1-standard-16+1xT4", "g6.8xlarge"])
def test_shares_on_the_cpu_are_the_best_where_some_are_popular(
    catalog: Catalog, machine: str, skew: float
) -> None:
    """Experts whose popularity is a power of their rank: lanes are no lines."""
    problem = costs_of(catalog, "qwen3-30b-a3b", machine, 8, 77)
    model = problem.workload.model
    weights = (1.0 + np.arange(model.experts)) ** -skew
    shares = np.minimum(1.0, model.experts_per_token * weights / weights.sum())
    popular = (ExpertPopularity(layer=0, token_share=tuple(shares)),)
    problem = replace(problem, workload=replace(problem.workload, popularity=popular))
    assert_best_of_all(problem, 8, near=True)


def assert_best_of_all(problem: Costs, requests: int, near: bool) -> None:
    units = every_shape(problem, sharings(problem), most_sequences=requests)
    layout = every_split(problem, units, most_on_gpu(problem, units))

    def lanes(point: Point) -> Lanes:
        return {lane: s if near else s[::-1] for lane, s in problem.decode_lanes(point).items()}

    def seconds(point: Point) -> np.ndarray:
        return batch_seconds(problem, point)

    times = np.array([seconds(point) for point in every_point(problem, layout)])
    none_s = seconds(problem.point(layout, np.zeros_like(layout.on_gpu)))
    counts, found = best_cpu_experts(problem, layout, lanes, seconds, none_s)
    assert np.isfinite(times).any()
    assert found == pytest.approx(times.min(axis=0), rel=1e-12)
    assert (found == seconds(problem.point(layout, counts))).all()


@given(
    lines=st.lists(st.tuples(st.integers(-50, 50), st.integers(-500, 500)), min_size=1, max_size=4),
    bend=st.integers(0, 3),
    span=st.tuples(st.integers(0, 40), st.integers(0, 300)),
    expected=st.integers(-20, 400),
    fits=st.integers(0, 300),
)
def test_lowest_point_is_the_first_of_the_least(
    lines: list[tuple[int, int]], bend: int, span: tuple[int, int], expected: int, fits: int
) -> None:
    """Against every whole number: convex functions that may be flat, and infinite from some number on."""
    low, high = span[0], span[0] + span[1]

    def values(which: np.ndarray, tried: np.ndarray) -> np.ndarray:
        assert tried.shape[1] == len(which)
        convex = np.max([slope * tried + height for slope, height in lines], axis=0)
        return np.where(tried <= low + fits, convex + bend * (tried - 20) ** 2, np.inf)

    every = values(np.arange(1), np.arange(low, high + 1.0)[:, None])[:, 0]
    one = np.ones(1)
    at, least = lowest_point(values, low * one, high * one, expected * one)
    assert (at[0], least[0]) == (low + every.argmin(), every.min())


@pytest.mark.parametrize("machine", ["gr6.8xlarge", "g4dn.16xlarge"])
@pytest.mark.parametrize(("micro_batch", "count", "prompt"), [(8, 4, 300), (32, 5, 77), (128, 8, 77)])
def test_decode_equals_a_milp(
    catalog: Catalog, machine: str, micro_batch: int, count: int, prompt: int
) -> None:
    """Given μ and n_ub: integer resident, CPU and streamed experts and micro-batches per way of attention;
    the busiest decode lane of gpu, h2d and cpu is minimal under GPU memory."""
    problem = costs_of(catalog, "mixtral-8x7b", machine, micro_batch * count, prompt)
    one = np.ones(1)
    units = problem.units(Shapes(one, one < 1, micro_batch * one, count * one))
    layout = every_split(problem, units, most_on_gpu(problem, units))

    def decode_s(point: Point) -> np.ndarray:
        seconds = problem.decode_lanes(point)
        busy = np.maximum.reduce([seconds[lane] for lane in ("gpu", "h2d", "cpu")])
        return np.where(
            point.feasible & point.streams & (point.disk_experts == 0) & ~point.staged, busy, np.inf
        )

    none_s = decode_s(problem.point(layout, np.zeros_like(layout.on_gpu)))
    _, ours = best_cpu_experts(problem, layout, problem.decode_lanes, decode_s, none_s)
    assert ours.min() == pytest.approx(_milp(problem, units), rel=1e-4)


def _milp(problem: Costs, units: object) -> float:
    """The same minimum from unit costs, taken by differences at single points, as a linear program."""
    experts, count = problem.workload.model.experts, int(units.micro_batches[0])  # type: ignore[attr-defined]

    def layout(on_gpu: float, cache_up: float) -> Layout:
        yes = np.ones(1, dtype=bool)
        return problem.layout(units, np.array([on_gpu]), np.array([cache_up]), yes)  # type: ignore[arg-type]

    def seconds(on_gpu: float, cache_up: float, resident: float, cpu: float) -> dict[str, float]:
        base = problem.point(layout(on_gpu, cache_up), np.zeros(1))
        point = replace(
            base, resident=np.array([resident]), cpu_experts=np.array([cpu]), staged=np.zeros(1, bool)
        )
        return {
            lane: float(s[0])
            for lane, s in problem.decode_lanes(replace(point, disk_experts=np.zeros(1))).items()
        }

    zero = seconds(0, 0, 0, 0)
    first_cpu = {lane: seconds(0, 0, 0, 1)[lane] - zero[lane] for lane in zero}
    next_cpu = {lane: seconds(0, 0, 0, 2)[lane] - seconds(0, 0, 0, 1)[lane] for lane in zero}
    gains = [
        {lane: seconds(*unit)[lane] - zero[lane] for lane in zero}
        for unit in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))
    ]
    model = pulp.LpProblem("decode", pulp.LpMinimize)
    on_gpu, cache_up = (model.add_variable(n, 0, count, pulp.LpInteger) for n in ("g", "s"))
    resident, cpu = (model.add_variable(n, 0, experts, pulp.LpInteger) for n in ("r", "x"))
    any_cpu, any_up = (model.add_variable(n, 0, 1, pulp.LpInteger) for n in ("some", "up"))
    busiest = model.add_variable("t", 0)
    model += busiest
    for lane in ("gpu", "h2d", "cpu"):
        parts = zip(gains, (on_gpu, cache_up, resident), strict=True)
        load = zero[lane] + pulp.lpSum(gain[lane] * variable for gain, variable in parts)
        load += next_cpu[lane] * cpu + (first_cpu[lane] - next_cpu[lane]) * any_cpu
        model += busiest >= load
    model += cpu <= experts * any_cpu
    model += cache_up <= count * any_up
    model += on_gpu + cache_up <= count
    model += resident + cpu <= experts
    table = {key: total(problem.gpu_items(layout(*key)))[0] for key in ((0, 0), (1, 0), (0, 1))}
    page = 2 * problem.expert_bytes / problem.workload.model.moe_layers
    used = table[0, 0] + (table[1, 0] - table[0, 0]) * on_gpu + (table[0, 1] - table[0, 0]) * any_up
    used += problem.expert_bytes * resident + page * (experts - resident)
    model += used * 1e-9 <= float(problem.gpu_limit_bytes(np.ones(1))[0]) * 1e-9
    model.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, options=["ratioGap 0"]))
    assert model.sol_status == pulp.LpSolutionOptimal
    return float(busiest.value())


@pytest.mark.parametrize("requests", [1, 7, 500])
def test_shapes_never_exceed_the_requests(catalog: Catalog, requests: int) -> None:
    problem = costs_of(catalog, "dbrx", "n1-custom-64-425984+4xT4", requests, 40)
    ways = [Sharing(1, False), Sharing(2, False), Sharing(4, True)]
    found = every_shape(problem, ways, most_sequences=requests)
    assert (found.micro_batch * found.micro_batches <= requests).all()
    assert set(zip(found.gpus, found.whole, strict=True)) == {(w.gpus, w.whole) for w in ways}
    wanted = {(m, n) for m in MICRO_BATCH_SIZES for n in MICRO_BATCHES if m * n <= requests}
    assert set(zip(found.micro_batch, found.micro_batches, strict=True)) == wanted
    assert len(found.gpus) == len(wanted) * len(ways)


@pytest.mark.parametrize(
    ("model", "machine", "expected"),
    [
        ("dbrx", "n1-custom-64-425984+4xT4", [1, 2, 4]),  # 48 heads, 8 of keys
        ("qwen3-30b-a3b", "p4d.24xlarge", [1, 2, 4, 8]),  # 4 heads of keys: held twice by 8 GPUs
        ("phi-3.5-moe", "g2-standard-96", [1, 2, 4, 8]),
        ("deepseek-v3", "p4d.24xlarge", [1]),  # a latent has no heads
    ],
)
def test_gpus_share_what_the_runtime_can_share(
    catalog: Catalog, model: str, machine: str, expected: list[int]
) -> None:
    problem = costs_of(catalog, model, machine, 8, 40)
    assert [way.gpus for way in sharings(problem) if not way.whole] == expected
    assert [way.gpus for way in sharings(problem) if way.whole] == expected[1:]
    attention = problem.workload.model.attention
    assert all(whole_heads(attention.heads, attention.kv_heads, degree) for degree in expected)


@pytest.mark.parametrize("share", ["width", "whole"])
def test_what_each_form_of_sharing_places(catalog: Catalog, share: str) -> None:
    """Whole experts lie at each place in as many copies as there are GPUs, and never more than fit."""
    problem = costs_of(catalog, "dbrx", "n1-custom-64-425984+4xT4", 8, 3000)
    ways = [way for way in sharings(problem) if way.gpus == 4 and way.whole == (share == "whole")]
    units = every_shape(problem, ways, most_sequences=8)
    layout = every_split(problem, units, most_on_gpu(problem, units))
    together, counts = 4 if share == "whole" else 1, set()
    for point in every_point(problem, layout):
        fits = take(point, point.feasible)
        for count in (fits.resident, fits.cpu_experts, fits.disk_experts):
            assert not (count % together).any()
        counts |= set(fits.cpu_experts) | set(fits.resident)
        held = total(problem.gpu_items(fits)) + total(problem.gpu_expert_items(fits))
        assert (held <= problem.gpu_limit_bytes(fits.units.gpus)).all()
    assert len(counts) == 16 / together + 1


def test_whole_experts_take_less_where_they_are_many_and_small(catalog: Catalog) -> None:
    """Launches fall by the number of GPUs, the busiest GPU takes longer; the rest is the same."""
    for model, machine, faster in (
        ("qwen3-30b-a3b", "g2-standard-24", True),
        ("mixtral-8x22b", "n1-custom-64-425984+2xT4", False),
    ):
        problem = costs_of(catalog, model, machine, 2000, 77)
        one = np.ones(2)
        units = problem.units(Shapes(2 * one, np.array([False, True]), 512 * one, 2 * one))
        cut, whole = units.gpu_experts_s
        assert (whole < cut) == faster
        lanes = problem.decode_lanes(problem.point(problem.layout(units, 0 * one, 0 * one, one > 0), 0 * one))
        assert lanes["gpu"][1] - lanes["gpu"][0] == pytest.approx(whole - cut)
        for lane in ("h2d", "d2h", "dram", "disk"):
            assert lanes[lane][0] == pytest.approx(lanes[lane][1], rel=0.02)
