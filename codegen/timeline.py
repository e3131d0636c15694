"""Ready replicas over time -> an SVG chart: spot below, on-demand on top, the wanted number as a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moeplan.codegen.render import render

_SPOT, _ON_DEMAND, _SHORT = "#56B4E9", "#E69F00", "#D55E00"  # Okabe and Ito
_PLOT, _HEIGHT, _LEFT, _TOP, _GAP = 860, 120, 60, 40, 60  # pixels
_COLUMNS = 430  # that ticks are gathered into


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A site: by tick the ready replicas on spot and on-demand, and how many are wanted."""

    name: str
    wanted: int
    tick_s: float
    spot: Sequence[int]
    on_demand: Sequence[int]


def timeline_svg(title: str, curves: Sequence[Curve]) -> str:
    """The chart of `curves`, one below the other; the same input, the same bytes.

    A column is the mean of its ticks; it has a mark below the axis where any of them has too few replicas.
    """
    return render(
        "report/timeline.svg.j2",
        title=title,
        width=_LEFT + _PLOT + 20,
        height=_TOP + len(curves) * (_HEIGHT + _GAP) + 20,
        left=_LEFT,
        right=_LEFT + _PLOT,
        colours={"spot": _SPOT, "on-demand": _ON_DEMAND, "short": _SHORT},
        rows=[_row(curve, _TOP + n * (_HEIGHT + _GAP)) for n, curve in enumerate(curves)],
    )


def _row(curve: Curve, top: int) -> dict[str, object]:
    ticks = len(curve.spot)
    columns = min(_COLUMNS, ticks)
    edges = [round(n * ticks / columns) for n in range(columns + 1)]
    spot = [sum(curve.spot[a:b]) / (b - a) for a, b in pairwise(edges)]
    ready = [s + d for s, d in zip(curve.spot, curve.on_demand, strict=True)]
    both = [sum(ready[a:b]) / (b - a) for a, b in pairwise(edges)]
    short = [min(ready[a:b]) < curve.wanted for a, b in pairwise(edges)]
    most = max(curve.wanted, *both) * 1.1
    bottom, width = top + _HEIGHT, _PLOT / columns

    def area(values: Sequence[float]) -> str:
        steps = [
            f"V{bottom - value / most * _HEIGHT:.2f}H{_LEFT + (n + 1) * width:.2f}"
            for n, value in enumerate(values)
        ]
        return f"M{_LEFT} {bottom}{''.join(steps)}V{bottom}Z"

    return {
        "name": curve.name,
        "title_y": top - 6,
        "bottom": bottom,
        "spot": area(spot),
        "both": area(both),
        "wanted": curve.wanted,
        "wanted_y": f"{bottom - curve.wanted / most * _HEIGHT:.2f}",
        "short": [f"{_LEFT + n * width:.2f}" for n, few in enumerate(short) if few],
        "short_width": f"{max(width, 1):.2f}",
        "end": f"{ticks * curve.tick_s / 86400:.1f} d",
    }
