"""SIGINT and SIGTERM end a run in order: what is complete is on disk, the lanes stop between two blocks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """The signal that came, 0 before one does; raises KeyboardInterrupt out of whatever it came into.

    Code that it came into may turn the exception into an error of its own or swallow it. So whoever catches
    an error asks `number` first, and a long loop calls `check`.
    """

    def __init__(self) -> None:
        self.number = 0

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self.number:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Later SIGTERMs are ignored: some senders repeat it. A second SIGINT ends whatever still goes on."""
        self.number = number
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Listen to SIGINT and SIGTERM; only in the main thread, as signals have it."""
    interruption = Interruption()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interruption._handle) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
