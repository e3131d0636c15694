"""Records -> charts as SVG text to stand inside a page: matplotlib, the same bytes for the same input.

Colours are names of the page's variables, so that a chart follows light, dark and print. The palette is Okabe
and Ito's (Color Universal Design, 2008), and no chart tells things apart by colour alone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moeplan.planner.ir.analysis import BatchPoint, Frontier, OperatorPoint, Timeline
from moeplan.planner.ir.roofline import Roof, Roofline
from moeplan.planner.units import format_duration, format_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

# What matplotlib draws with, and the page's variable that takes its place.
_INK, _GRID, _FADED = "#000001", "#000002", "#000003"
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
_VARIABLES = {
    _INK: "--ink",
    _GRID: "--grid",
    _FADED: "--faded",
    _BLUE: "--blue",
    _ORANGE: "--orange",
    _GREEN: "--green",
    _RED: "--red",
    _PURPLE: "--purple",
}
_LEVEL_COLOURS = {"gpu": _BLUE, "dram": _ORANGE, "disk": _GREEN}
_LEVEL_NAMES = {"gpu": "GPU", "dram": "host", "disk": "disk"}
_STAR: dict[str, Any] = {
    "marker": "*",
    "color": _ORANGE,
    "markeredgecolor": _INK,
    "markeredgewidth": 0.5,
    "markersize": 13,
    "linestyle": "none",
}
_CLOSE = 0.2  # decades
_SIZE = (4.5, 3.1)  # inches of 72 pixels: as wide as a telephone
_WIDE = (10.5, 2.9)
_DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A drawing, and what it shows in words."""

    svg: str
    alt: str


def roofline_chart(roofline: Roofline, operators: Sequence[OperatorPoint], name: str) -> Chart:
    """The hierarchical roofline: each level's roofs, the links' roofs, P1 and P2, and every operator.

    Operators are numbered in their order. A filled mark is one at the intensity of its own level, a hollow
    one at that of what it fetches.
    """

    def draw(axes: Axes) -> None:
        low, high = _intensities(roofline, operators)
        for roof in roofline.roofs:
            _draw_roof(axes, roof, low, high)
        for point in roofline.turning_points:
            if point.p1_flops_per_byte > 0 and math.isfinite(point.p2_flops_per_byte):
                _draw_turn(axes, point.p1_flops_per_byte, "P1", low, high)
                _draw_turn(axes, point.p2_flops_per_byte, "P2", low, high)
        axes.set(xscale="log", yscale="log", xlim=(low, high), xlabel="FLOP per byte", ylabel="GFLOP/s")
        axes.set_ylim(bottom=min(o.flops_per_s for o in operators) / 1e9 / 30)
        _short_ticks(axes)
        axes.legend(loc="upper left", fontsize=7, frameon=False)
        for operator in operators:
            _draw_operator(axes, operator)
        for number, x, y in _numbers(operators):
            style: dict[str, Any] = {"fontsize": 8, "weight": "bold", "ha": "right"}
            axes.annotate(number, (x, y), (-4, 5), textcoords="offset points", **style)

    bounds = "; ".join(
        f"{_words(o.name)} at {format_figure(o.flops_per_s / 1e9)} GFLOP/s, bound by {o.bound}"
        for o in operators
    )
    return Chart(svg=_svg(draw, f"roofline-{name}"), alt=f"Hierarchical roofline of {name}. {bounds}.")


def _intensities(roofline: Roofline, operators: Sequence[OperatorPoint]) -> tuple[float, float]:
    """The axis: everything that is drawn, and half a decade around it."""
    values = [operator.flops_per_byte for operator in operators]
    values += [o.fetched_flops_per_byte for o in operators if math.isfinite(o.fetched_flops_per_byte)]
    values += [roof.flops_per_s / roof.bytes_per_s for roof in roofline.roofs if roof.flops_per_s]
    for point in roofline.turning_points:
        values += [p for p in (point.p1_flops_per_byte, point.p2_flops_per_byte) if 0 < p < math.inf]
    return min(values) / 3, max(values) * 5


def _draw_roof(axes: Axes, roof: Roof, low: float, high: float) -> None:
    """Memory and compute roof of one level, and the roof of the link that leads up from it."""
    name, colour = _LEVEL_NAMES[roof.level], _LEVEL_COLOURS[roof.level]
    if roof.flops_per_s:
        ridge = roof.flops_per_s / roof.bytes_per_s
        corner = [(low, roof.bytes_per_s * low), (ridge, roof.flops_per_s), (high, roof.flops_per_s)]
        axes.plot(*_giga(corner), color=colour, linewidth=1.6, label=f"{name}: memory, then compute")
    if roof.up_bytes_per_s:
        line = [(low, roof.up_bytes_per_s * low), (high, roof.up_bytes_per_s * high)]
        axes.plot(*_giga(line), color=colour, linewidth=1.2, linestyle="--", label=f"{name}: link up")


def _giga(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y / 1e9 for _, y in points]


def _draw_turn(axes: Axes, intensity: float, name: str, low: float, high: float) -> None:
    if low < intensity < high:
        axes.axvline(intensity, color=_FADED, linewidth=0.9, linestyle=":")
        foot: Any = ("data", "axes fraction")
        axes.annotate(name, (intensity, 0.0), (2, 3), xycoords=foot, textcoords="offset points", fontsize=7.5)


def _draw_operator(axes: Axes, point: OperatorPoint) -> None:
    colour, rate = _LEVEL_COLOURS[point.level], point.flops_per_s / 1e9
    style: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 6.5}
    edge: dict[str, Any] = {"markeredgecolor": _INK, "markeredgewidth": 0.7}
    axes.plot([point.flops_per_byte], [rate], color=colour, **style, **edge)
    if math.isfinite(point.fetched_flops_per_byte):
        axes.plot([point.fetched_flops_per_byte], [rate], color="none", markeredgecolor=colour, **style)


def _numbers(operators: Sequence[OperatorPoint]) -> list[tuple[str, float, float]]:
    """A label and a place for every mark; marks that lie close together share one."""
    marks = [
        (number, x, operator.flops_per_s / 1e9)
        for number, operator in enumerate(operators, 1)
        for x in (operator.flops_per_byte, operator.fetched_flops_per_byte)
        if math.isfinite(x)
    ]
    groups: list[list[tuple[int, float, float]]] = []
    for mark in marks:
        near = next((group for group in groups if _near(mark, group[0])), None)
        if near is None:
            groups.append([mark])
        else:
            near.append(mark)
    return [(", ".join(str(n) for n, _, _ in group), group[0][1], group[0][2]) for group in groups]


def _near(a: tuple[int, float, float], b: tuple[int, float, float]) -> bool:
    """Within a fifth of a decade in either direction."""
    return all(abs(math.log10(v / w)) < _CLOSE for v, w in ((a[1], b[1]), (a[2], b[2])))


def _words(name: str) -> str:
    return name.replace("_", " ")


def batch_chart(points: Sequence[BatchPoint], chosen: int, name: str) -> Chart:
    """Generated tokens per second against sequences in flight; what could not be had is hollow."""

    def draw(axes: Axes) -> None:
        possible = [point for point in points if not point.excluded]
        beyond = [point for point in points if point.excluded]
        axes.plot(*_rates(points), color=_FADED, linewidth=1.0)
        axes.plot(
            *_rates(possible), color=_BLUE, marker="o", markersize=4, linestyle="none", label="possible"
        )
        if beyond:
            label = f"not to be had: {_reasons(beyond)}"
            hollow: dict[str, Any] = {
                "marker": "o",
                "color": "none",
                "markeredgecolor": _RED,
                "markersize": 5,
            }
            axes.plot(*_rates(beyond), linestyle="none", label=label, **hollow)
        here = [point for point in points if point.batch == chosen]
        axes.plot(*_rates(here), label=f"the plan: {chosen}", **_STAR)
        axes.set(xscale="log", xlabel="sequences in flight on each copy", ylabel="generated tokens/s")
        _short_ticks(axes)
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower right", fontsize=7, frameon=False)

    here = next(point for point in points if point.batch == chosen)
    best = max(points, key=lambda point: point.tokens_per_s)
    alt = (
        f"Generated tokens per second of {name} against sequences in flight: "
        f"{format_figure(here.tokens_per_s)} at the plan's {chosen}, "
        f"most at {best.batch} with {format_figure(best.tokens_per_s)}."
    )
    return Chart(svg=_svg(draw, f"batch-{name}"), alt=alt)


def _rates(points: Sequence[BatchPoint]) -> tuple[list[int], list[float]]:
    return [point.batch for point in points], [point.tokens_per_s for point in points]


def _reasons(points: Sequence[BatchPoint]) -> str:
    return ", ".join(sorted({point.excluded for point in points}))


def frontier_chart(frontier: Frontier) -> Chart:
    """The cheapest fleet's cost against one input, the plan marked; where there is no fleet, nothing."""
    solved = [point for point in frontier.points if point.fleet]
    here = next(point for point in solved if point.factor == 1.0)

    def draw(axes: Axes) -> None:
        scale = 1e3 if frontier.unit == "s" else 1.0
        values, costs = [p.value * scale for p in solved], [p.usd_per_hour for p in solved]
        axes.plot(values, costs, color=_BLUE, marker="o", markersize=4, linewidth=1.0, label="cheapest fleet")
        axes.plot([here.value * scale], [here.usd_per_hour], label="the plan", **_STAR)
        unit = "ms" if frontier.unit == "s" else "requests/s"
        axes.set(xscale="log", xlabel=f"{frontier.name} [{unit}]", ylabel="USD per hour")
        _plain_ticks(axes, [p.value * scale for p in solved])
        axes.set_ylim(bottom=0)
        corner: Any = "upper left" if costs[-1] > costs[0] else "upper right"
        axes.legend(loc=corner, fontsize=7, frameon=False)

    told = "; ".join(f"{value_text(frontier, p.value)}: {p.usd_per_hour:.2f}" for p in solved)
    alt = f"Least USD per hour against {frontier.name}. {told}."
    return Chart(svg=_svg(draw, f"frontier-{frontier.name}"), alt=alt)


def value_text(frontier: Frontier, value: float) -> str:
    """A value of a frontier's input with its unit."""
    return format_duration(value) if frontier.unit == "s" else f"{format_figure(value)}{frontier.unit}"


def timeline_chart(timeline: Timeline) -> Chart:
    """Ready replicas over a replayed trace, on-demand on top of spot; marks where replicas were lost, a bar
    where fewer were ready than wanted."""
    parts, days = timeline.columns, [part.begin_s / _DAY_S for part in timeline.columns]
    edges = [*days, parts[-1].end_s / _DAY_S]
    on_spot = [part.on_spot for part in parts]
    ready = [part.on_spot + part.on_demand for part in parts]
    lost = [(begin, part.preemptions) for begin, part in zip(days, parts, strict=True) if part.preemptions]
    short = [n for n, part in enumerate(parts) if part.enough_share < 1.0]

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        most = max(timeline.wanted, *ready)
        axes.stairs(on_spot, edges, fill=True, color=_BLUE, label="ready on spot")
        stand_ins: dict[str, Any] = {"facecolor": "none", "edgecolor": _ORANGE, "hatch": "//////"}
        axes.stairs(ready, edges, baseline=on_spot, fill=True, linewidth=0, label="on demand", **stand_ins)
        axes.axhline(timeline.wanted, color=_INK, linewidth=1.0, linestyle="--", label="wanted")
        marks: dict[str, Any] = {"marker": "v", "color": _RED, "markersize": 4, "linestyle": "none"}
        axes.plot([day for day, _ in lost], [1.12 * most] * len(lost), label="spot replicas lost", **marks)
        for n in short:
            axes.plot(edges[n : n + 2], [-0.06 * most] * 2, color=_RED, linewidth=3)
        axes.plot([], [], color=_RED, linewidth=3, label="fewer than wanted")
        axes.set(xlabel="days of the trace", ylabel="replicas", xlim=(0, edges[-1]))
        axes.set_ylim(-0.12 * most, 1.45 * most)
        axes.yaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
        axes.legend(loc="upper center", ncols=5, fontsize=7.5, frameon=False, columnspacing=1.2)

    span_s = sum(part.end_s - part.begin_s for part in parts)
    enough = sum(part.enough_share * (part.end_s - part.begin_s) for part in timeline.rows) / span_s
    alt = (
        f"Ready replicas of {timeline.column} over {edges[-1]:.1f} days of a spot trace, replayed: "
        f"{timeline.wanted} are wanted and ready {enough:.1%} of the time; "
        f"{sum(part.preemptions for part in timeline.rows)} spot replicas are lost."
    )
    return Chart(svg=_svg(draw, f"timeline-{timeline.column}", left=0.06, size=_WIDE), alt=alt)


def _short_ticks(axes: Axes) -> None:
    """Powers of ten in letters: 10k instead of a formula."""
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    """The values themselves, not powers of ten."""
    axes.set_xticks(values, [f"{value:.3g}" for value in values])


def measured_chart(pairs: Sequence[tuple[str, float]]) -> Chart:
    """Measured over predicted of each figure, 1 being as predicted."""

    def draw(axes: Axes) -> None:
        rows = range(len(pairs))
        axes.axvline(1.0, color=_FADED, linewidth=1.0)
        axes.plot(
            [ratio for _, ratio in pairs], rows, marker="D", color=_BLUE, linestyle="none", markersize=5
        )
        axes.set(xscale="log", xlabel="measured over predicted", yticks=list(rows))
        axes.set_yticklabels([name for name, _ in pairs])
        axes.set_xlim(min([0.5, *(r for _, r in pairs)]) / 1.2, max([2.0, *(r for _, r in pairs)]) * 1.2)
        axes.set_ylim(len(pairs) - 0.5, -0.5)

    told = "; ".join(f"{name} {ratio:.3g}" for name, ratio in pairs)
    return Chart(svg=_svg(draw, "measured", left=0.42), alt=f"Measured over predicted: {told}.")


# matplotlib


def _svg(
    draw: Callable[[Axes], None], name: str, left: float = 0.13, size: tuple[float, float] = _SIZE
) -> str:
    """One pair of axes as SVG that a page can hold: no header, no metadata, its own names, our colours.

    The axes begin `left` of the width from the edge.
    """
    import matplotlib

    figure_type, canvas_type = _loaded()
    with matplotlib.rc_context(_style(name)):
        figure = figure_type(figsize=size)
        canvas_type(figure)
        axes = figure.add_axes((left, 0.13, 0.97 - left, 0.84))
        draw(axes)
        axes.minorticks_off()
        axes.grid(visible=True, color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inlined(text.getvalue(), name)


def _loaded() -> tuple[type[Figure], type[FigureCanvasSVG]]:
    """matplotlib's figure and canvas. Imported without the documentation of every artist's properties, which
    matplotlib writes as it loads, in half of the time that this takes."""
    from matplotlib import artist

    documented, artist.kwdoc = artist.kwdoc, lambda artist: ""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    finally:
        artist.kwdoc = documented
    return Figure, FigureCanvasSVG


_NO_METADATA: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def _style(name: str) -> Any:
    """Every setting, so that the user's own matplotlibrc changes nothing."""
    import matplotlib

    defaults: Any = dict(matplotlib.rcParamsDefault)
    return {
        **{key: value for key, value in defaults.items() if not key.startswith("backend")},
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8.0,
        "axes.edgecolor": _FADED,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
    }


_NOT_OURS = re.compile(r"(<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->)\s*", flags=re.DOTALL)
_LONG_NUMBER = re.compile(r"-?[0-9]+\.[0-9]{3,}")


def _rounded(number: re.Match[str]) -> str:
    """A hundredth of a pixel: what processors may compute differently is far below."""
    return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")


def _inlined(svg: str, name: str) -> str:
    """The drawing as part of a page."""
    svg = svg[svg.index("<svg ") :]
    svg = _NOT_OURS.sub("", svg)
    svg = re.sub(r"<[^>]+>", lambda tag: _LONG_NUMBER.sub(_rounded, tag.group()), svg)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    own = re.sub("[^a-z0-9]+", "-", name.lower())
    svg = (
        svg.replace(' id="', f' id="{own}-')
        .replace('href="#', f'href="#{own}-')
        .replace("url(#", f"url(#{own}-")
    )
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip() + "\n"
