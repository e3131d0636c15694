"""The simulator against one that moves every task forward step by step, against networkx, and by its laws."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stepwise import step_through

from moeplan.planner.simulate.schedule import Stretch, Timeline, makespan, order_of, simulate, stretch

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    rows: NDArray[np.int64]
    lanes: int
    seconds: Floats
    demands: Floats

    def alone(self) -> Timeline:
        return simulate(self.rows, self.lanes, self.seconds)

    def shared(self) -> Timeline:
        return simulate(self.rows, self.lanes, self.seconds, self.demands)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to 40 tasks on 2 to 6 lanes, waits on whatever is above; many take no time or want nothing."""
    lanes, resources = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    issued = [0] * lanes
    rows = []
    for _ in range(draw(st.integers(0, 40))):
        lane = draw(st.integers(0, lanes - 1))
        waits = [draw(st.just(0) | st.integers(max(0, count - 3), count)) for count in issued]
        rows.append([draw(st.integers(0, 3)), lane, 0, 0, -1, *waits])
        issued[lane] += 1
    share = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    seconds = draw(st.lists(st.sampled_from([0.0, 1.0]) | st.floats(1e-3, 10), min_size=40, max_size=40))
    demands = draw(st.lists(share, min_size=len(rows) * resources, max_size=len(rows) * resources))
    return Case(
        rows=np.array(rows, np.int64).reshape(len(rows), 5 + lanes),
        lanes=lanes,
        seconds=np.array(seconds[: len(rows)]),
        demands=np.array(demands).reshape(len(rows), resources),
    )


some = settings(max_examples=30)


def work_s(case: Case) -> Floats:
    """By lane: what its tasks take alone."""
    return np.bincount(case.rows[:, 1], case.seconds, case.lanes)


@settings(max_examples=100)
@given(cases())
def test_times_are_those_of_the_stepwise_simulator(case: Case) -> None:
    nothing = np.empty((len(case.rows), 0))
    for timeline, demands in ((case.shared(), case.demands), (case.alone(), nothing)):
        start, end = step_through(case.rows.tolist(), case.lanes, case.seconds.tolist(), demands.tolist())
        assert timeline.start_s == pytest.approx(start, rel=1e-9, abs=1e-9)
        assert timeline.end_s == pytest.approx(end, rel=1e-9, abs=1e-9)


def test_a_long_schedule_stays_within_rounding_of_exact_fractions() -> None:
    """Times that are multiples of 1/8 and demands of 1/4, 1/2 or 1: only divisions by sums of them round."""
    rng = np.random.default_rng(1)
    case = random_case(rng, tasks=60, lanes=4)
    exact = [Fraction(s) for s in case.seconds], [[Fraction(d) for d in row] for row in case.demands]
    start, end = step_through(case.rows.tolist(), case.lanes, *exact)
    timeline = case.shared()
    assert timeline.start_s == pytest.approx([float(s) for s in start], rel=1e-12)
    assert timeline.end_s == pytest.approx([float(e) for e in end], rel=1e-12)


def random_case(rng: np.random.Generator, tasks: int, lanes: int) -> Case:
    rows = np.zeros((tasks, 5 + lanes), np.int64)
    rows[:, 1] = rng.integers(0, lanes, tasks)
    for n in range(tasks):
        issued = np.bincount(rows[:n, 1], minlength=lanes)
        rows[n, 5:] = np.maximum(0, issued - rng.integers(0, 8, lanes)) * rng.integers(0, 2, lanes)
    seconds = rng.integers(0, 40, tasks) / 8
    return Case(rows, lanes, seconds, rng.choice([0.0, 0.25, 0.5, 1.0], (tasks, 2)))


@some
@given(cases())
def test_alone_the_makespan_is_the_longest_path(case: Case) -> None:
    """networkx, over every wait of the matrix."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(-1, len(case.rows)))
    lane_tasks: list[list[int]] = [[] for _ in range(case.lanes)]
    for n, row in enumerate(case.rows.tolist()):
        before = [lane_tasks[other][count - 1] for other, count in enumerate(row[5:]) if count]
        before += [lane_tasks[row[1]][-1]] if lane_tasks[row[1]] else []
        graph.add_weighted_edges_from((b, n, case.seconds[b] if b >= 0 else 0.0) for b in [-1, *before])
        lane_tasks[row[1]].append(n)
    graph.add_weighted_edges_from((n, "end", s) for n, s in enumerate(case.seconds))
    longest = nx.dag_longest_path_length(graph)
    assert case.alone().makespan_s == pytest.approx(longest, rel=1e-12)
    assert makespan(order_of(case.rows, case.lanes), case.seconds) == case.alone().makespan_s


@some
@given(cases())
def test_lower_bounds(case: Case) -> None:
    """Neither a lane's own work, nor any order of waits, nor what a resource must deliver takes less."""
    least = case.shared().makespan_s * (1 + 1e-9)
    assert least >= max(work_s(case))
    assert (case.shared().end_s * (1 + 1e-9) >= case.alone().end_s).all()
    assert (least >= case.seconds @ case.demands).all()


@some
@given(cases(), st.floats(0, 5), st.randoms(use_true_random=False))
def test_alone_a_longer_task_never_helps(case: Case, more: float, random: object) -> None:
    longer = case.seconds.copy()
    if len(longer):
        longer[random.randrange(len(longer))] += more  # type: ignore[attr-defined]
    assert (simulate(case.rows, case.lanes, longer).end_s >= case.alone().end_s).all()


@some
@given(cases())
def test_without_contention_sharing_changes_no_bit(case: Case) -> None:
    """Demands that never sum beyond one; tasks that want everything come last, one by one."""
    timeline = with_lonely_tail(case).shared()
    assert timeline.start_s.tolist() == with_lonely_tail(case).alone().start_s.tolist()
    assert timeline.end_s.tolist() == with_lonely_tail(case).alone().end_s.tolist()
    assert set(stretch(timeline).contention_s) == {0.0}


def with_lonely_tail(case: Case) -> Case:
    """`case`, its demands so small that all fit; then on each lane one more task that follows all others."""
    counts = np.bincount(case.rows[:, 1], minlength=case.lanes)
    tail = [[0, lane, 0, 0, -1, *(counts + (np.arange(case.lanes) < lane))] for lane in range(case.lanes)]
    return Case(
        rows=np.concatenate((case.rows, np.array(tail, np.int64))),
        lanes=case.lanes,
        seconds=np.concatenate((case.seconds, np.full(case.lanes, 0.3))),
        demands=np.concatenate(
            (case.demands / (case.lanes + 1), np.ones((case.lanes, case.demands.shape[1])))
        ),
    )


@some
@given(cases())
def test_busy_time_is_work_and_delay(case: Case) -> None:
    for timeline in (case.alone(), case.shared()):
        whole = stretch(timeline)
        assert np.subtract(whole.busy_s, whole.contention_s) == pytest.approx(work_s(case), abs=1e-9)
        assert whole.seconds == timeline.makespan_s
        assert whole.bubble_s == pytest.approx(whole.seconds - whole.busy_s[whole.busiest])
        assert whole.bubble_s >= -1e-9


@some
@given(cases(), st.integers(0, 40))
def test_the_critical_path_has_no_gaps(case: Case, cut: int) -> None:
    """So its shares sum to the length of the stretch; without its delay it is no longer than waits demand."""
    timeline = case.shared()
    for part in (stretch(timeline), stretch(timeline, cut), stretch(timeline, 0, cut)):
        assert sum(share.seconds for share in part.path) == pytest.approx(part.seconds, abs=1e-9)
    path = stretch(timeline).path
    undelayed = sum(share.seconds - share.contention_s for share in path)
    assert undelayed <= case.alone().makespan_s * (1 + 1e-9) + 1e-9
    if timeline.makespan_s > case.alone().makespan_s * (1 + 1e-9):
        assert sum(share.contention_s for share in path) > 0


@some
@given(cases(), st.integers(0, 40))
def test_stretches_add_up(case: Case, cut: int) -> None:
    timeline = case.shared()
    whole, one, two = stretch(timeline), stretch(timeline, 0, cut), stretch(timeline, cut)
    assert one.end_s == two.begin_s
    assert one.seconds + two.seconds == pytest.approx(whole.seconds)
    assert np.add(one.busy_s, two.busy_s) == pytest.approx(np.array(whole.busy_s), abs=1e-9)
    assert np.add(one.contention_s, two.contention_s) == pytest.approx(np.array(whole.contention_s), abs=1e-9)


def lone_tasks(seconds: list[float], demands: list[list[float]]) -> Timeline:
    """One task on each lane, none waiting."""
    lanes = len(seconds)
    rows = np.zeros((lanes, 5 + lanes), np.int64)
    rows[:, 1] = np.arange(lanes)
    return simulate(rows, lanes, np.array(seconds), np.array(demands))


def test_two_that_want_too_much_are_slow_together() -> None:
    assert lone_tasks([1.0, 1.0], [[1.0], [1.0]]).end_s.tolist() == [2.0, 2.0]
    assert lone_tasks([1.0, 1.0], [[0.55], [0.5]]).end_s == pytest.approx([1.05, 1.05], rel=1e-15)


def test_what_ends_leaves_its_share_to_the_other() -> None:
    """Together they want 1.4, so the first ends at 1.4 s; the second has 1 s left then."""
    assert lone_tasks([1.0, 2.0], [[0.8], [0.6]]).end_s == pytest.approx([1.4, 2.4], rel=1e-15)


def test_only_users_of_a_scarce_resource_are_slow() -> None:
    """The third uses another one; the fourth uses both, and the first lets it go on only half as fast."""
    ends = lone_tasks([1.0, 1.0, 1.0, 1.0], [[1.0, 0.0], [0.5, 0.0], [0.0, 0.25], [0.5, 0.25]]).end_s
    assert ends == pytest.approx([2.0, 2.0, 1.0, 2.0], rel=1e-15)


def pipeline(passes: int) -> tuple[NDArray[np.int64], Floats]:
    """Passes of 8 items, each loaded (lane 1) into one of two slots and then computed (lane 0)."""
    rows = []
    for n in range(passes * 8):
        rows.append([1, 1, 0, n % 8, n % 2, max(0, n - 1), 0])
        rows.append([0, 0, 0, n % 8, n % 2, 0, n + 1])
    return np.array(rows, np.int64), np.tile([0.5, 0.25], passes * 8)


def test_one_pass_of_several_is_what_its_slowest_lane_takes() -> None:
    """In the steady state: 8 loads of 0.5 s that hide the rest. The first pass fills the pipeline as well."""
    rows, seconds = pipeline(5)
    timeline = simulate(rows, 2, seconds)
    first, third = stretch(timeline, 0, 16), stretch(timeline, 32, 48)
    assert (first.seconds, third.seconds) == (4.25, 4.0)
    assert (third.busiest, third.bubble_s, third.busy_s) == (1, 0.0, (2.0, 4.0))
    assert seconds_by_operation(third) == {(1, 1): 3.75, (0, 0): 0.25}


def seconds_by_operation(part: Stretch) -> dict[tuple[int, int], float]:
    return {(share.lane, share.op): share.seconds for share in part.path}


def test_contention_on_the_critical_path_is_told() -> None:
    """Loads and computations that together want 1.5 of the memory are slow while they overlap."""
    rows, seconds = pipeline(1)
    timeline = simulate(rows, 2, seconds, np.tile([[0.75], [0.75]], (8, 1)))
    whole = stretch(timeline)
    # Each of 7 computations of 0.25 s overlaps with a load: 0.125 s more for both.
    assert whole.seconds == pytest.approx(4.25 + 7 * 0.125)
    assert whole.contention_s == pytest.approx((7 * 0.125, 7 * 0.125))
    assert sum(share.contention_s for share in whole.path) == pytest.approx(7 * 0.125)


def test_no_tasks_take_no_time() -> None:
    timeline = simulate(np.empty((0, 7), np.int64), 2, np.empty(0), np.empty((0, 1)))
    assert timeline.makespan_s == 0.0
    assert stretch(timeline) == Stretch(
        begin_s=0.0, end_s=0.0, busy_s=(0.0, 0.0), contention_s=(0.0, 0.0), path=()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["rows"].__setitem__((0, 5), 1),
            "row 0 waits for a task that no row above it has issued",
        ),
        (lambda c: c["rows"].__setitem__((3, 6), 3), "row 3 waits"),
        (lambda c: c["rows"].__setitem__((3, 6), -1), "row 3 waits"),
        (lambda c: c["rows"].__setitem__((2, 1), 2), "lanes are numbered 0 to 1"),
        (lambda c: c.update(lanes=3), "rows of 8, not shape"),
        (lambda c: c["seconds"].__setitem__(1, -1.0), "16 finite figures, none below 0"),
        (lambda c: c["seconds"].__setitem__(1, np.nan), "16 finite figures"),
        (lambda c: c.update(seconds=np.ones(3)), "16 finite figures"),
        (lambda c: c["demands"].__setitem__((1, 0), 1.5), "16 rows of shares from 0 to 1"),
        (lambda c: c["demands"].__setitem__((1, 0), np.nan), "16 rows of shares"),
        (lambda c: c.update(demands=np.ones(16)), "16 rows of shares"),
    ],
)
def test_what_is_no_schedule_is_refused(change: object, message: str) -> None:
    rows, seconds = pipeline(1)
    case = {"rows": rows, "lanes": 2, "seconds": seconds, "demands": np.zeros((16, 1))}
    change(case)  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        simulate(**case)  # type: ignore[arg-type]
