"""Schedule programs: what they issue, the order that follows, and its proof, which mutations must not
pass."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from schedules_at_hand import ROUTED, SIZES, STREAM, every_named, every_offload, every_stream

from moeplan.planner import programs, schedules
from moeplan.planner.ir.schedule import OffloadConstants, Schedule, StreamConstants
from moeplan.planner.programs import Issued, Step
from moeplan.planner.programs.order import HOW, WAIT
from moeplan.planner.programs.proof import first_offence, neighbours

FEW = [*every_offload(2, 25), *every_stream()[::7], *every_named()]


def issued(schedule: Schedule) -> Issued:
    return programs.issue(schedule, neighbours(schedule))


@pytest.mark.parametrize(("offload", "stream"), [(100, 5), pytest.param(400, 1, marks=pytest.mark.slow)])
def test_every_schedule_is_proved(offload: int, stream: int) -> None:
    """No race, no deadlock, every page in its place, over passes of all kinds; some of all, or more."""
    some = [*every_offload(1, offload), *every_stream()[::stream]]
    offences = {s: first_offence(s, issued(s)) for s in some}
    assert {s: o for s, o in offences.items() if o} == {}


def waits_of(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    yield from map(tuple, np.argwhere(rows[:, WAIT:] > 0).tolist())


def all_before(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """For each task those before it, a bit each. Edges lead from rows to later ones, so there is no cycle."""
    direct: list[list[int]] = [[] for _ in range(count)]
    for earlier, later in edges:
        assert earlier < later
        direct[later].append(earlier)
    before: list[int] = []
    for tasks in direct:
        before.append(functools.reduce(lambda bits, task: bits | before[task] | 1 << task, tasks, 0))
    return before


def happens_before(rows: np.ndarray) -> list[int]:
    """What the lanes' own order and the waits put before each task."""
    places = [np.flatnonzero(rows[:, 1] == lane).tolist() for lane in range(rows.shape[1] - WAIT)]
    lanes = (pair for place in places for pair in itertools.pairwise(place))
    waits = ((places[lane][rows[row, WAIT + lane] - 1], row) for row, lane in waits_of(rows))
    return all_before(len(rows), (*lanes, *waits))


@pytest.mark.parametrize("schedule", FEW, ids=str)
def test_waits_are_the_order_of_the_graph(schedule: Schedule) -> None:
    """The waits imply every edge that reads and writes ask for, and nothing else."""
    some = issued(schedule)
    graph = programs.task_graph(schedule, some)
    assert happens_before(some.rows) == all_before(len(some.rows), graph.edges)


def without(some: Issued, row: int, lane: int) -> Issued:
    rows = some.rows.copy()
    rows[row, WAIT + lane] = 0
    return replace(some, rows=rows)


@pytest.mark.parametrize("schedule", FEW, ids=str)
def test_each_wait_left_is_needed(schedule: Schedule) -> None:
    """The proof rejects the schedule without any one of them; where it is a barrier's, another order is
    left."""
    lean = replace(schedule, constants=schedule.constants._replace(lean=1))
    some = programs.issue(lean, neighbours(lean)[:3])
    if not lean.constants.barrier:
        accepted = [at for at in waits_of(some.rows) if not first_offence(lean, without(some, *at))]
        assert accepted == []
        return
    before = happens_before(some.rows)
    waits = [*waits_of(some.rows)]
    for row, lane in random.Random(1).sample(waits, min(4, len(waits))):
        assert happens_before(without(some, row, lane).rows) != before, (row, lane)


@pytest.mark.parametrize(("sizes", "name"), [(SIZES, "CGOPipe"), (STREAM, "paged"), (ROUTED, "paged")])
def test_waiting_for_one_task_less_is_a_race(sizes: OffloadConstants | StreamConstants, name: str) -> None:
    schedule = schedules.named(sizes, name)
    some = issued(schedule)
    for row, lane in waits_of(some.rows):
        rows = some.rows.copy()
        rows[row, WAIT + lane] -= 1
        assert first_offence(schedule, replace(some, rows=rows)) is not None


def test_implied_waits_change_nothing() -> None:
    """Lean or not, the same order; the published number of explicit edges is far below that of all."""
    fewer = schedules.named(SIZES, "CGOPipe")
    more = replace(fewer, constants=fewer.constants._replace(lean=0))
    some, all_of_them = issued(fewer), issued(more)
    assert happens_before(some.rows) == happens_before(all_of_them.rows)
    assert len(list(waits_of(some.rows))) < len(list(waits_of(all_of_them.rows)))


def test_a_wait_for_a_later_task_is_a_deadlock() -> None:
    schedule = schedules.named(STREAM, "paged")
    some = issued(schedule)
    rows = some.rows.copy()
    rows[0, WAIT + 1] = len(rows)
    offence = first_offence(schedule, replace(some, rows=rows))
    assert offence is not None
    assert offence.what == "waits for a later task"


def test_a_ring_that_is_too_small_loses_pages() -> None:
    """Two pages are staged ahead of their copy: two slots hold them, in one a page is lost."""
    schedule = schedules.named(SIZES, "CGOPipe")
    for slots, lost in ((3, False), (2, False), (1, True)):
        small = replace(schedule, constants=schedule.constants._replace(slots=slots, lead=2))
        offence = first_offence(small, issued(small))
        assert (offence is not None) == lost
        if offence:
            assert offence.what == "finds another's work"


def decode_pass(schedule: Schedule) -> Issued:
    """A decode pass in the steady state, alone."""
    count = getattr(schedule.constants, "micro_batches", 2)
    some = programs.issue(schedule, [Step(count, 0, count)] * 4)
    return replace(some, rows=some.rows[some.starts[2] : some.starts[3]])


@pytest.mark.parametrize("schedule", FEW, ids=str)
def test_each_task_runs_once_per_pass(schedule: Schedule) -> None:
    """Conservation: every micro-batch passes through every layer once, every page that moves moves once."""
    rows = decode_pass(schedule).rows
    seen = Counter(tuple(row) for row in rows[:, [0, 2, 3]].tolist())
    assert set(seen.values()) == {1}
    ops, c = programs.ops(schedule), schedule.constants
    by_op = Counter(ops[op] for op, _, _ in seen)
    if schedule.kind == "stream":
        assert isinstance(c, StreamConstants)
        assert by_op["attention"] == 2 * c.layers
        moved = max(0, 1 - c.resident) if c.places else c.pages - c.resident
        assert by_op["read"] == c.layers * moved
        assert by_op["fetch"] == c.layers * c.places
        assert by_op["hit"] == c.layers * (c.places + c.guesses)
        assert by_op["guess"] == c.layers * c.guesses
        return
    n = c.layers * c.micro_batches  # type: ignore[union-attr]
    assert by_op["cpu_attention"] + by_op["gpu_attention"] == by_op["post_attention"] == n
    assert by_op["copy_page"] == c.layers * c.pages
    assert by_op["head"] == by_op["embed"] == c.micro_batches  # type: ignore[union-attr]
    staged = c.layers * c.pages if c.slots else 0
    assert by_op["stage_page"] + by_op["read_page"] == staged


def test_a_routed_pass() -> None:
    """The disk of one pass, task by task: the page of attention, guesses, then what routing chose; a layer's
    reads come before the next layer's guesses, and two passes meet in the page of attention only."""
    schedule = schedules.named(ROUTED._replace(layers=2, resident=0, places=2, guesses=1), "paged")
    rows = decode_pass(schedule).rows
    lanes = [
        " ".join(f"{programs.ops(schedule)[op]}{layer}{item}" for op, layer, item in rows[at][:, [0, 2, 3]])
        for at in (rows[:, 1] == 0, rows[:, 1] == 1)
    ]
    assert lanes[0] == (
        "embed00 expect00 attention00 attention01 route00 place00 expect10 hit01 hit02 hit03 "
        "attention10 attention11 route10 place10 hit11 hit12 hit13 head10"
    )
    assert lanes[1] == "guess01 fetch02 fetch03 read10 guess11 fetch12 fetch13 read00"


def test_too_many_guesses_are_found() -> None:
    """A guess that takes the slot of a page not yet used."""
    for guesses, lost in ((2, False), (3, True)):
        schedule = schedules.named(ROUTED._replace(resident=0, slots=3, guesses=guesses), "paged")
        assert (first_offence(schedule, issued(schedule)) is not None) == lost


def test_a_reading_over_another_is_a_race() -> None:
    """Several threads read: what fills a slot must have come after a computation that used it."""
    schedule = schedules.named(ROUTED, "paged")
    some = issued(schedule)
    fetch = programs.ops(schedule).index("fetch")
    row = int(np.flatnonzero(some.rows[:, 0] == fetch)[0])
    guess = int(np.flatnonzero(some.rows[:, 0] == programs.ops(schedule).index("guess"))[0])
    slot = some.touches[:, 1] == some.rows[row, 4]
    moved = some.touches.copy()
    moved[(moved[:, 0] == row) & (moved[:, 2] == HOW.write) & slot, 1] = some.rows[guess, 4]
    offence = first_offence(schedule, replace(some, touches=moved))
    assert offence is not None
    assert offence.what == "races"


def test_algorithm_1() -> None:
    """The GPU and the link of one CGOPipe pass, task by task: n_ub = 3, look-ahead 2, the layer boundary."""
    sizes = SIZES._replace(layers=2, micro_batches=3, pages=3, slots=0, disk_pages=0, cpu_attended=3)
    rows = decode_pass(schedules.named(sizes, "CGOPipe")).rows
    names = programs.ops(schedules.named(sizes, "CGOPipe"))
    short = {"pre_attention": "pre", "post_attention": "post", "load_hidden": "hidden", "copy_page": "page"}
    lanes = [
        [
            f"{short.get(names[op], names[op])}{layer}{item}"
            for op, _, layer, item in rows[rows[:, 1] == lane, :4]
        ]
        for lane in (0, 1)
    ]
    assert " ".join(lanes[0]) == (
        "embed00 pre00 embed01 pre01 post00 embed02 pre02 post01 pre10 post02 pre11 "
        "post10 pre12 post11 post12 head10 head11 head12"
    )
    assert " ".join(lanes[1]) == (
        "hidden00 page10 hidden01 page11 hidden02 page12 hidden10 page00 hidden11 page01 hidden12 page02"
    )


def test_names_of_buffers() -> None:
    schedule = schedules.named(SIZES, "CGOPipe")
    some = issued(schedule)
    by_op = {task.op: task for task in programs.tasks(schedule, some)}
    assert by_op["offload_qkv"].reads == (("qkv", by_op["offload_qkv"].item),)
    assert by_op["copy_page"].reads[0][0] == "pinned"
    assert {buffer[0] for buffer in by_op["post_attention"].reads} == {"attended", "weights"}
    with pytest.raises(ValueError, match="no such buffer"):
        programs.buffer_name(schedule, 10_000)
