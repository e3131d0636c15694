"""Rows run in lane order, after what they wait for, and lanes go on across the pass boundary."""

import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from moeplan.runtime_min.lanes import (
    COMPUTE,
    DISK,
    LANES,
    READ,
    WAIT,
    Lanes,
    check_schedule,
    load_schedule,
    single,
)
from moeplan.runtime_min.limits import check_supported
from moeplan.runtime_min.plan_file import PlanFileError, load, to_json
from moeplan.runtime_min.stream import stream_constants

from .folders import Shape, in_memory, make_offload_plan, make_plan, stream_schedule, write_plan

SHAPE = Shape()
SOON_S = 120.0  # on the busiest machine
PASSES = [(0, 4), (2, 0), (1, 0), (0, 3), (2, 0)]  # micro-batches of decode, of prefill


class Recorder:
    """Notes when each row began and ended, and which page lies in which slot."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.computed: list[list[int]] = []
        self.slots: dict[int, tuple[int, int]] = {}

    def work(self, row):
        if row[0] == READ:
            return lambda: [partial(self._read, *row[2:5], at) for at in range(3)]
        return single(self._compute, row)

    def _read(self, layer, page, slot, at):
        time.sleep(0.0002 * ((page + at) % 3))
        with self.lock:
            self.slots[slot] = (layer, page)
        return 10

    def _compute(self, row):
        op, _, layer, item, slot = row[:WAIT]
        page = 0 if op == 2 else item
        if slot >= 0:
            assert self.slots[slot] == (layer, page)
        self.computed.append(row)


def fake_schedule(lanes, passes):
    """A schedule module that issues `passes`, each a list of rows."""
    tables = iter([np.array(rows, dtype=np.int64) for rows in passes])
    return SimpleNamespace(LANES=lanes, new_clock=lambda: None, issue=lambda *_: next(tables))


def run(lanes, work, *sizes):
    rows = lanes.issue(*sizes)
    lanes.run(rows, [work(row) for row in rows])
    return rows


def reach(lanes, lane, count):
    """Wait until a lane has completed so many rows."""
    end = time.monotonic() + SOON_S
    while lanes.lanes[lane].done < count and time.monotonic() < end:
        time.sleep(0.001)
    assert lanes.lanes[lane].done == count


@pytest.mark.parametrize("slots", [1, 2, 5, 11])
@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("barrier", [0, 1, 2])
def test_slots_hold_what_is_computed(tmp_path, slots, readers, barrier):
    """Changing numbers of micro-batches; every page is read once a pass and in its slot in time."""
    plan = make_plan(SHAPE, slots=slots)
    runtime_dir = write_plan(tmp_path, plan, stream_schedule(plan, barrier=barrier))
    schedule = load_schedule(runtime_dir, load(runtime_dir))
    recorder, lanes = Recorder(), Lanes(schedule, readers)
    expected = []
    for number, sizes in enumerate(PASSES):
        expected += run(lanes, recorder.work, *sizes, int(number + 1 < len(PASSES)))
    lanes.close()
    assert lanes.lanes["disk"].bytes_read == 10 * 3 * len(PASSES) * SHAPE.layers * 5
    assert recorder.computed == [row for row in expected if row[1] == COMPUTE]


def test_reading_goes_on_across_the_pass_boundary(tmp_path):
    """After a pass with another to come, its first pages arrive while nothing is computed."""
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE, slots=3))
    recorder = Recorder()
    lanes = Lanes(load_schedule(runtime_dir, load(runtime_dir)), 2)
    run(lanes, recorder.work, 0, 2, 1)
    reach(lanes, "disk", SHAPE.layers * 5 + 2)
    assert {recorder.slots[(10 + n) % 3] for n in range(2)} == {(0, 0), (0, 1)}
    run(lanes, recorder.work, 1, 0, 0)
    lanes.close()
    assert lanes.lanes["disk"].bytes_read == 2 * 30 * SHAPE.layers * 5


def test_rows_complete_in_order():
    """A page whose blocks are all there still waits for the pages before it."""
    gate, reading = threading.Event(), threading.Event()

    def work(row):
        if row[3] == 0 and row[1] == DISK:
            return lambda: [lambda: (reading.set(), gate.wait(), 1)[2]]
        return single(lambda: None)

    reads = [[READ, DISK, 0, page, page, 0, 0] for page in range(2)]
    lanes = Lanes(fake_schedule(LANES, [reads, [[0, COMPUTE, 0, 0, 0, 0, 2]]]), 2)
    run(lanes, work, 1, 0, 1)
    assert reading.wait(SOON_S)
    time.sleep(0.02)
    assert lanes.lanes["disk"].done == 0
    gate.set()
    run(lanes, work, 1, 0, 0)
    assert lanes.lanes["disk"].done == 2
    lanes.close()


@pytest.mark.parametrize("lane", ["gpu", "h2d", "cpu"])
def test_a_failing_lane_reaches_the_caller(lane):
    """Whoever fails: nobody waits on, the caller gets the error, and the threads end."""
    names = ("gpu", "h2d", "cpu")
    rows = [[0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0, 0], [0, 2, 0, 0, 0, 0, 1, 0]]
    rows.append([0, 0, 0, 1, 0, 0, 0, 1])
    lanes = Lanes(fake_schedule(names, [rows]))

    def work(row):
        if names[row[1]] == lane:
            raise OSError(f"{lane} is gone")

    with pytest.raises(OSError, match=f"{lane} is gone"):
        run(lanes, lambda row: single(work, row), 1, 0, 0)
    lanes.close()
    assert not any(thread.is_alive() for threads in lanes._threads.values() for thread in threads)


def test_an_interrupted_run_closes():
    """Ctrl-C in the calling thread while another lane waits for it."""
    names = ("gpu", "h2d")
    rows = [[0, 1, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]]
    lanes = Lanes(fake_schedule(names, [rows]))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(lanes, lambda row: single(interrupt), 1, 0, 0)
    lanes.close()
    assert lanes.lanes["h2d"].done == 0
    assert not any(thread.is_alive() for threads in lanes._threads.values() for thread in threads)


def test_nothing_to_read_starts_no_thread(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE, **in_memory(SHAPE)))
    lanes = Lanes(load_schedule(runtime_dir, load(runtime_dir)), 2)
    run(lanes, lambda row: single(lambda: None), 2, 0, 1)
    assert lanes._threads == {}


class Stream:
    """What `Lanes` asks of an accelerator's stream; it goes through what is enqueued only when told to."""

    def __init__(self):
        self.log, self.passed = [], -1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def record_event(self):
        return Event(self, len(self.log))

    def wait_event(self, event):
        self.log.append(event)

    def synchronize(self):
        self.passed = len(self.log)


class Event:
    def __init__(self, stream, at):
        self.stream, self.at = stream, at

    def query(self):
        return self.stream.passed >= self.at

    def synchronize(self):
        self.stream.log.append("awaited")
        self.stream.passed = max(self.stream.passed, self.at)


def test_streams_wait_for_events_and_hosts_for_streams():
    """A stand-in for streams: who waits for what, and that passed events are forgotten."""
    names = ("gpu", "h2d", "cpu")
    rows = [[0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 1, 0, 0], [0, 2, 0, 0, 0, 0, 1, 0]]
    rows.append([0, 0, 0, 1, 0, 0, 0, 1])
    lanes = Lanes(fake_schedule(names, [rows, rows[:1], rows[:1]]))
    gpu, h2d = Stream(), Stream()
    lanes.lanes["gpu"].stream, lanes.lanes["h2d"].stream = gpu, h2d
    run(lanes, lambda row: single(lambda: None), 1, 0, 0)
    first = h2d.log[0]
    assert first.stream is gpu  # the link's stream waits, not its thread
    assert h2d.log[1:] == ["awaited"]  # the CPU waits itself
    assert sorted(lanes.lanes["gpu"].events) == [1, 2]  # nothing has passed
    gpu.synchronize()
    run(lanes, lambda row: single(lambda: None), 1, 0, 0)
    assert lanes.lanes["gpu"].events == {}
    lanes.close()


def test_a_changed_schedule_is_refused(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    path = runtime_dir / "schedule.py"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(PlanFileError, match=r"schedule\.py: is not the schedule this plan was made with"):
        load(runtime_dir)


def test_a_schedule_of_another_format_is_refused(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    plan = load(runtime_dir)
    changed = replace(plan, schedule=replace(plan.schedule, format=9))
    (runtime_dir / "runtime.json").write_text(to_json(changed))
    with pytest.raises(PlanFileError, match=r"schedule\.py: has format 9, this runtime runs 2"):
        load(runtime_dir)


def test_a_schedule_of_another_plan_is_refused(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    plan = load(runtime_dir)
    other = replace(plan, pages=replace(plan.pages, slots=9))
    module = load_schedule(runtime_dir, plan)
    with pytest.raises(PlanFileError, match=r"schedule\.py: slots is 3, runtime\.json has 9"):
        check_schedule(module, "stream", stream_constants(other))


def test_stale_bytecode_is_not_run(tmp_path):
    """Only the source has the digest; a .pyc beside it could hold anything."""
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    cache = runtime_dir / "__pycache__"
    cache.mkdir()
    (cache / "schedule.cpython-311.pyc").write_bytes(b"garbage")
    assert load_schedule(runtime_dir, load(runtime_dir)).SCHEDULE.slots == 3


@pytest.mark.parametrize(
    ("kind", "device"), [("stream", "accelerator"), ("offload", "cpu"), ("cgopipe", "accelerator")]
)
def test_other_plans_are_refused_in_one_sentence(tmp_path, kind, device):
    plan = make_plan(SHAPE)
    plan = replace(plan, device=device, schedule=replace(plan.schedule, kind=kind))
    with pytest.raises(PlanFileError, match=f"executes no '{kind}' plan for device '{device}'"):
        check_supported(tmp_path / "runtime.json", plan)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "gpus"), [(4, 2, 3), (6, 3, 2), (12, 3, 4), (6, 2, 4)], ids=str
)
def test_heads_that_gpus_cannot_share_are_refused(tmp_path, heads, kv_heads, gpus):
    plan = make_offload_plan(replace(SHAPE, heads=heads, kv_heads=kv_heads), gpus=gpus)
    plan = replace(plan, schedule=replace(plan.schedule, kind="offload"))
    with pytest.raises(PlanFileError, match=f"{gpus} GPUs cannot share {heads} heads"):
        check_supported(tmp_path / "runtime.json", plan)
