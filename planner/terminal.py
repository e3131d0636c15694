"""The terminal: a line on standard error that says what is being done; nothing where that is a file."""

from __future__ import annotations

import os
import shutil
import sys
import time
from types import TracebackType

_CLEAR_LINE = "\r\x1b[K"
_PATIENCE_S = 0.5  # what is done sooner needs no announcement


class Status:
    """Shows the last `show` on standard error while it is entered, if that is a terminal."""

    def __init__(self) -> None:
        self.visible = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._since = time.monotonic()

    def show(self, what: str) -> None:
        """Replace the line, once more than half a second has passed."""
        if self.visible and time.monotonic() - self._since > _PATIENCE_S:
            width = shutil.get_terminal_size().columns
            sys.stderr.write(f"{_CLEAR_LINE}{f'… {what}'[: width - 1]}")
            sys.stderr.flush()

    def __enter__(self) -> Status:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.visible:
            sys.stderr.write(_CLEAR_LINE)
            sys.stderr.flush()


def styled() -> bool:
    """Whether standard output is a terminal that takes colours; https://no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
