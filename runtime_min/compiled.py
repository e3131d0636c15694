"""What is compiled or found out once for a user and a machine, and kept for the next run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def user_cache() -> Path:
    """The folder for it, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "moeplan")


@contextmanager
def compiled_apart(digest: str) -> Iterator[None]:
    """Numba keeps what it compiles meanwhile in the user's cache, by the schedule's digest.

    Beside schedule.py it would take any compiled file of the same date for its own.
    """
    try:
        import numba
    except ImportError:
        yield
        return
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(user_cache() / digest)
    try:
        os.makedirs(config.CACHE_DIR, mode=0o700, exist_ok=True)
    except OSError:  # nothing is kept
        config.CACHE_DIR = tempfile.mkdtemp(prefix="moeplan-")
    try:
        yield
    finally:
        config.CACHE_DIR = before
