"""Schedule programs: the loops that issue a pass's tasks, and the order that their reads and writes imply.

The same text is the body of every emitted schedule.py, so what is proved and simulated here is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moeplan.planner.ir.schedule import Buffer, Schedule, ScheduleKind, Task
from moeplan.planner.programs import offload, order, stream

Table = NDArray[np.int64]
PROGRAMS: dict[ScheduleKind, ModuleType] = {"stream": stream, "offload": offload}


class Step(NamedTuple):
    """One pass: its micro-batches of decode, its micro-batches or pieces of prefill, and how many
    micro-batches decode in the pass after it (0: not known to come)."""

    decode: int
    prefill: int
    following: int


@dataclass(frozen=True)
class Issued:
    """Consecutive passes: rows as `order` describes them, touches as (row, buffer, how), each pass's first
    row."""

    rows: Table
    touches: Table
    starts: tuple[int, ...]


def lanes(schedule: Schedule) -> tuple[str, ...]:
    """The lanes, in the order of their numbers."""
    names: tuple[str, ...] = PROGRAMS[schedule.kind].LANES
    return names


def ops(schedule: Schedule) -> tuple[str, ...]:
    """The operations, in the order of their numbers."""
    names: tuple[str, ...] = PROGRAMS[schedule.kind].OPS
    return names


def issue(schedule: Schedule, steps: Sequence[Step]) -> Issued:
    """Issue consecutive passes. Buffers carry over from pass to pass."""
    program, constants = PROGRAMS[schedule.kind], schedule.constants
    record, clock = (
        order.as_record(constants),
        order.make_clock(len(program.LANES), program.buffers(constants)),
    )
    rows, touches, starts = [], [], [0]
    for step in steps:
        log = program.room(constants, step.decode, step.prefill)
        program.program(record, log, order.passes_of(clock), *step)
        rows.append(order.make_rows(log, len(program.LANES)))
        order.order(clock, log, rows[-1], constants.lean)
        touches.append(_touches(log) + np.array([starts[-1], 0, 0]))
        starts.append(starts[-1] + len(rows[-1]))
    return Issued(np.concatenate(rows), np.concatenate(touches), tuple(starts[:-1]))


def _touches(log: Table) -> Table:
    """Row, buffer and how of every touch in a log."""
    lines = log[1 : 1 + log[0, 0]]
    rows = np.cumsum(lines[:, 0] >= 0) - 1
    touch = lines[:, 0] < 0
    return np.column_stack([rows[touch], lines[touch, 1:3]])


def tasks(schedule: Schedule, issued: Issued) -> tuple[Task, ...]:
    """The rows as records, with the names of what they touch."""
    names: dict[int, Buffer] = {}

    def named(touched: list[tuple[int, int]], wanted: int) -> tuple[Buffer, ...]:
        found = (buffer for buffer, how in touched if how == wanted)
        return tuple(names.setdefault(buffer, buffer_name(schedule, buffer)) for buffer in found)

    lane_names, op_names = lanes(schedule), ops(schedule)
    return tuple(
        Task(
            op=op_names[op],
            lane=lane_names[lane],
            layer=layer,
            item=item,
            slot=slot,
            reads=named(touched, order.HOW.read),
            writes=named(touched, order.HOW.write),
        )
        for (op, lane, layer, item, slot), touched in zip(
            issued.rows[:, : order.WAIT].tolist(), _touched(issued), strict=True
        )
    )


def buffer_name(schedule: Schedule, number: int) -> Buffer:
    """What buffer `number` is."""
    for name, count in _groups(schedule.constants):
        if number < count:
            return (name, number)
        number -= count
    raise ValueError(f"no such buffer: {number}")


def _groups(constants: Any) -> list[tuple[str, int]]:
    """The buffers in the order of their numbers: (name, how many)."""
    if not hasattr(constants, "micro_batches"):
        return [("slot", constants.slots), *((name, 1) for name in stream.STATE._fields)]
    return [
        ("pinned", constants.slots),
        ("weights", 2 * constants.pages),
        *((name, constants.micro_batches) for name in offload.MINE._fields),
        *((f"piece_{name}", constants.pieces) for name in offload.PIECE._fields),
        *((name, 2) for name in offload.PAIR._fields),
    ]


def task_graph(schedule: Schedule, issued: Issued) -> nx.DiGraph[int]:
    """The tasks, by row, and an edge for every order they need: each lane's own, every read after the write
    it reads, every write after the write and the reads before it, and all after a fence."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(issued.rows)))
    newest: dict[int, int] = {}  # per lane
    fenced: tuple[int, ...] = ()
    written: dict[int, int] = {}
    read: dict[int, list[int]] = {}
    for row, touched in enumerate(_touched(issued)):
        lane = int(issued.rows[row, 1])
        before = [*fenced, newest.get(lane, row)]
        for buffer, how in touched:
            if how != order.HOW.fence:
                before.append(written.get(buffer, row))
            if how == order.HOW.write:
                before += read.pop(buffer, [])
        graph.add_edges_from((other, row) for other in before if other != row)
        newest[lane] = row
        for buffer, how in touched:
            if how == order.HOW.write:
                written[buffer] = row
            elif how == order.HOW.read:
                read.setdefault(buffer, []).append(row)
            else:
                fenced = tuple(newest.values())
    return graph


def _touched(issued: Issued) -> list[list[tuple[int, int]]]:
    """Per row, (buffer, how) of its touches."""
    touched: list[list[tuple[int, int]]] = [[] for _ in issued.rows]
    for row, buffer, how in issued.touches.tolist():
        touched[row].append((buffer, how))
    return touched
