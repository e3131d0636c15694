"""Rows run in lane order, after what they wait for, and the disk lane reads across the pass boundary."""

import threading
import time
from dataclasses import replace

import pytest

from moeplan.runtime_min.lanes import COMPUTE, DECODE, DISK, PREFILL, WAIT, DiskLane, Lanes, load_schedule
from moeplan.runtime_min.limits import check_supported
from moeplan.runtime_min.plan_file import PlanFileError, load, to_json

from .folders import Shape, in_memory, make_plan, write_plan

SHAPE = Shape()


class Recorder:
    """Notes when each row began and ended, and which page lies in which slot."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.events: list[tuple[str, tuple[int, ...]]] = []
        self.slots: dict[int, tuple[int, int]] = {}

    def blocks(self, layer, page, slot):
        return [lambda at=at: self._read(layer, page, slot, at) for at in range(3)]

    def _read(self, layer, page, slot, at):
        time.sleep(0.0002 * ((page + at) % 3))
        with self.lock:
            self.slots[slot] = (layer, page)
            self.events.append(("read", (layer, page, slot)))
        return 10

    def compute(self, row):
        op, _, layer, item, slot = row[:5]
        page = 0 if op == 2 else item
        if slot >= 0:
            assert self.slots[slot] == (layer, page)
        with self.lock:
            self.events.append(("compute", tuple(row[:5])))


@pytest.mark.parametrize("slots", [1, 2, 5, 11])
@pytest.mark.parametrize("readers", [1, 4])
def test_slots_hold_what_is_computed(tmp_path, slots, readers):
    """Changing numbers of micro-batches; every page is read once a pass and in its slot in time."""
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE, slots=slots))
    schedule = load_schedule(runtime_dir, load(runtime_dir))
    recorder = Recorder()
    disk = DiskLane(recorder.blocks, readers)
    lanes = Lanes(schedule, disk)
    passes = [(PREFILL, 4), (DECODE, 2), (DECODE, 1), (PREFILL, 3), (DECODE, 2)]
    for number, (phase, micro_batches) in enumerate(passes):
        lanes.run(phase, micro_batches, recorder.compute, more=number + 1 < len(passes))
    disk.close()
    assert disk.bytes_read == 10 * 3 * len(passes) * SHAPE.layers * 5
    issued = [row for kind, row in recorder.events if kind == "compute"]
    clock = schedule.new_clock()
    plain = Lanes(schedule, disk)
    expected = [tuple(r[:5]) for p in passes for r in plain._issue(clock, *p) if r[1] == COMPUTE]
    assert issued == expected


def test_reading_goes_on_across_the_pass_boundary(tmp_path):
    """After a pass with another to come, its first pages arrive while nothing is computed."""
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE, slots=3))
    recorder = Recorder()
    disk = DiskLane(recorder.blocks, 2)
    lanes = Lanes(load_schedule(runtime_dir, load(runtime_dir)), disk)
    lanes.run(PREFILL, 2, recorder.compute, more=True)
    disk.wait(SHAPE.layers * 5 + 3)
    assert {recorder.slots[(10 + n) % 3] for n in range(3)} == {(0, 0), (0, 1), (0, 2)}
    lanes.run(DECODE, 1, recorder.compute, more=False)
    disk.close()
    assert disk.bytes_read == 2 * 30 * SHAPE.layers * 5


def test_rows_complete_in_order():
    """A page whose blocks are all there still waits for the pages before it."""
    gate, reading = threading.Event(), threading.Event()

    def blocks(layer, page, slot):
        if page == 0:
            return [lambda: (reading.set(), gate.wait(), 1)[2]]
        return [lambda: 1]

    disk = DiskLane(blocks, 2)
    row = [1, DISK, 0, 0, 0, 0, 0]
    disk.add([row, [*row[:3], 1, 1, 0, 0]])
    assert reading.wait(5)
    time.sleep(0.02)
    assert disk._done[DISK] == 0
    gate.set()
    disk.wait(2)
    disk.close()


def test_a_failing_read_reaches_the_compute_lane(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))

    def blocks(layer, page, slot):
        def fail():
            raise OSError(f"page {page} of layer {layer} is gone")

        return [fail if (layer, page) == (1, 2) else lambda: 1]

    disk = DiskLane(blocks, 2)
    lanes = Lanes(load_schedule(runtime_dir, load(runtime_dir)), disk)
    with pytest.raises(OSError, match="page 2 of layer 1 is gone"):
        lanes.run(PREFILL, 1, lambda row: None, more=False)
    disk.close()
    assert not any(thread.is_alive() for thread in disk._threads)


def test_nothing_to_read_starts_no_thread(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE, **in_memory(SHAPE)))
    disk = DiskLane(lambda *at: [], 2)
    Lanes(load_schedule(runtime_dir, load(runtime_dir)), disk).run(DECODE, 2, lambda row: None, more=True)
    assert disk._threads == []


def test_jitted_and_plain_loops_write_the_same_rows(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE, resident_pages=1))
    schedule = load_schedule(runtime_dir, load(runtime_dir))
    lanes = Lanes(schedule, DiskLane(lambda *at: [], 1))
    plain_clock, clock = schedule.new_clock(), schedule.new_clock()
    for micro_batches in (3, 1, 2):
        rows = lanes._issue(clock, DECODE, micro_batches)
        jitted, schedule.issue = schedule.issue, getattr(schedule.issue, "py_func", schedule.issue)
        assert lanes._issue(plain_clock, DECODE, micro_batches) == rows
        schedule.issue = jitted
        assert any(row[WAIT + COMPUTE] for row in rows if row[1] == DISK)


def test_a_changed_schedule_is_refused(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    path = runtime_dir / "schedule.py"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(PlanFileError, match=r"schedule\.py: is not the schedule this plan was made with"):
        load(runtime_dir)


def test_a_schedule_of_another_format_is_refused(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    plan = load(runtime_dir)
    changed = replace(plan, schedule=replace(plan.schedule, format=2))
    (runtime_dir / "runtime.json").write_text(to_json(changed))
    with pytest.raises(PlanFileError, match=r"schedule\.py: has format 2, this runtime runs 1"):
        load(runtime_dir)


def test_a_schedule_of_another_plan_is_refused(tmp_path):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    plan = load(runtime_dir)
    other = replace(plan, pages=replace(plan.pages, slots=9))
    with pytest.raises(PlanFileError, match=r"schedule\.py: SLOTS is 3, runtime\.json has 9"):
        load_schedule(runtime_dir, other)


def test_stale_bytecode_is_not_run(tmp_path):
    """Only the source has the digest; a .pyc beside it could hold anything."""
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    cache = runtime_dir / "__pycache__"
    cache.mkdir()
    (cache / "schedule.cpython-311.pyc").write_bytes(b"garbage")
    assert load_schedule(runtime_dir, load(runtime_dir)).SLOTS == 3


@pytest.mark.parametrize("change", [{"device": "accelerator"}, {"kind": "cgopipe"}])
def test_other_plans_are_refused_in_one_sentence(tmp_path, change):
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    plan = load(runtime_dir)
    if "kind" in change:
        plan = replace(plan, schedule=replace(plan.schedule, **change))
    else:
        plan = replace(plan, **change)
    with pytest.raises(PlanFileError, match="this version executes stream plans on the CPU only"):
        check_supported(runtime_dir / "runtime.json", plan)
