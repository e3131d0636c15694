"""Amounts as text and in base units: examples, refusals, and both directions against each other."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner import units
from moeplan.planner.units import BYTES, DURATION, FRACTION, MONEY, RATE, TOKENS, Quantity

QUANTITIES = (BYTES, DURATION, RATE, MONEY, FRACTION, TOKENS)


@pytest.mark.parametrize(
    ("quantity", "text", "amount"),
    [
        (BYTES, "24 GiB", 24 * 2**30),
        (BYTES, "24GiB", 24 * 2**30),
        (BYTES, "500 MB", 500_000_000),
        (BYTES, "1.5 KiB", 1536),
        (BYTES, "0.1 GiB", 107374182),  # 107374182.4: a part of a byte is dropped
        (BYTES, "8191.999999999999 TiB", 9007199254740990),  # floats lose the last byte here
        (BYTES, 25769803776, 24 * 2**30),
        (DURATION, "120ms", 0.12),
        (DURATION, "2s", 2.0),
        (DURATION, "1.5 min", 90.0),
        (DURATION, "8h", 28800.0),
        (DURATION, "2d", 172800.0),
        (DURATION, "5 µs", 5e-6),
        (DURATION, "5us", 5e-6),
        (RATE, "8/s", 8.0),
        (RATE, "500/min", 500 / 60),
        (RATE, "3600/h", 1.0),
        (RATE, "86400 /d", 1.0),
        (MONEY, "$20/h", 20.0),
        (MONEY, "$0.526/h", 0.526),
        (MONEY, "20 USD/h", 20.0),
        (FRACTION, "99%", 0.99),
        (FRACTION, "99.5 %", 0.995),
        (FRACTION, "99.999%", 0.99999),
        (FRACTION, 0.99, 0.99),
        (FRACTION, 1, 1.0),
        (TOKENS, "512 tokens", 512),
        (TOKENS, "1 token", 1),
        (TOKENS, 512, 512),
        (TOKENS, 512.0, 512),
    ],
)
def test_amounts(quantity: Quantity, text: str | float, amount: float) -> None:
    parsed = quantity.parse(text)
    assert parsed == amount
    assert isinstance(parsed, int) == quantity.whole


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (BYTES, "24"),
        (BYTES, "24 gib"),
        (BYTES, "24 Gb"),
        (BYTES, "-1 GiB"),
        (BYTES, "24  GiB"),
        (BYTES, " 24 GiB"),
        (BYTES, "24 GiB\n"),
        (BYTES, "1e3 GiB"),
        (BYTES, "1_000 MB"),
        (BYTES, "٣ GiB"),  # digits, but not ours
        (BYTES, "GiB"),
        (BYTES, ""),
        (BYTES, f"{'9' * 16} B"),
        (BYTES, 1.5),
        (BYTES, -1),
        (BYTES, True),
        (BYTES, float("inf")),
        (BYTES, float("nan")),
        (DURATION, 8),
        (DURATION, "8 hours"),
        (DURATION, "8 m"),
        (DURATION, "1:30"),
        (RATE, "8"),
        (RATE, 8),
        (RATE, "8 per second"),
        (MONEY, "$20"),
        (MONEY, "20$/h"),
        (MONEY, "$20 USD/h"),
        (MONEY, 20),
        (FRACTION, "99"),
        (FRACTION, "0.99"),
        (TOKENS, "512"),
        (TOKENS, "1.5 tokens"),
        (TOKENS, 1.5),
    ],
)
def test_refused(quantity: Quantity, text: str | float) -> None:
    """What is refused is named, with examples of what is not."""
    with pytest.raises(ValueError, match=f"is not {quantity.what}, such as ") as error:
        quantity.parse(text)
    assert repr(text) in str(error.value)
    assert quantity.examples[0] in str(error.value)


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda quantity: quantity.what)
def test_examples_are_amounts(quantity: Quantity) -> None:
    for text in quantity.examples:
        assert quantity.parse(float(text) if quantity.bare and text[-1].isdigit() else text) > 0


@pytest.mark.parametrize("quantity", QUANTITIES, ids=lambda quantity: quantity.what)
def test_pattern_finds_what_is_parsed(quantity: Quantity) -> None:
    @given(st.from_regex(quantity.pattern, fullmatch=True))
    @settings(max_examples=40, deadline=None)
    def matching_text_is_parsed(text: str) -> None:
        assert quantity.parse(text) >= 0

    @given(st.from_regex(r"\A\$?[0-9._-]{0,4} {0,2}[a-zA-Z/%µ]{0,6}\Z"))
    @settings(max_examples=100, deadline=None)
    def other_text_is_not(text: str) -> None:
        if not re.search(quantity.pattern, text):
            with pytest.raises(ValueError, match="is not"):
                quantity.parse(text)

    matching_text_is_parsed()
    other_text_is_not()


@given(st.integers(0, 2**63))
@settings(max_examples=200, deadline=None)
def test_bytes_are_exact(amount: int) -> None:
    """No float in between: any number of bytes survives."""
    assert BYTES.parse(amount) == amount
    if amount < 10**15:
        assert BYTES.parse(f"{amount} B") == amount
        assert BYTES.parse(f"{amount} KiB") == amount * 1024


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.format_bytes(0), "0 B"),
        (units.format_bytes(1023), "1.0 KiB"),
        (units.format_bytes(900), "900 B"),
        (units.format_bytes(24 * 2**30), "24.0 GiB"),
        (units.format_bytes(2**30 - 1), "1.0 GiB"),
        (units.format_duration(0), "0 µs"),
        (units.format_duration(0.12), "120 ms"),
        (units.format_duration(0.9999), "1 s"),
        (units.format_duration(59.99), "1 min"),
        (units.format_duration(90), "1.5 min"),
        (units.format_duration(28800), "8 h"),
        (units.format_duration(1234 * 86400), "1234 d"),
        (units.format_duration(3e-11), "0.00003 µs"),
        (units.format_rate(8), "8/s"),
        (units.format_rate(1e6), "1000000/s"),
        (units.format_rate(0.5), "30/min"),
        (units.format_rate(1 / 86400), "1/d"),
        (units.format_money(20), "$20.00/h"),
        (units.format_fraction(0.99999), "99.999%"),
        (units.format_fraction(0.7), "70%"),
        (units.format_tokens(1), "1 token"),
        (units.format_tokens(512), "512 tokens"),
    ],
)
def test_formatted(text: str, expected: str) -> None:
    assert text == expected


@given(st.floats(1e-5, 1e8))
@settings(max_examples=300, deadline=None)
def test_formatted_amounts_parse_back(amount: float) -> None:
    """What is written for people is read as the same amount, to the digits written."""
    assert DURATION.parse(units.format_duration(amount)) == pytest.approx(amount, rel=5.1e-3)
    assert RATE.parse(units.format_rate(amount)) == pytest.approx(amount, rel=5.1e-3)
    assert MONEY.parse(units.format_money(amount)) == pytest.approx(amount, abs=5.1e-3)
    assert FRACTION.parse(units.format_fraction(amount)) == pytest.approx(amount, abs=5.1e-7)


@given(st.integers(1, 2**59))
@settings(max_examples=200, deadline=None)
def test_formatted_whole_amounts_parse_back(amount: int) -> None:
    assert BYTES.parse(units.format_bytes(amount)) == pytest.approx(amount, rel=0.051)
    if amount < 10**15:
        assert TOKENS.parse(units.format_tokens(amount)) == amount
