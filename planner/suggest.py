"""Did-you-mean hints."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest_word(word: str, known: Iterable[str]) -> str:
    """The known word closest to `word`; empty where none is close."""
    by_lower = {name.lower(): name for name in sorted(known)}
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else ""


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    """A hint naming the known word closest to `word`, or `otherwise` where none is close."""
    close = nearest_word(word, known)
    return f"did you mean {close!r}?" if close else otherwise
