"""The output file: finished records survive an interruption; the file itself appears only when complete.

Records are appended to OUT.partial as they come. Its first line says which run it belongs to, so that it is
never continued with another input, plan or checkpoint. At the end OUT is written in input order and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from moeplan.runtime_min.batch_file import record_line
from moeplan.runtime_min.errors import RunError, replaced, written

SYNC_S = 2.0  # at most this much finished work is lost with the machine; none with the process
GOES_ON = "the same command goes on from what is done"


def partial_path(output: Path) -> Path:
    """Where the finished records of a run lie until it is complete."""
    return output.with_name(output.name + ".partial")


class Results:
    """Collects the records of one run; `done` are the input lines that have theirs.

    Every method raises RunError where the file cannot be written. What lies on disk stays good then: the
    next run cuts a torn record off and goes on behind the last whole one.
    """

    def __init__(self, output: Path, run: str) -> None:
        self._output = output
        self._partial = partial_path(output)
        self._places: dict[int, int] = {}  # input line -> byte of its record in the partial file
        self._file = self._open()  # unbuffered: nothing is left to write when a write has failed
        try:
            self._end = self._resume(run)
        except RunError:
            self.close()
            raise
        self._synced_at = time.monotonic()

    @property
    def done(self) -> set[int]:
        return set(self._places)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record and hand it to the system at once."""
        with written(self._partial):
            at = self._append(_encode(record))
            if time.monotonic() - self._synced_at > SYNC_S:
                os.fsync(self._file.fileno())
                self._synced_at = time.monotonic()
        self._places[record_line(record)] = at

    def finish(self) -> None:
        """Write the records in input order under the final name; the partial file goes."""
        with written(self._output):
            with replaced(self._output) as out, self._partial.open("rb") as records:
                for line in sorted(self._places):
                    records.seek(self._places[line])
                    out.write(records.readline())
            _sync_folder(self._output.parent)  # the new name is on disk before the old one goes
            self._partial.unlink()
        self.close()

    def close(self) -> None:
        """Bring what is written to the disk; closing again does nothing."""
        with suppress(OSError):  # a failing disk was reported by the write that met it
            if not self._file.closed:
                os.fsync(self._file.fileno())
        self._file.close()

    def _append(self, data: bytes) -> int:
        """Write `data` at the end, whole; return the byte where it begins."""
        at, left = self._end, memoryview(data)
        while left:
            count = os.pwrite(self._file.fileno(), left, self._end)
            self._end += count
            left = left[count:]
        return at

    def _open(self) -> BinaryIO:
        with written(self._partial):
            fd = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o666)
        file = os.fdopen(fd, "r+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise RunError(f"{self._partial}: is being written by another run") from None
        return file

    def _resume(self, run: str) -> int:
        """Begin the partial file, or find its records and cut off what is torn; return its end."""
        header = _encode({"moeplan_partial": 1, "run": run})
        with written(self._partial):
            with self._partial.open("rb") as file:
                first = file.readline()
                if first.endswith(b"\n") and first != header:
                    raise RunError(
                        f"{self._partial}: belongs to another input, plan or checkpoint",
                        "delete it, or choose another output",
                    )
                self._end = self._index(file) if first == header else 0
            self._file.truncate(self._end)
            if self._end == 0:  # new, or torn within its first line
                self._append(header)
                _sync_folder(self._output.parent)
        return self._end

    def _index(self, file: BinaryIO) -> int:
        """Note where each complete record is; return the byte behind the last."""
        while True:
            at = file.tell()
            line = file.readline()
            try:
                number = record_line(json.loads(line)) if line.endswith(b"\n") else None
            except (ValueError, KeyError, TypeError, AttributeError):
                number = None
            if number is None:
                return at
            self._places[number] = at


def _sync_folder(path: Path) -> None:
    """Bring the names of a folder to the disk, where its file system knows how."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(folder)
    finally:
        os.close(folder)


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
