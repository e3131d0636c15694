"""What every lane did when, in Chrome's trace event format: Perfetto and chrome://tracing open it."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from moeplan.runtime_min.errors import written

MOST_EVENTS = 1_000_000  # about 150 MB; later ones are counted only


class Trace:
    """Writes an event per block that a lane executes, one track per thread of a lane.

    Events go to the file as they come; memory holds none. On an accelerator the blocks of lanes with a stream
    show when they were enqueued, not when they ran.
    """

    def __init__(self, path: Path, most: int = MOST_EVENTS) -> None:
        self._path, self._most = path, most
        self._count = 0
        self._tracks: dict[tuple[str, int], int] = {}  # lane, thread -> track
        with written(path):
            self._file = path.open("w", encoding="utf-8")
            self._file.write("[")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Complete the file, also of an interrupted run."""
        left_out = max(0, self._count - self._most)
        note = f"{left_out} later events left out" if left_out else "complete"
        self._write({"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "runtime_min"}})
        self._write({"ph": "M", "name": "process_labels", "pid": 0, "args": {"labels": note}}, "]\n")
        with written(self._path):
            self._file.close()

    def block(
        self, lane: str, op: str, row: Sequence[int], nbytes: int, start_s: float, end_s: float
    ) -> None:
        """Write the event of one block of `row`: op, lane, layer, item, slot; times of time.perf_counter."""
        self._count += 1
        if self._count > self._most:
            return
        arguments = {"layer": int(row[2]), "item": int(row[3]), "slot": int(row[4])}
        event = {"ph": "X", "name": op, "cat": lane, "pid": 0, "tid": self._track(lane)}
        times = {"ts": round(start_s * 1e6, 3), "dur": round((end_s - start_s) * 1e6, 3)}
        self._write({**event, **times, "args": arguments | ({"bytes": nbytes} if nbytes else {})})

    def _track(self, lane: str) -> int:
        key = lane, threading.get_ident()
        if key not in self._tracks:
            self._tracks[key] = len(self._tracks)
            name = {"ph": "M", "name": "thread_name", "pid": 0, "tid": self._tracks[key]}
            self._write({**name, "args": {"name": lane}})
        return self._tracks[key]

    def _write(self, event: dict[str, object], end: str = ",\n") -> None:
        with written(self._path):
            self._file.write(json.dumps(event) + end)
