"""What every schedule promises, checked row by row: happens-before by vector clocks, and the pages' contents.

Nothing here knows how waits were derived. A task happens before another if the lanes' own order and the waits
say so; a wait for a task that is not issued yet would be a deadlock.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.schedule import OffloadConstants, Schedule, StreamConstants
from moeplan.planner.programs import PROGRAMS, Issued, Step, buffer_name, order, stream

Table = NDArray[np.int64]
_LAYER, _ITEM = 2, 3
_ANY, _SAME, _PAGE, _SLOT = range(4)
# Buffers through which a task hands its work to the next of the same layer and micro-batch (or piece).
_OWN = (
    *("qkv", "qkv_pin", "attended_pin", "attended", "routed", "routed_pin", "partial_pin"),
    *("kv_in", "kv_out", "piece_out", "piece_routed", "piece_routed_pin"),
)
_STREAM_ATTENTION = stream.OPS.index("attention")


class Offence(NamedTuple):
    """The first broken promise: which row breaks what, on which buffer (or lane, for a wait)."""

    row: int
    what: str
    buffer: int


def neighbours(schedule: Schedule) -> list[Step]:
    """Passes in which every kind follows every other that it may: prefill, full and mixed decode, fewer
    micro-batches at the end of a batch, than announced too, and the next batch's prefill."""
    c = schedule.constants
    count, pieces = (c.micro_batches, c.pieces) if isinstance(c, OffloadConstants) else (2, 2)
    fewer = max(1, count - 1)
    return [
        Step(0, pieces, 0),
        Step(count, 0, count),
        Step(count, min(pieces, 2), count),
        Step(count, 0, fewer),
        Step(fewer, 0, fewer),
        Step(max(1, fewer - 1), 0, 0),
        Step(0, pieces, 0),
        Step(count, 0, count),
        Step(fewer, 0, 0),
    ]


def page_bytes(schedule: Schedule, issued: Issued, policy: Policy) -> dict[str, float]:
    """Bytes of the page buffers that the passes touch, by the policy's names for them, of one copy.

    Pages are as large as the policy's streamed layer cut into so many; where pages were merged, larger.
    """
    used = np.unique(issued.touches[issued.touches[:, 2] != order.HOW.fence, 1])
    c, pages = schedule.constants, policy.pages
    if isinstance(c, StreamConstants):
        return {"page slots": float(np.sum(used < c.slots) * pages.slot_bytes)}
    each = pages.slot_bytes * pages.pages_per_layer / max(1, c.pages)
    return {
        "pinned pages": float(np.sum(used < c.slots) * each),
        "weight pages": float(np.sum((used >= c.slots) & (used < c.slots + 2 * c.pages)) * each),
    }


def first_offence(schedule: Schedule, issued: Issued) -> Offence | None:
    """The first row that waits for a later one, races with another, or finds a wrong page; None if all is
    well."""
    lanes = len(PROGRAMS[schedule.kind].LANES)
    buffers = PROGRAMS[schedule.kind].buffers(schedule.constants)
    names = PROGRAMS[schedule.kind].LANES
    wide = names.index("disk") if "disk" in names else -1
    row, buffer, late = _race(issued.rows, issued.touches, lanes, buffers, wide)
    if row >= 0:
        return Offence(row, "waits for a later task" if late else "races", buffer)
    row, buffer = _wrong_content(issued.rows, issued.touches, _rules(schedule))
    return Offence(row, "finds another's work", buffer) if row >= 0 else None


@njit(cache=True)
def _race(rows: Table, touches: Table, lanes: int, buffers: int, wide: int) -> tuple[int, int, bool]:
    """Several threads work on the lane `wide`: its tasks end in order, but begin before others have ended."""
    count = len(rows)
    begun = np.zeros((count, lanes), np.int64)  # per row, how much of every lane is complete as it begins
    known = np.zeros((count, lanes), np.int64)  # and with its end
    place = np.zeros((lanes, count + 1), np.int64)  # per lane, the row of its n-th task
    issued = np.zeros(lanes, np.int64)
    written = np.zeros((buffers, 2), np.int64)  # lane and number of the last write
    read = np.zeros((buffers, lanes), np.int64)  # per lane, the number of the last read since
    at = 0
    for n in range(count):
        lane = rows[n, 1]
        if issued[lane]:
            before = place[lane, issued[lane]]
            known[n] = known[before]
            begun[n] = begun[before] if lane == wide else known[before]
        for other in range(lanes):
            wait = rows[n, order.WAIT + other]
            if wait > issued[other]:
                return n, other, True
            if wait:
                begun[n] = np.maximum(begun[n], known[place[other, wait]])
        known[n] = np.maximum(known[n], begun[n])
        first = at
        while at < len(touches) and touches[at, 0] == n:
            buffer, how = touches[at, 1], touches[at, 2]
            at += 1
            if how == order.HOW.fence:
                continue
            if begun[n, written[buffer, 0]] < written[buffer, 1]:
                return n, buffer, False
            for other in range(lanes):
                if how == order.HOW.write and begun[n, other] < read[buffer, other]:
                    return n, buffer, False
        issued[lane] += 1
        place[lane, issued[lane]] = n
        known[n, lane] = issued[lane]
        for k in range(first, at):
            buffer = touches[k, 1]
            if touches[k, 2] == order.HOW.read:
                read[buffer, lane] = issued[lane]
            elif touches[k, 2] == order.HOW.write:
                written[buffer] = lane, issued[lane]
                read[buffer] = 0
    return -1, -1, False


@njit(cache=True)
def _wrong_content(rows: Table, touches: Table, rules: Table) -> tuple[int, int]:
    """The first row that reads a buffer with the work of another layer, micro-batch or page than its own."""
    held = np.full((len(rules), 2), -1, np.int64)  # per buffer, layer and item of the task that wrote it
    for n, buffer, how in touches:
        rule, page = rules[buffer]
        if how == order.HOW.fence or rule == _ANY:
            continue
        layer, item = rows[n, _LAYER], rows[n, _ITEM]
        if how == order.HOW.write:
            held[buffer] = layer, item
            continue
        if rule != _PAGE:
            page = _slot_page(rows[n]) if rule == _SLOT else item
        if held[buffer, 0] != layer or held[buffer, 1] != page:
            return n, buffer
    return -1, -1


@njit(cache=True)
def _slot_page(row: Table) -> int:
    """The page that a task of a stream plan computes with: attention is page 0, whichever micro-batch."""
    return 0 if row[0] == _STREAM_ATTENTION else row[_ITEM]


def _rules(schedule: Schedule) -> Table:
    """For each buffer what a reader must find in it: anything, the work of its own layer and item, or a page
    (which of them, in the second column)."""
    c = schedule.constants
    rules = np.zeros((PROGRAMS[schedule.kind].buffers(c), 2), np.int64)
    if isinstance(c, StreamConstants):
        rules[: c.slots, 0] = _SLOT
        rules[c.slots + stream.STATE.placed :] = _PAGE, 0  # of the layer that reads it
        return rules
    assert isinstance(c, OffloadConstants)
    rules[: c.slots, 0] = _SAME
    for half in range(2):
        for page in range(c.pages):
            rules[c.slots + half * c.pages + page] = _PAGE, page
    names = [
        (buffer_name(schedule, number)[0], number) for number in range(c.slots + 2 * c.pages, len(rules))
    ]
    for name, number in names:
        if name in _OWN:
            rules[number, 0] = _SAME
    return rules
