"""Text <-> base units: bytes, seconds, requests per second, USD per hour, shares. The only conversions."""

from __future__ import annotations

import re
from collections.abc import Mapping

NUMBER = r"[0-9]{1,15}(\.[0-9]{1,15})?"

BYTES: Mapping[str, float] = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
SECONDS: Mapping[str, float] = {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
PER_SECOND: Mapping[str, float] = {"/s": 1.0, "/min": 1 / 60, "/h": 1 / 3600}
USD_PER_HOUR: Mapping[str, float] = {"USD/h": 1.0, "$/h": 1.0}
SHARE: Mapping[str, float] = {"%": 0.01}
TOKENS: Mapping[str, float] = {"tokens": 1, "token": 1}


def pattern(units: Mapping[str, float]) -> str:
    """The regular expression of a number and one of `units`, as the spec's JSON Schema has it.

    Money may also have its sign in front: "$20/h".
    """
    names = "|".join(re.escape(unit) for unit in units)
    suffixed = f"{NUMBER} ?({names})"
    if units is USD_PER_HOUR:
        return rf"^({suffixed}|\$ ?{NUMBER}/h)$"
    return f"^{suffixed}$"


def parse(text: str, units: Mapping[str, float]) -> float | None:
    """`text` in base units; None where it does not match `pattern(units)`."""
    if not re.fullmatch(pattern(units), text):
        return None
    if text.startswith("$"):
        text = text.removeprefix("$").removesuffix("/h").strip() + "$/h"
    found = re.match(NUMBER, text)
    assert found is not None  # the pattern starts with a number
    number, scale = found.group(), units[text[found.end() :].strip()]
    # Exact where both are whole: 3 TiB must not go through a float.
    return int(number) * scale if number.isdigit() else float(number) * scale


def format_bytes(value: float) -> str:
    """Bytes for people: one decimal, binary units."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if value >= BYTES[unit]:
            return f"{value / BYTES[unit]:.1f} {unit}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """A duration for people: three digits, the largest unit that leaves at least one."""
    for unit in ("d", "h", "min", "s", "ms"):
        if seconds >= SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
