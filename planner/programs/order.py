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


# What carries over from pass to pass is a table of clock vectors: how many tasks of each lane are known to be
# complete. It has groups of one row per lane: of the lane's newest task, of its newest before the last fence,
# of its newest that the task in hand must follow; one that is no vector, but counts the passes issued and how
# much of the next has been issued already; and then two per buffer, of the newest tasks that read it since it
# was written, and of the newest that wrote it.
GROUP = numbered("newest", "fenced", "followed", "passes", "buffers")


def make_clock(lanes, buffers):
    """The state before the first pass."""
    return np.zeros(((GROUP.buffers + 2 * buffers) * lanes, lanes), np.int64)


def passes_of(clock):
    """Passes issued, and how much of the next."""
    return clock[GROUP.passes * clock.shape[1]]


def make_log(tasks, touches):
    """Room for the tasks of a pass and what they touch, one line each. The first line holds their number."""
    return np.zeros((1 + tasks + touches, WAIT), np.int64)


def as_record(constants):
    """Constants in the form that compiled functions take: one argument."""
    return np.rec.fromrecords([tuple(constants)], dtype=[(name, np.int64) for name in constants._fields])[0]


@part
def task(log, op, lane, layer, item, slot):
    """Append a task. What it touches follows."""
    log[0, 0] += 1
    line = log[log[0, 0]]
    line[0] = op
    line[1] = lane
    line[2] = layer
    line[3] = item
    line[4] = slot


@part
def reads(log, buffer):
    """The newest task reads `buffer`."""
    touch(log, buffer, HOW.read)


@part
def writes(log, buffer):
    """The newest task writes `buffer`."""
    touch(log, buffer, HOW.write)


@part
def fence(log):
    """All later tasks wait for all earlier ones."""
    touch(log, FIXED.first, HOW.fence)


@part
def touch(log, buffer, how):
    log[0, 0] += 1
    line = log[log[0, 0]]
    line[0] = FIXED.none
    line[1] = buffer
    line[2] = how


def make_rows(log, lanes):
    """Rows for the tasks of `log`, without waits as yet."""
    lines = log[1 : 1 + log[0, 0]]
    tasks = lines[lines[:, 0] >= 0]
    return np.concatenate([tasks, np.zeros((len(tasks), lanes), np.int64)], axis=1)


@entry
def order(clock, log, rows, lean):
    """Fill in the waits: a task follows the last write of what it reads, and the last write and all later
    reads of what it writes. Where `lean`, waits that follow from other waits and the lanes' own order are
    left out."""
    lanes = clock.shape[1]
    followed, fenced = GROUP.followed * lanes, GROUP.fenced * lanes
    first = 1
    for n in range(len(rows)):
        end = first + 1  # the task's line, and then those of what it touches
        while end <= log[0, 0] and log[end, 0] < 0:
            end += 1
        lane = rows[n, 1]
        for other in range(lanes):
            copy_row(clock, followed + other, fenced + other)
        for at in range(first + 1, end):
            follow(clock, log[at, 1], log[at, 2])
        wait(clock, lane, rows, n, lean)
        for other in range(lanes):
            for k in range(lanes):
                if clock[followed + other, k] > clock[lane, k]:
                    clock[lane, k] = clock[followed + other, k]
        clock[lane, lane] += 1
        for at in range(first + 1, end):
            remember(clock, lane, log[at, 1], log[at, 2])
        first = end


@part
def copy_row(clock, target, source):
    for k in range(clock.shape[1]):
        clock[target, k] = clock[source, k]


@part
def follow(clock, buffer, how):
    """The task in hand follows those that one touch of `buffer` asks for."""
    if how == HOW.fence:
        return
    lanes = clock.shape[1]
    best, readers = GROUP.followed * lanes, (GROUP.buffers + 2 * buffer) * lanes
    writers = readers + lanes
    for lane in range(lanes):
        if clock[writers + lane, lane] > clock[best + lane, lane]:
            copy_row(clock, best + lane, writers + lane)
        if how == HOW.write and clock[readers + lane, lane] > clock[best + lane, lane]:
            copy_row(clock, best + lane, readers + lane)


@part
def wait(clock, lane, rows, n, lean):
    """Write what task n follows into its row: nothing of its own lane, which is in order anyway."""
    lanes = clock.shape[1]
    best = GROUP.followed * lanes
    for other in range(lanes):
        count = clock[best + other, other]
        needed = count > 0 and other != lane
        if needed and lean:
            needed = clock[lane, other] < count
            for third in range(lanes):
                if third != other and clock[best + third, other] >= count:
                    needed = False
        if needed:
            rows[n, WAIT + other] = count


@part
def remember(clock, lane, buffer, how):
    """The newest task of `lane` has touched `buffer`."""
    lanes = clock.shape[1]
    readers = (GROUP.buffers + 2 * buffer) * lanes
    writers = readers + lanes
    if how == HOW.read:
        copy_row(clock, readers + lane, lane)
        return
    for other in range(lanes):
        if how == HOW.fence:
            copy_row(clock, GROUP.fenced * lanes + other, other)
        else:
            clock[readers + other, other] = 0
            clock[writers + other, other] = 0
    if how == HOW.write:
        copy_row(clock, writers + lane, lane)
