"""The plan's schedule.py, executed: every lane works off its own rows in order.

Each lane counts the rows it has completed; a row starts once the other lanes' counts have reached what the
row waits for. Counts go on from pass to pass, so a lane may work for the next pass while others still finish
this one. The first lane is the calling thread, each other one a thread; a row of the disk is cut into blocks
that several threads read.

With an accelerator (never run on one yet) its lanes have a stream each. They count what is enqueued, and
record an event behind it: a lane with a stream lets its stream wait for the event of another, the others wait
themselves.
"""

from __future__ import annotations

import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moeplan.runtime_min.compiled import compiled_apart
from moeplan.runtime_min.plan_file import SCHEDULE_FORMAT, PlanFileError, RuntimePlan
from moeplan.runtime_min.trace import Trace

LANES = ("compute", "disk")  # of a stream plan
OPS = ("embed", "read", "attention", "route", "experts", "head", "expect", "guess", "place", "fetch", "hit")
EMBED, READ, ATTENTION, ROUTE, EXPERTS, HEAD, EXPECT, GUESS, PLACE, FETCH, HIT = range(len(OPS))
COMPUTE, DISK = range(len(LANES))
WAIT = 5  # a row is op, lane, layer, item, slot, then per lane how many of its tasks must be complete
ON_DEVICE = ("gpu", "h2d", "d2h")  # lanes that have a stream of an accelerator

Row = Sequence[int]
Block = Callable[[], int | None]  # a part of a row's work; returns the bytes it read, if any
Blocks = Callable[[], Sequence[Block]]  # the parts of a row's work, which may run at once


def load_schedule(folder: Path, plan: RuntimePlan) -> types.ModuleType:
    """Execute `folder`/schedule.py, whose digest plan_file.load has checked, and never a .pyc left beside it;
    raises PlanFileError."""
    path = folder / "schedule.py"
    module = types.ModuleType(f"moeplan_schedule_{plan.schedule.sha256[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # Numba looks the functions' module up by name
    try:
        with compiled_apart(plan.schedule.sha256):
            exec(compile(path.read_bytes(), path, "exec", dont_inherit=True), vars(module))
            module.issue(module.new_clock(), 1, 1, 1)  # compiled now, not in the first pass
    except Exception as error:
        raise PlanFileError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    return module


def check_schedule(module: Any, kind: str, expected: dict[str, Any]) -> None:
    """Raise PlanFileError where the schedule is not of `kind`, or a constant is not the one `expected`."""
    constants = getattr(module, "SCHEDULE", None)
    named = {"FORMAT": SCHEDULE_FORMAT, "KIND": kind, "WAIT": WAIT}
    found = {name: getattr(module, name, None) for name in named}
    found |= {name: getattr(module, name, getattr(constants, name, None)) for name in expected}
    for name, value in (named | expected).items():
        if found[name] != value:
            raise PlanFileError(
                f"{module.__file__}: {name} is {found[name]!r}, runtime.json has {value!r}: "
                "compile the spec again"
            )


def single(work: Callable[..., None], *arguments: Any) -> Blocks:
    return lambda: (lambda: work(*arguments),)


@dataclass(slots=True)
class _Begun:
    """A row under way: the parts that are left, and the events that must have come first."""

    row: Row
    blocks_left: int
    events: list[torch.Event]


@dataclass(slots=True, eq=False)
class Lane:
    """A lane's rows, and what it has done so far.

    `busy_s`: seconds in which any of its threads worked (with a stream: enqueued). `stall_s`: seconds in
    which none did because the next row had to wait for other lanes. The rest of the time it had no rows, or
    its threads looked for them.
    """

    number: int
    threads: int = 1
    stream: torch.Stream | None = None
    done: int = 0
    bytes_read: int = 0
    busy_s: float = 0.0
    stall_s: float = 0.0
    running: int = 0  # threads at work
    waiting: int = 0  # threads that wait for something to do
    changed_s: float = 0.0  # when it last began or ended to work or to wait
    rows: deque[tuple[Row, Blocks]] = field(default_factory=deque)
    jobs: deque[tuple[_Begun, Block]] = field(default_factory=deque)
    begun: deque[_Begun] = field(default_factory=deque)
    events: dict[int, torch.Event] = field(default_factory=dict)  # by count, of rows that may not be complete

    def on_stream(self) -> AbstractContextManager[Any]:
        return self.stream or nullcontext()

    def account(self, now: float) -> None:
        """Add the time since the last change to what the lane did meanwhile."""
        elapsed, self.changed_s = now - self.changed_s, now
        if self.running:
            self.busy_s += elapsed
        elif self.waiting and self.rows:
            self.stall_s += elapsed


class Lanes:
    """Runs passes of a schedule module; `readers` threads work on the disk's rows."""

    def __init__(self, schedule: Any, readers: int = 1, device: torch.device | None = None) -> None:
        self._schedule = schedule
        self._clock = schedule.new_clock()
        self.lanes = {name: Lane(number) for number, name in enumerate(schedule.LANES)}
        self._numbered = list(self.lanes.values())
        self._caller = self._numbered[0]
        if "disk" in self.lanes:
            self.lanes["disk"].threads = readers
        if device is not None and device.type != "cpu":
            for name in ON_DEVICE:
                self.lanes[name].stream = torch.Stream(device=device)
        self._threads: dict[int, list[threading.Thread]] = {}  # by lane, once it has rows
        # Entered as a C lock: an exception out of a signal handler cannot come between lock and block.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self.watcher: Trace | None = None  # told of every block, in turn
        self._error: BaseException | None = None
        self._stop = False

    def issue(self, decode: int, prefill: int, following: int) -> list[Row]:
        """The rows of the next pass: see schedule.py."""
        rows: list[Row] = self._schedule.issue(self._clock, decode, prefill, following).tolist()
        return rows

    def run(self, rows: Sequence[Row], work: Sequence[Blocks]) -> None:
        """Queue `rows`, each with its work, and execute those of the calling thread's lane.

        The others go on when this returns. Raises what any lane raised.
        """
        self._add(rows, work)
        with self._caller.on_stream():
            while (job := self._next(self._caller)) is not None:
                self._do(self._caller, *job)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the threads; work under way is finished first, what is only queued is not."""
        with self._lock:
            self._stop = True
            self._changed.notify_all()
        for threads in self._threads.values():
            for thread in threads:
                thread.join()
        for lane in self._numbered:
            if lane.stream is not None:
                lane.stream.synchronize()

    def _add(self, rows: Sequence[Row], work: Sequence[Blocks]) -> None:
        with self._lock:
            now = time.perf_counter()
            for lane in self._numbered:
                lane.account(now)
            for row, blocks in zip(rows, work, strict=True):
                self._numbered[row[1]].rows.append((row, blocks))
            self._changed.notify_all()
        for lane in self._numbered:
            if lane.rows and lane is not self._caller and lane.number not in self._threads:
                self._threads[lane.number] = [self._start(lane) for _ in range(lane.threads)]

    def _start(self, lane: Lane) -> threading.Thread:
        thread = threading.Thread(target=self._work, args=(lane,), daemon=True)
        thread.start()
        return thread

    def _work(self, lane: Lane) -> None:
        try:
            with torch.inference_mode(), lane.on_stream():
                while (job := self._next(lane)) is not None:
                    self._do(lane, *job)
        except BaseException as error:  # handed to the calling thread, which raises it
            with self._lock:
                self._error, self._stop = self._error or error, True
                self._changed.notify_all()

    def _do(self, lane: Lane, begun: _Begun, block: Block) -> None:
        for event in begun.events:
            event.synchronize()
        start = time.perf_counter()
        nbytes = block() or 0
        with self._lock:
            end = time.perf_counter()
            lane.account(end)
            lane.running -= 1
            lane.bytes_read += nbytes
            begun.blocks_left -= 1
            self._retire(lane)
            if self.watcher:
                name, op = self._schedule.LANES[lane.number], self._schedule.OPS[begun.row[0]]
                self.watcher.block(name, op, begun.row, nbytes, start, end)

    def _next(self, lane: Lane) -> tuple[_Begun, Block] | None:
        """The next block, when it may start; None at the end, which for the caller is the end of its rows."""
        with self._lock:
            while not self._stop:
                if lane.jobs:
                    lane.account(time.perf_counter())
                    lane.running += 1
                    return lane.jobs.popleft()
                if lane.rows and self._ready(lane.rows[0][0]):
                    self._begin(lane, *lane.rows.popleft())
                elif lane is self._caller and not lane.rows:
                    return None
                else:
                    self._wait(lane)
            return None

    def _wait(self, lane: Lane) -> None:
        lane.account(time.perf_counter())
        lane.waiting += 1
        self._changed.wait()
        lane.account(time.perf_counter())
        lane.waiting -= 1

    def _ready(self, row: Row) -> bool:
        return all(lane.done >= count for lane, count in zip(self._numbered, row[WAIT:], strict=True))

    def _begin(self, lane: Lane, row: Row, blocks: Blocks) -> None:
        """Cut the row into jobs. Blocks of consecutive rows overlap: the first need not be complete."""
        needed = (other.events.get(n) for other, n in zip(self._numbered, row[WAIT:], strict=True) if n)
        events = [event for event in needed if event is not None]
        if lane.stream is not None:
            for event in events:
                lane.stream.wait_event(event)
            events = []
        parts = blocks()
        begun = _Begun(row, len(parts), events)
        lane.begun.append(begun)
        lane.jobs.extend((begun, block) for block in parts)
        if lane.threads > 1:
            self._changed.notify_all()
        self._retire(lane)

    def _retire(self, lane: Lane) -> None:
        """Count rows that are complete: all their blocks, and all rows before them."""
        number = WAIT + lane.number
        while lane.begun and lane.begun[0].blocks_left == 0:
            lane.begun.popleft()
            lane.done += 1
            if lane.stream is not None:
                self._record(lane, lane.stream)
            if any(other.rows and other.rows[0][0][number] == lane.done for other in self._numbered):
                self._changed.notify_all()

    @staticmethod
    def _record(lane: Lane, stream: torch.Stream) -> None:
        """Mark the end of a row on its stream, and forget the marks that the stream has passed."""
        lane.events[lane.done] = stream.record_event()
        while lane.events and next(iter(lane.events.values())).query():
            del lane.events[next(iter(lane.events))]
