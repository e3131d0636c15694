"""The output file: finished records survive an interruption; the file itself appears only when complete.

Records are appended to OUT.partial as they come. Its first line says which run it belongs to, so that it is
never continued with another input, plan or checkpoint. At the end OUT is written in input order and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from moeplan.runtime_min.batch_file import record_line
from moeplan.runtime_min.errors import RunError

SYNC_S = 2.0  # at most this much finished work is lost with the machine; none with the process


class Results:
    """Collects the records of one run; `done` are the input lines that have theirs."""

    def __init__(self, output: Path, run: str) -> None:
        self._output = output
        self._partial = output.with_name(output.name + ".partial")
        self._places: dict[int, int] = {}  # input line -> byte of its record in the partial file
        self._file = self._resume(run)
        self._synced_at = time.monotonic()

    @property
    def done(self) -> set[int]:
        return set(self._places)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record and hand it to the system at once."""
        self._places[record_line(record)] = self._file.tell()
        self._file.write(_encode(record))
        self._file.flush()
        if time.monotonic() - self._synced_at > SYNC_S:
            os.fsync(self._file.fileno())
            self._synced_at = time.monotonic()

    def finish(self) -> None:
        """Write the records in input order under the final name; the partial file goes."""
        temporary = self._output.with_name(self._output.name + ".tmp")
        with temporary.open("wb") as out:
            for line in sorted(self._places):
                self._file.seek(self._places[line])
                out.write(self._file.readline())
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, self._output)
        self.close()
        self._partial.unlink()

    def close(self) -> None:
        self._file.close()

    def _resume(self, run: str) -> BinaryIO:
        """Open the partial file behind its last complete record, or start it."""
        header = _encode({"moeplan_partial": 1, "run": run})
        try:
            file = self._partial.open("r+b" if self._partial.exists() else "w+b")
        except OSError as error:
            raise RunError(f"{self._partial}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise RunError(f"{self._partial}: is being written by another run") from None
        first = file.readline()
        if first.endswith(b"\n") and first != header:
            file.close()
            raise RunError(
                f"{self._partial}: belongs to another input, plan or checkpoint",
                "delete it, or choose another output",
            )
        if first != header:  # new, or torn within its first line
            file.seek(0)
            file.write(header)
        file.truncate(self._index(file))
        file.seek(0, os.SEEK_END)
        return file

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


def _encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
