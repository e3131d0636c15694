"""Units: exact where exact is possible, and nothing accepted that does not match."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner import units


@pytest.mark.parametrize(
    ("text", "table", "value"),
    [
        ("24 GiB", units.BYTES, 24 * 2**30),
        ("500MB", units.BYTES, 500_000_000),
        ("1.5 TiB", units.BYTES, 1.5 * 2**40),
        ("120ms", units.SECONDS, 0.12),
        ("1.5 min", units.SECONDS, 90.0),
        ("8h", units.SECONDS, 28800.0),
        ("500/min", units.PER_SECOND, 500 / 60),
        ("3600/h", units.PER_SECOND, 1.0),
        ("$20/h", units.USD_PER_HOUR, 20.0),
        ("$ 0.5/h", units.USD_PER_HOUR, 0.5),
        ("20 USD/h", units.USD_PER_HOUR, 20.0),
        ("99.5 %", units.SHARE, 0.995),
        ("512 tokens", units.TOKENS, 512),
    ],
)
def test_units(text: str, table: units.Units, value: float) -> None:
    assert units.parse(text, table) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "text", ["", "24", "GiB", "24 gib", "-1 GiB", "1e3 GiB", "24  GiB", "24 GiB ", "٣ GiB"]
)
def test_other_text_is_refused(text: str) -> None:
    assert units.parse(text, units.BYTES) is None


@given(st.integers(0, 10**15 - 1), st.sampled_from(sorted(units.BYTES)))
def test_whole_bytes_are_exact(number: int, unit: str) -> None:
    assert units.parse(f"{number} {unit}", units.BYTES) == number * int(units.BYTES[unit])


@given(st.text(max_size=20), st.sampled_from([units.BYTES, units.SECONDS, units.USD_PER_HOUR, units.SHARE]))
def test_any_text_is_a_number_or_nothing(text: str, table: units.Units) -> None:
    value = units.parse(text, table)
    assert value is None or value >= 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (512, "512 B"), (93.4e9, "87.0 GiB"), (2**40, "1.0 TiB"), (2**30 - 1, "1.0 GiB")],
)
def test_format_bytes(value: float, text: str) -> None:
    assert units.format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5e-6, "5 µs"),
        (0.12, "120 ms"),
        (90.0, "1.5 min"),
        (86400 * 2, "2 d"),
        (0.9999, "1 s"),
        (3e8, "3,470 d"),
    ],
)
def test_format_duration(value: float, text: str) -> None:
    assert units.format_duration(value) == text
