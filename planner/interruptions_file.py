"""interruptions.csv: how often spot machines were interrupted in the last month, in the clouds' own bands.

Columns cloud,region,instance,interruption; lines that begin with # are comments. A band is `<5%`, `5-10%`,
`>20%`, or a single share such as `12%`. AWS publishes such bands in its Spot Instance Advisor.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection
from pathlib import Path

from moeplan.planner.catalog.offers import CLOUDS
from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.spec import Cloud
from moeplan.planner.ir.spot import Interruption
from moeplan.planner.request_files import read_input
from moeplan.planner.suggest import nearest

_COLUMNS = ["cloud", "region", "instance", "interruption"]
_BAND = re.compile(r"(<|>)?\s*(\d{1,3}(?:\.\d+)?)\s*(?:%?\s*-\s*(\d{1,3}(?:\.\d+)?))?\s*%")
_MOST_PROBLEMS = 5


def read_interruptions(
    path: Path, span: Span, offers: Collection[tuple[Cloud, str, str]]
) -> tuple[Interruption, ...]:
    """The rows of a file that the spec names at `span`, sorted. Raises CompileError with every bad row.

    `offers` are the (cloud, region, machine) that the catalog sells; rows of others are problems.
    """
    lines = read_input(path, span, "interruptions file").splitlines()
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    problems: list[Diagnostic] = []
    found: dict[tuple[str, str, str], Interruption] = {}
    if not numbered or [c.strip() for c in numbered[0][1].split(",")] != _COLUMNS:
        place = Span(str(path), numbered[0][0] if numbered else 1, 1)
        raise CompileError(_problem(place, "wrong columns", f"the header is {','.join(_COLUMNS)}"))
    for n, line in numbered[1:]:
        row = _row(next(csv.reader([line])), offers)
        if isinstance(row, tuple):
            problems.append(_problem(Span(str(path), n, 1), *row))
        elif found.setdefault((row.cloud, row.region, row.machine), row) is not row:
            problems.append(_problem(Span(str(path), n, 1), "a second row of this machine", "keep one"))
    if problems:
        raise CompileError(*problems[:_MOST_PROBLEMS])
    return tuple(found[key] for key in sorted(found))


def _problem(place: Span, message: str, hint: str) -> Diagnostic:
    return Diagnostic(code="bad-interruptions", span=place, message=message, hint=hint)


def _row(cells: list[str], offers: Collection[tuple[Cloud, str, str]]) -> Interruption | tuple[str, str]:
    """The row, or what is wrong with it and a hint."""
    if len(cells) != len(_COLUMNS):
        return f"{len(cells)} columns, expected {len(_COLUMNS)}", ""
    cloud, region, machine, text = (cell.strip() for cell in cells)
    if cloud not in CLOUDS or (CLOUDS[cloud], region, machine) not in offers:
        known = {f"{c} {r} {m}" for c, r, m in offers}
        what = f"the catalog has no offer of {machine[:40]!r} in {cloud[:10]} {region[:40]}"
        return what, nearest(f"{cloud} {region} {machine}", known, "`moeplan catalog offers` lists them")
    band = _band(text)
    if band is None:
        return f"{text[:40]!r} is no band", "for example <5%, 5-10%, >20% or 12%"
    return Interruption(cloud=CLOUDS[cloud], region=region, machine=machine, low=band[0], high=band[1])


def _band(text: str) -> tuple[float, float] | None:
    match = _BAND.fullmatch(text)
    if match is None:
        return None
    sign, first, second = match.groups()
    low = high = float(first) / 100
    if second:
        high = float(second) / 100
    low, high = (0.0, high) if sign == "<" else (low, 1.0) if sign == ">" else (low, high)
    return (low, high) if low <= high <= 1.0 and not (sign and second) else None
