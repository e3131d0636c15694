"""The terminal: a line on standard error that says what is being done; nothing where that is a file."""

from __future__ import annotations

import os
import re
import shutil
import sys
from types import TracebackType

_CLEAR_LINE, _BOLD, _FAINT, _PLAIN = "\r\x1b[K", "\x1b[1m", "\x1b[2m", "\x1b[0m"
_LABEL = re.compile(r"^  (\w[\w ]*?)(  +)(?=\S)", flags=re.MULTILINE)


class Status:
    """Shows the last `show` on standard error while it is entered, if that is a terminal."""

    def __init__(self) -> None:
        self.visible = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, what: str) -> None:
        """Replace the line."""
        if self.visible:
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


def styled(text: str) -> str:
    """A summary with its first line bold and its labels faint, on a terminal that takes colours.

    NO_COLOR is respected, see https://no-color.org.
    """
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    first, newline, rest = text.partition("\n")
    faint = _LABEL.sub(rf"  {_FAINT}\1{_PLAIN}\2", rest)
    return f"{_BOLD}{first}{_PLAIN}{newline}{faint}"
