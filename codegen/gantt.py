"""Tasks in time -> an SVG chart: a row for each lane, a bar for each task, a colour for each operation."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from moeplan.codegen.render import render

MOST_BARS = 600  # about 80 kB
# Okabe and Ito, Color Universal Design (2008): told apart with any colour vision. From the ninth operation on
# they are hatched.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_HATCHES = (0, 45, -45)  # degrees; the first eight have none
_PLOT, _TOP, _ROW, _BAR, _LEGEND, _LETTER = 860, 36, 30, 20, 20, 7.5  # pixels
_TICKS = 10  # at most
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One task on lane number `lane`; `label` is what its tooltip says beside operation and time."""

    lane: int
    op: str
    start_s: float
    end_s: float
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What is drawn as one bar: a task by itself, or what tasks of one operation fill of a cell.

    It reaches from `low` to `high` of the lane's height.
    """

    begin_s: float
    end_s: float
    low: float
    high: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """`span_s` from `begin_s` on, the first pixel being `left`. A tick is at every multiple of `digit` times
    10 ** `exponent` of the unit, which has `unit_s` seconds."""

    begin_s: float
    span_s: float
    left: float
    unit: str
    unit_s: float
    digit: int
    exponent: int

    def x(self, at_s: float) -> float:
        return self.left + (at_s - self.begin_s) / self.span_s * _PLOT

    def figure(self, seconds: float, more_digits: int = 0) -> str:
        """`seconds` in the axis's unit, with the digits that its ticks need and some more."""
        return f"{seconds / self.unit_s:.{max(0, more_digits - self.exponent)}f}"


def gantt_svg(title: str, lanes: Sequence[str], bars: Sequence[Bar]) -> str:
    """The chart of `bars` from the first start to the last end, as SVG text; the same input, the same bytes.

    The tasks of a lane must not overlap. Where there are more than MOST_BARS, tasks of a lane that together
    span no more than a cell are drawn as shares of its time, one on the other; the cell is as short as the
    limit allows. Either way the area of an operation's bars is the time it takes.
    """
    axis, numbers, bottom = _axis(lanes, bars), _numbers(bars), _TOP + _ROW * len(lanes)
    pieces = _pieces(bars, axis.span_s)
    by_lane: list[list[_Piece]] = [[] for _ in lanes]
    for piece in pieces:
        by_lane[piece.bars[0].lane].append(piece)
    cells = any(len(piece.bars) > 1 for piece in pieces)
    legend = _legend(numbers, axis.left, bottom + 46)
    return render(
        "report/gantt.svg.j2",
        title=_clean(title),
        left=f"{axis.left:.2f}",
        right=f"{axis.left + _PLOT:.2f}",
        share_x=f"{axis.left + _PLOT + 10:.2f}",
        width=f"{axis.left + _PLOT + 60:.0f}",
        height=legend[-1]["y"] + 24 if legend else bottom + 46,
        top=_TOP,
        bottom=bottom,
        tick_y=bottom + 16,
        unit=axis.unit + "; a bar is as high as the share of its time that the operation fills" * cells,
        unit_y=bottom + 32,
        edge="none" if cells else "#000",
        hatches=[(n, *_hatch(n)) for n in sorted(set(numbers.values())) if n >= len(_COLOURS)],
        ticks=_ticks(axis),
        rows=[_row(n, name, by_lane[n], numbers, axis) for n, name in enumerate(lanes)],
        legend=legend,
    )


def _axis(lanes: Sequence[str], bars: Sequence[Bar]) -> _Axis:
    begin_s = min((bar.start_s for bar in bars), default=0.0)
    span_s = max((bar.end_s for bar in bars), default=0.0) - begin_s or 1.0
    unit, unit_s = ("s", 1.0) if span_s >= 1 else ("ms", 1e-3)
    exponent = math.floor(math.log10(span_s / unit_s / _TICKS))
    step = 10.0**exponent
    digit = next(d for d in (1, 2, 5, 10) if span_s / unit_s <= d * step * _TICKS)
    left = 16 + _LETTER * max((len(name) for name in lanes), default=0)
    if digit == 10:
        digit, exponent = 1, exponent + 1
    return _Axis(
        begin_s=begin_s, span_s=span_s, left=left, unit=unit, unit_s=unit_s, digit=digit, exponent=exponent
    )


def _ticks(axis: _Axis) -> list[tuple[str, str]]:
    """Place and text of each."""
    step_s = axis.digit * 10.0**axis.exponent * axis.unit_s
    first, last = math.ceil(axis.begin_s / step_s), math.floor((axis.begin_s + axis.span_s) / step_s)
    return [(f"{axis.x(n * step_s):.2f}", axis.figure(n * step_s)) for n in range(first, last + 1)]


def _numbers(bars: Sequence[Bar]) -> dict[str, int]:
    """A number for each operation, by lane and first start: those of one lane differ in colour."""
    ordered = sorted(bars, key=lambda bar: (bar.lane, bar.start_s, bar.end_s, bar.op))
    styles = len(_COLOURS) * len(_HATCHES)
    return {op: n % styles for n, op in enumerate(dict.fromkeys(bar.op for bar in ordered))}


def _fill(number: int) -> str:
    return _COLOURS[number] if number < len(_COLOURS) else f"url(#hatch{number})"


def _hatch(number: int) -> tuple[str, int]:
    """Colour and angle."""
    hatch, colour = divmod(number, len(_COLOURS))
    return _COLOURS[colour], _HATCHES[hatch]


def _pieces(bars: Sequence[Bar], span_s: float) -> list[_Piece]:
    """What is drawn, by lane and start: every bar by itself, or in the shortest cells that keep the limit."""
    ordered = sorted(bars, key=lambda bar: (bar.lane, bar.start_s, bar.end_s, bar.op))
    ordered = [bar for bar in ordered if bar.end_s > bar.start_s]
    pieces = [piece for bar in ordered for piece in _stacked([bar])]
    cell_s = span_s / _PLOT / 4
    while len(pieces) > MOST_BARS and cell_s < 2 * span_s:
        pieces = [piece for cell in _cells(ordered, cell_s) for piece in _stacked(cell)]
        cell_s *= 2
    return pieces


def _cells(ordered: Sequence[Bar], cell_s: float) -> Iterator[list[Bar]]:
    """Runs of bars of one lane: each as long as it spans no more than `cell_s`, a longer bar by itself."""
    group: list[Bar] = []
    for bar in ordered:
        if group and (bar.lane != group[0].lane or bar.end_s - group[0].start_s > cell_s):
            yield group
            group = []
        group.append(bar)
    if group:
        yield group


def _stacked(cell: Sequence[Bar]) -> Iterator[_Piece]:
    """Each operation of the cell, as high as its share of the cell's time."""
    begin_s, end_s = cell[0].start_s, cell[-1].end_s
    low = 0.0
    for op in dict.fromkeys(bar.op for bar in cell):
        bars = tuple(bar for bar in cell if bar.op == op)
        high = low + _seconds(bars) / (end_s - begin_s)
        yield _Piece(begin_s=begin_s, end_s=end_s, low=low, high=high, bars=bars)
        low = high


def _seconds(bars: Iterable[Bar]) -> float:
    return math.fsum(bar.end_s - bar.start_s for bar in bars)


def _row(
    lane: int, name: str, pieces: Sequence[_Piece], numbers: dict[str, int], axis: _Axis
) -> dict[str, Any]:
    """The bars of a lane by colour, and the share of the axis that they fill."""
    top = _TOP + _ROW * lane + (_ROW - _BAR) // 2
    by_number = sorted(pieces, key=lambda piece: numbers[piece.bars[0].op])
    return {
        "name": _clean(name),
        "text_y": top + _BAR - 5,
        "share": f"{_seconds(bar for piece in pieces for bar in piece.bars) / axis.span_s:.0%}",
        "groups": [
            (_fill(number), [_drawn(piece, axis, top) for piece in group])
            for number, group in groupby(by_number, key=lambda piece: numbers[piece.bars[0].op])
        ],
    }


def _drawn(piece: _Piece, axis: _Axis, top: int) -> dict[str, str]:
    """All edges are rounded, so that bars that touch still do."""
    left, right = (round(axis.x(at_s), 2) for at_s in (piece.begin_s, piece.end_s))
    high, low = (round(top + _BAR * (1 - share), 2) for share in (piece.high, piece.low))
    return {
        "x": f"{left:.2f}",
        "y": f"{high:.2f}",
        "width": f"{right - left:.2f}",
        "height": f"{low - high:.2f}",
        "tip": _clean(_tip(piece, axis)),
    }


def _tip(piece: _Piece, axis: _Axis) -> str:
    when = f"{axis.figure(piece.begin_s, 3)} to {axis.figure(piece.end_s, 3)} {axis.unit}"
    first = piece.bars[0]
    if len(piece.bars) == 1 and (piece.low, piece.high) == (0.0, 1.0):
        return f"{first.op}{' ' if first.label else ''}{first.label}: {when}"
    return f"{len(piece.bars)} × {first.op}: {axis.figure(_seconds(piece.bars), 3)} {axis.unit} within {when}"


def _legend(numbers: dict[str, int], left: float, top: int) -> list[dict[str, Any]]:
    """Colour and name of each operation, in columns."""
    width = 34 + _LETTER * max((len(op) for op in numbers), default=0)
    columns = max(1, int(_PLOT // width))
    return [
        {
            "x": f"{left + n % columns * width:.2f}",
            "text_x": f"{left + n % columns * width + 18:.2f}",
            "y": top + n // columns * _LEGEND,
            "text_y": top + n // columns * _LEGEND + 10,
            "fill": _fill(number),
            "name": _clean(op),
        }
        for n, (op, number) in enumerate(numbers.items())
    ]


def _clean(text: str) -> str:
    """`text` with what XML cannot hold replaced."""
    return _NOT_XML.sub("\ufffd", text)
