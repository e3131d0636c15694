"""What every schedule program is written with: tasks on lanes, the buffers they touch, and the order that
follows.

Programs are plain loops that Numba compiles. They say which buffers each task reads and writes; `order`
derives what each task must wait for. The text below the mark is part of every emitted schedule.py, word for
word.
"""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

import numpy as np
from numba import njit

_ENTRY: dict[str, Any] = {"cache": True, "nogil": True, "error_model": "numpy"}
# What only compiled code calls needs no wrapper for Python, which takes half the time to compile.
_PART: dict[str, Any] = _ENTRY | {"cache": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
entry: Any = njit(**_ENTRY)
part: Any = njit(**_PART)

# --- emitted from here ---

WAIT = 5  # a row is op, lane, layer, item, slot, then one column per lane: wait for so many of its tasks


def numbered(*names: str) -> Any:
    """The names as attributes, each with its place. (Functions are compiled once per plain integer.)"""
    return namedtuple("Numbers", names)(*range(len(names)))


HOW = numbered("read", "write", "fence")


class Fixed(NamedTuple):
    """Figures that stand for themselves: the first layer, no slot."""

    first: int = 0
    none: int = -1


FIXED = Fixed()


class Clock(NamedTuple):
    """What carries over from pass to pass: how far every lane has come, and as seen by whom.

    A clock vector says, lane by lane, how many tasks are known to be complete.
    """

    issued: Any  # per lane, the tasks issued
    passes: Any  # the passes issued, and how much of the next has been issued already
    known: Any  # per lane, the vector of its newest task
    fence: Any  # per lane, the vector of its newest task before the newest fence
    best: Any  # per lane, the vector of its newest task that the task in hand must follow
    touched: Any  # per buffer, reads and writes, per lane: the vector of the newest such task since a write


class Out(NamedTuple):
    """The pass being issued: its rows, who touches what (task, buffer, how), and how many of both there
    are."""

    rows: Any
    touches: Any
    count: Any


def make_clock(lanes, buffers):
    """The state before the first pass."""
    known, fence, best = np.zeros((3, lanes, lanes), np.int64)
    touched = np.zeros((buffers, 2, lanes, lanes), np.int64)
    return Clock(np.zeros(lanes, np.int64), np.zeros(2, np.int64), known, fence, best, touched)


def make_out(lanes, rows, touches):
    """An empty pass with room for so many rows and touches."""
    table = np.zeros((rows, WAIT + lanes), np.int64)
    return Out(table, np.zeros((touches, 3), np.int64), np.zeros(2, np.int64))


@part
def task(out, op, lane, layer, item, slot):
    """Append a task. Its touches follow."""
    row = out.rows[out.count[0]]
    row[0] = op
    row[1] = lane
    row[2] = layer
    row[3] = item
    row[4] = slot
    out.count[0] += 1


@part
def reads(out, buffer):
    """The newest task reads `buffer`."""
    touch(out, buffer, HOW.read)


@part
def writes(out, buffer):
    """The newest task writes `buffer`."""
    touch(out, buffer, HOW.write)


@part
def fence(out):
    """All later tasks wait for all earlier ones."""
    touch(out, FIXED.first, HOW.fence)


@part
def touch(out, buffer, how):
    at = out.touches[out.count[1]]
    at[0] = out.count[0] - 1
    at[1] = buffer
    at[2] = how
    out.count[1] += 1


@entry
def order(clock, out, lean):
    """Fill in the waits: a task follows the last write of what it reads, and the last write and all later
    reads of what it writes. Where `lean`, waits that follow from other waits and the lanes' own order are
    left out."""
    lanes = len(clock.issued)
    first, end = 0, 0
    for n in range(out.count[0]):
        while end < out.count[1] and out.touches[end, 0] == n:
            end += 1
        lane = out.rows[n, 1]
        best = clock.best
        for other in range(lanes):
            assign(best[other], clock.fence[other])
        for at in range(first, end):
            follow(clock, best, out.touches[at, 1], out.touches[at, 2])
        wait(clock.known[lane], best, lane, out.rows[n], lean)
        vector = clock.known[lane]
        for other in range(lanes):
            for k in range(lanes):
                if best[other, k] > vector[k]:
                    vector[k] = best[other, k]
        clock.issued[lane] += 1
        vector[lane] = clock.issued[lane]
        for at in range(first, end):
            remember(clock, lane, out.touches[at, 1], out.touches[at, 2])
        first = end


@part
def assign(target, source):
    for k in range(len(source)):
        target[k] = source[k]


@part
def follow(clock, best, buffer, how):
    """Add to `best` the tasks that one touch of `buffer` must follow."""
    if how == HOW.fence:
        return
    touched = clock.touched[buffer]
    for lane in range(len(best)):
        if touched[HOW.write, lane, lane] > best[lane, lane]:
            assign(best[lane], touched[HOW.write, lane])
        if how == HOW.write and touched[HOW.read, lane, lane] > best[lane, lane]:
            assign(best[lane], touched[HOW.read, lane])


@part
def wait(known, best, lane, row, lean):
    """Write the waits for `best` into `row`: none on the task's own lane, which is in order anyway."""
    for other in range(len(best)):
        count = best[other, other]
        needed = count > 0 and other != lane
        if needed and lean:
            needed = known[other] < count
            for third in range(len(best)):
                if third != other and best[third, other] >= count:
                    needed = False
        if needed:
            row[WAIT + other] = count


@part
def remember(clock, lane, buffer, how):
    """The newest task of `lane` has touched `buffer`."""
    lanes = len(clock.issued)
    if how == HOW.fence:
        for other in range(lanes):
            assign(clock.fence[other], clock.known[other])
        return
    if how == HOW.write:
        for other in range(lanes):
            clock.touched[buffer, HOW.read, other, other] = 0
            clock.touched[buffer, HOW.write, other, other] = 0
    assign(clock.touched[buffer, how, lane], clock.known[lane])
