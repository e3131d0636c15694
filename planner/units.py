"""Text <-> base units: bytes, seconds, requests per second, USD per hour, shares. The only conversions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

Units = Mapping[str, Fraction]

NUMBER = r"[0-9]{1,15}(\.[0-9]{1,15})?"

BYTES: Units = {
    "B": Fraction(1),
    "kB": Fraction(10**3),
    "KB": Fraction(10**3),
    "MB": Fraction(10**6),
    "GB": Fraction(10**9),
    "TB": Fraction(10**12),
    "KiB": Fraction(2**10),
    "MiB": Fraction(2**20),
    "GiB": Fraction(2**30),
    "TiB": Fraction(2**40),
}
SECONDS: Units = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
PER_SECOND: Units = {"/s": Fraction(1), "/min": Fraction(1, 60), "/h": Fraction(1, 3600)}
USD_PER_HOUR: Units = {"USD/h": Fraction(1), "$/h": Fraction(1)}
SHARE: Units = {"%": Fraction(1, 100)}
TOKENS: Units = {"tokens": Fraction(1), "token": Fraction(1)}


def pattern(units: Units) -> str:
    """The regular expression of a number and one of `units`, as the spec's JSON Schema has it.

    Money may also have its sign in front: "$20/h".
    """
    names = "|".join(re.escape(unit) for unit in units)
    suffixed = f"{NUMBER} ?({names})"
    if units is USD_PER_HOUR:
        return rf"^({suffixed}|\$ ?{NUMBER}/h)$"
    return f"^{suffixed}$"


def parse(text: str, units: Units) -> int | float | None:
    """`text` in base units, an int where that is exact; None where it does not match `pattern(units)`."""
    if not re.fullmatch(pattern(units), text):
        return None
    if text.startswith("$"):
        text = text.removeprefix("$").removesuffix("/h").strip() + "$/h"
    found = re.match(NUMBER, text)
    assert found is not None  # the pattern starts with a number
    value = Fraction(found.group()) * units[text[found.end() :].strip()]
    return int(value) if value.denominator == 1 else float(value)


def format_bytes(value: float) -> str:
    """Bytes for people: one decimal, binary units."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if round(value / float(BYTES[unit]), 1) >= 1:
            return f"{value / float(BYTES[unit]):,.1f} {unit}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """A duration for people: three digits, the largest unit that leaves at least one."""
    for unit in ("d", "h", "min", "s", "ms"):
        if float(f"{seconds / float(SECONDS[unit]):.3g}") >= 1:
            return f"{format_figure(seconds / float(SECONDS[unit]))} {unit}"
    return f"{format_figure(seconds * 1e6)} µs"


def format_figure(value: float) -> str:
    """Three significant digits, thousands separated, never an exponent for large ones."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
