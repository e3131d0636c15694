"""What a page of a report consists of: sections with text, charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeplan.codegen.plots import Chart


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text under a header; `chosen` is the number of the row that is the plan's, -1 for none."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    chosen: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of a report. `wide` charts take the whole width and scroll on a telephone."""

    title: str
    text: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    wide: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A figure that matters most."""

    label: str
    value: str
    note: str = ""
