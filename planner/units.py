"""Text <-> base units: bytes, seconds, requests per second, USD per hour, fractions, tokens.

Nothing else in moeplan converts units. A `Quantity` reads text; the `format_` functions write it for people.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

_DECIMAL = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
_WHOLE = r"[0-9]{1,15}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """Amounts of one kind written as a number and a unit, such as `24 GiB` or `$20/h`.

    `units` gives the size of each unit in base units. A unit is what follows the number; where the number
    has something before it, the two are joined by `_`: `$_/h`. `bare` says that a number alone is in base
    units. `whole` amounts are integers; a part of a byte is dropped.
    """

    what: str
    units: Mapping[str, Fraction]
    examples: tuple[str, ...]
    bare: bool = False
    whole: bool = False
    fractions: bool = True

    def parse(self, value: str | int | float) -> int | float:
        """The amount in base units; ValueError if `value` is not one, in words for the user."""
        amount = self._text(value) if isinstance(value, str) else self._number(value)
        if amount is None:
            raise ValueError(f"{value!r} is not {self.what}, such as {' or '.join(self.examples)}")
        return math.floor(amount) if self.whole else float(amount)

    def _text(self, text: str) -> Fraction | None:
        for unit, size in self.units.items():
            before, after = _sides(unit)
            if text.startswith(before) and text.endswith(after):
                number = text[len(before) : len(text) - len(after)].removesuffix(" ")
                if re.fullmatch(self._digits, number):
                    return Fraction(number) * size
        return None

    def _number(self, value: int | float) -> Fraction | None:
        if not self.bare or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            return None
        return Fraction(value) if not self.whole or value == int(value) else None

    @property
    def _digits(self) -> str:
        return _DECIMAL if self.fractions else _WHOLE

    @property
    def pattern(self) -> str:
        """A regular expression, for JSON Schema too, that finds exactly the text `parse` takes."""
        endings: dict[str, list[str]] = {}
        for unit in self.units:
            before, after = _sides(unit)
            endings.setdefault(before, []).append(re.escape(after))
        forms = [
            f"{re.escape(before)}{self._digits} ?(?:{'|'.join(after)})" for before, after in endings.items()
        ]
        return f"^(?:{'|'.join(forms)})$"


def _sides(unit: str) -> tuple[str, str]:
    """What stands before and after the number."""
    before, _, after = unit.rpartition("_")
    return before, after


_BINARY = {f"{prefix}iB": Fraction(1024**power) for power, prefix in enumerate("KMGTP", start=1)}
_METRIC = {f"{prefix}B": Fraction(1000**power) for power, prefix in enumerate("kMGTP", start=1)}
_SECONDS = {
    "µs": Fraction(1, 10**6),
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}

BYTES = Quantity(
    what="an amount of memory",
    units={"B": Fraction(1), **_BINARY, **_METRIC},
    examples=("24 GiB", "500 MB"),
    bare=True,
    whole=True,
)
DURATION = Quantity(what="a duration", units=_SECONDS, examples=("120ms", "2s", "1.5 min", "8h", "2d"))
RATE = Quantity(
    what="a rate",
    units={f"/{unit}": 1 / _SECONDS[unit] for unit in ("s", "min", "h", "d")},
    examples=("8/s", "500/min", "3600/h"),
)
MONEY = Quantity(
    what="an hourly price",
    units={"$_/h": Fraction(1), "USD/h": Fraction(1)},
    examples=("$20/h", "20 USD/h"),
)
FRACTION = Quantity(what="a share", units={"%": Fraction(1, 100)}, examples=("99%", "0.99"), bare=True)
TOKENS = Quantity(
    what="a number of tokens",
    units={"tokens": Fraction(1), "token": Fraction(1)},
    examples=("512", "512 tokens"),
    bare=True,
    whole=True,
    fractions=False,
)


def format_bytes(value: float) -> str:
    """`16.0 GiB`: one decimal, in the largest binary unit of which there is at least one."""
    for unit, size in reversed(_BINARY.items()):
        if round(value / int(size), 1) >= 1:
            return f"{value / int(size):.1f} {unit}"
    return f"{value:.0f} B"


def format_duration(seconds: float) -> str:
    """`1.5 min`: three digits, in the largest unit of which there is at least one."""
    for unit in ("d", "h", "min", "s", "ms"):
        amount = seconds / float(_SECONDS[unit])
        if float(f"{amount:.3g}") >= 1:
            return f"{_digits(amount)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def format_rate(per_second: float) -> str:
    """`8/s`: three digits, per second unless that is less than one."""
    for unit in ("s", "min", "h"):
        amount = per_second * float(_SECONDS[unit])
        if float(f"{amount:.3g}") >= 1:
            return f"{_digits(amount)}/{unit}"
    return f"{_digits(per_second * 86400)}/d"


def format_money(usd_per_hour: float) -> str:
    """`$0.53/h`: to the cent."""
    return f"${usd_per_hour:.2f}/h"


def format_fraction(fraction: float) -> str:
    """`99.5%`: as many digits as a promise such as 99.999% needs."""
    text = f"{fraction * 100:.4f}"
    return f"{text.rstrip('0').rstrip('.')}%"


def format_tokens(tokens: float) -> str:
    """`512 tokens`."""
    return "1 token" if tokens == 1 else f"{tokens:.0f} tokens"


def _digits(amount: float) -> str:
    """Three significant digits, never with an exponent."""
    if amount >= 999.5:
        return f"{amount:.0f}"
    text = f"{amount:.3g}"
    return f"{amount:.6f}".rstrip("0").rstrip(".") if "e" in text else text
