"""What stops a run: one sentence that names the file, and what to do next."""

from __future__ import annotations


class RunError(Exception):
    """The run cannot start or go on. The message reads `file: what is wrong`; `hint` says what helps."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
