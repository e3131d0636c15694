"""The plan's schedule.py, executed: a compute lane on the calling thread and a disk lane on its readers.

Each lane takes its rows in order and counts what it has completed; a row starts once the other lane's count
has reached what the row waits for. Counts go on from pass to pass, and so the disk lane may read for the next
pass while this one still computes.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from moeplan.runtime_min.plan_file import SCHEDULE_FORMAT, PlanFileError, RuntimePlan

LANES = ("compute", "disk")
OPS = ("embed", "read", "attention", "route", "experts", "head")
EMBED, READ, ATTENTION, ROUTE, EXPERTS, HEAD = range(len(OPS))
COMPUTE, DISK = range(len(LANES))
PREFILL, DECODE = range(2)
WAIT = 5  # a row is op, lane, layer, item, slot, then per lane how many of its tasks must be complete

Row = Sequence[int]
Block = Callable[[], int]  # reads one block; returns its bytes


def load_schedule(folder: Path, plan: RuntimePlan) -> types.ModuleType:
    """Import `folder`/schedule.py, whose digest plan_file.load has checked; raises PlanFileError."""
    path = folder / "schedule.py"
    name = f"moeplan_schedule_{plan.schedule.sha256[:16]}"
    loader = _SourceLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader, origin=str(path)))
    module.__file__ = str(path)
    sys.modules[name] = module  # Numba looks the functions' module up by name
    try:
        loader.exec_module(module)
        _check_constants(path, module, plan)
    except PlanFileError:
        raise
    except Exception as error:
        raise PlanFileError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    return module


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Compiles the source whose digest was checked, never a .pyc left beside it."""

    def get_code(self, fullname: str) -> types.CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _check_constants(path: Path, module: types.ModuleType, plan: RuntimePlan) -> None:
    expected = {
        "FORMAT": SCHEDULE_FORMAT,
        "KIND": "stream",
        "LANES": LANES,
        "OPS": OPS,
        "WAIT": WAIT,
        "LAYERS": plan.model.layers,
        "PAGES": plan.pages.pages_per_layer,
        "RESIDENT": plan.pages.resident_pages,
        "SLOTS": plan.pages.slots,
    }
    for name, value in expected.items():
        if getattr(module, name, None) != value:
            found = getattr(module, name, None)
            raise PlanFileError(
                f"{path}: {name} is {found!r}, runtime.json has {value!r}: compile the spec again"
            )


@dataclass(slots=True)
class _Begun:
    """A disk row whose blocks are being read."""

    blocks_left: int


class DiskLane:
    """The reader threads and the two completed counters that the lanes wait on.

    Readers take the next block of the oldest row begun, and begin the next row when its wait is met, so
    blocks of consecutive rows overlap. A row is complete when its last block and all rows before it are.
    """

    def __init__(self, blocks: Callable[[int, int, int], Sequence[Block]], readers: int) -> None:
        self._blocks = blocks
        self._readers = readers
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._rows: deque[Row] = deque()
        self._jobs: deque[tuple[_Begun, Block]] = deque()
        self._begun: deque[_Begun] = deque()
        self._done = [0, 0]
        self._error: BaseException | None = None
        self._stop = False
        self.bytes_read = 0
        self.stall_s = 0.0

    def add(self, rows: Sequence[Row]) -> None:
        """Queue rows behind those queued before."""
        if not rows:
            return
        with self._changed:
            self._rows.extend(rows)
            self._changed.notify_all()
        if not self._threads:
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._readers)]
            for thread in self._threads:
                thread.start()

    def wait(self, count: int) -> None:
        """Return once `count` rows are complete; raises what a reader raised. Waiting counts as stall."""
        with self._changed:
            if self._done[DISK] >= count and self._error is None:
                return
            start = time.perf_counter()
            while self._done[DISK] < count and self._error is None:
                self._changed.wait()
            self.stall_s += time.perf_counter() - start
            if self._error is not None:
                raise self._error

    def computed(self) -> None:
        """One more compute row is complete."""
        with self._changed:
            self._done[COMPUTE] += 1
            if self._rows and self._rows[0][WAIT + COMPUTE] == self._done[COMPUTE]:
                self._changed.notify_all()

    def close(self) -> None:
        """End the threads; reads under way finish first."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            begun, read = job
            try:
                nbytes = read()
            except BaseException as error:  # handed to the compute lane, which raises it
                self._fail(error)
                return
            self._finish(begun, nbytes)

    def _next(self) -> tuple[_Begun, Block] | None:
        """The next block, when there is one; None at the end."""
        with self._changed:
            while not self._stop and self._error is None:
                if not self._jobs and self._rows and self._rows[0][WAIT + COMPUTE] <= self._done[COMPUTE]:
                    self._begin(self._rows.popleft())
                if self._jobs:
                    return self._jobs.popleft()
                self._changed.wait()
            return None

    def _begin(self, row: Row) -> None:
        _, _, layer, page, slot = row[:WAIT]
        blocks = self._blocks(layer, page, slot)
        begun = _Begun(len(blocks))
        self._begun.append(begun)
        self._jobs.extend((begun, block) for block in blocks)
        self._changed.notify_all()

    def _finish(self, begun: _Begun, nbytes: int) -> None:
        with self._changed:
            self.bytes_read += nbytes
            begun.blocks_left -= 1
            while self._begun and self._begun[0].blocks_left == 0:
                self._begun.popleft()
                self._done[DISK] += 1
                self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()


class Lanes:
    """Runs passes of a schedule module."""

    def __init__(self, schedule: Any, disk: DiskLane) -> None:
        self._schedule = schedule
        self._clock = schedule.new_clock()
        self._disk = disk
        self._ahead: list[Row] = []  # disk rows of the next pass that are queued already

    def run(self, phase: int, micro_batches: int, execute: Callable[[Row], None], more: bool) -> None:
        """Execute one pass; `execute` computes a row. `more` says that another pass follows."""
        rows = self._issue(self._clock, phase, micro_batches)
        reads = [row for row in rows if row[1] == DISK]
        if reads[: len(self._ahead)] != self._ahead:
            raise PlanFileError(
                f"{self._schedule.__file__}: the first reads of a pass depend on its micro-batches"
            )
        self._disk.add(reads[len(self._ahead) :])
        self._ahead = self._next_reads() if more else []
        self._disk.add(self._ahead)
        for row in rows:
            if row[1] == COMPUTE:
                self._disk.wait(row[WAIT + DISK])
                execute(row)
                self._disk.computed()

    def _issue(self, clock: Any, phase: int, micro_batches: int) -> list[Row]:
        table = np.zeros((self._schedule.max_rows(micro_batches), self._schedule.COLUMNS), dtype=np.int64)
        count = self._schedule.issue(clock, table, phase, micro_batches, 0)
        rows: list[Row] = table[:count].tolist()
        return rows

    def _next_reads(self) -> list[Row]:
        """The reads of the next pass that wait only for this one: the same however that pass turns out."""
        clock = self._clock.copy()
        issued = int(clock[0, COMPUTE])
        reads = (row for row in self._issue(clock, DECODE, 1) if row[1] == DISK)
        return list(takewhile(lambda row: row[WAIT + COMPUTE] <= issued, reads))
