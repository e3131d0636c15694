"""What stops a run: one sentence that names the file, and what to do next."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunError(Exception):
    """The run cannot start or go on. The message reads `file: what is wrong`; `hint` says what helps."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn what the system says of a write to `path` into a RunError."""
    try:
        yield
    except OSError as error:
        hint = "make room there" if error.errno in _FULL else ""
        raise RunError(f"{path}: cannot be written: {error.strerror}", hint) from None


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole and on the disk; raises RunError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with written(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
