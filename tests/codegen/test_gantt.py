"""The Gantt chart: read back from its SVG, it says what was put in."""

from __future__ import annotations

import random
import re
import xml.etree.ElementTree as ET
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.codegen.gantt import MOST_BARS, Bar, gantt_svg

SVG = "{http://www.w3.org/2000/svg}"
LEFT, PLOT, HEIGHT = 16 + 7.5 * 3, 860, 20  # with lane names of three letters
LANES = ("gpu", "h2d", "cpu")
BARS = (
    Bar(lane=0, op="pre_attention", start_s=0.0, end_s=0.002, label="layer 0, micro-batch 0"),
    Bar(lane=0, op="pre_attention", start_s=0.002, end_s=0.004, label="layer 0, micro-batch 1"),
    Bar(lane=1, op="copy_page", start_s=0.0, end_s=0.0075, label="layer 1, page 0"),
    Bar(lane=1, op="load_hidden", start_s=0.009, end_s=0.0095, label="layer 0, micro-batch 0"),
    Bar(lane=2, op="cpu_attention", start_s=0.002, end_s=0.009, label="layer 0, micro-batch 0"),
    Bar(lane=2, op="cpu_attention", start_s=0.009, end_s=0.016, label="layer 0, micro-batch 1"),
    Bar(lane=0, op="post_attention", start_s=0.0095, end_s=0.0134, label="layer 0, micro-batch 0"),
)


def lane_rows(svg: str) -> list[ET.Element]:
    return ET.fromstring(svg).findall(f"{SVG}g[@class='lane']")


def rectangles(row: ET.Element) -> list[tuple[str, ET.Element]]:
    """Each bar of a lane and its colour."""
    return [
        (group.get("fill", ""), r) for group in row.findall(f"{SVG}g") for r in group.findall(f"{SVG}rect")
    ]


def number(element: ET.Element, name: str) -> float:
    return float(element.get(name, "nan"))


def legend(svg: str) -> dict[str, str]:
    """The fill of each operation."""
    group = ET.fromstring(svg).find(f"{SVG}g[@class='legend']")
    assert group is not None
    names = [text.text or "" for text in group.findall(f"{SVG}text")]
    return dict(zip(names, [r.get("fill", "") for r in group.findall(f"{SVG}rect")], strict=True))


def busy_s(svg: str, span_s: float) -> list[Counter[str]]:
    """By lane and colour: the area of the bars, as time at the full height."""
    found = []
    for row in lane_rows(svg):
        found.append(Counter[str]())
        for fill, bar in rectangles(row):
            found[-1][fill] += number(bar, "width") * number(bar, "height") / HEIGHT / PLOT * span_s  # type: ignore[assignment]
    return found


def crowd(count: int, seed: int = 0) -> list[Bar]:
    """Tasks of every length on three lanes, with gaps between them."""
    rng = random.Random(seed)
    bars, at_s = [], [0.0] * len(LANES)
    for _ in range(count):
        lane = rng.randrange(len(LANES))
        start_s = at_s[lane] + rng.choice([0.0, rng.expovariate(1.0)])
        at_s[lane] = start_s + rng.expovariate(1.0)
        bars.append(Bar(lane=lane, op=f"{LANES[lane]}-{rng.randrange(3)}", start_s=start_s, end_s=at_s[lane]))
    return bars


def test_the_golden_chart() -> None:
    assert gantt_svg("One layer", LANES, BARS) == Path(__file__).with_name("gantt.svg").read_text("utf-8")


def test_every_task_is_where_and_as_long_as_it_was() -> None:
    """The axis has 16 ms on 860 pixels; edges are rounded to a hundredth of one."""
    drawn = []
    for lane, row in enumerate(lane_rows(gantt_svg("One layer", LANES, BARS))):
        for _, bar in rectangles(row):
            begin_s = (number(bar, "x") - LEFT) / PLOT * 0.016
            end_s = begin_s + number(bar, "width") / PLOT * 0.016
            drawn.append((lane, round(begin_s, 6), round(end_s, 6)))
    assert sorted(drawn) == sorted((bar.lane, bar.start_s, bar.end_s) for bar in BARS)


def test_tooltips_say_what_when() -> None:
    tips = [
        bar.findtext(f"{SVG}title")
        for row in lane_rows(gantt_svg("", LANES, BARS))
        for _, bar in rectangles(row)
    ]
    assert "load_hidden layer 0, micro-batch 0: 9.000 to 9.500 ms" in tips
    assert len(tips) == len(BARS)


def test_tooltips_of_cells_say_how_much_of_them() -> None:
    """1000 pairs of 0.25 s and 0.5 s, then 0.25 s of nothing."""
    bars = [
        Bar(lane=0, op=op, start_s=n + begin_s, end_s=n + end_s)
        for n in range(1000)
        for op, begin_s, end_s in (("short", 0.0, 0.25), ("long", 0.25, 0.75))
    ]
    svg = gantt_svg("", LANES, bars)
    tips = [bar.findtext(f"{SVG}title") or "" for _, bar in rectangles(lane_rows(svg)[0])]
    counted = [
        re.fullmatch(r"(\d+) × (short|long): ([0-9.]+) s within [0-9.]+ to [0-9.]+ s", tip) for tip in tips
    ]
    for op, seconds in (("short", 0.25), ("long", 0.5)):
        found = [(int(m[1]), float(m[3])) for m in counted if m is not None and m[2] == op]
        assert sum(count for count, _ in found) == 1000
        assert all(taken == pytest.approx(count * seconds, abs=0.051) for count, taken in found)


def test_lanes_tell_the_share_they_are_busy() -> None:
    texts = [[t.text for t in row.findall(f"{SVG}text")] for row in lane_rows(gantt_svg("", LANES, BARS))]
    # 7.9, 8 and 14 of 16 ms.
    assert texts == [["gpu", "49%"], ["h2d", "50%"], ["cpu", "88%"]]


@pytest.mark.parametrize("count", [50, 5000])
def test_bars_stay_on_the_axis_and_keep_the_busy_time(count: int) -> None:
    """One by one, and as shares of cells."""
    bars = crowd(count)
    span_s = max(bar.end_s for bar in bars) - min(bar.start_s for bar in bars)
    svg = gantt_svg("crowd", LANES, bars)
    for row in lane_rows(svg):
        for _, bar in rectangles(row):
            assert LEFT <= number(bar, "x") <= number(bar, "x") + number(bar, "width") <= LEFT + PLOT + 0.01
            assert 0 <= number(bar, "height") <= HEIGHT
    fills = legend(svg)
    for lane, drawn in enumerate(busy_s(svg, span_s)):
        for op in {bar.op for bar in bars if bar.lane == lane}:
            taken = sum(bar.end_s - bar.start_s for bar in bars if bar.op == op)
            assert drawn[fills[op]] == pytest.approx(taken, rel=0.01), op


def test_bars_of_a_lane_do_not_cover_each_other() -> None:
    """Cells stack their operations: no point of the chart belongs to two."""
    for row in lane_rows(gantt_svg("crowd", LANES, crowd(3000))):
        boxes = [
            (number(r, "x"), number(r, "y"), number(r, "width"), number(r, "height"))
            for _, r in rectangles(row)
        ]
        for n, (x, y, width, height) in enumerate(boxes):
            for other_x, other_y, other_width, other_height in boxes[:n]:
                wide = min(x + width, other_x + other_width) - max(x, other_x)
                high = min(y + height, other_y + other_height) - max(y, other_y)
                assert wide < 0.02 or high < 0.02


def test_cells_are_no_longer_than_the_limit_needs() -> None:
    """Five operations leave 120 cells of 7.2 pixels; each try doubles them, so they have less than 14.4."""
    bars = [Bar(lane=0, op=f"op{n % 5}", start_s=n, end_s=n + 1.0) for n in range(5000)]
    widths = [number(bar, "width") for _, bar in rectangles(lane_rows(gantt_svg("", LANES, bars))[0])]
    assert MOST_BARS / 2 < len(widths) <= MOST_BARS
    assert max(widths) < 14.4


@pytest.mark.parametrize("count", [MOST_BARS, MOST_BARS + 1, 20_000])
def test_a_file_stays_small(count: int) -> None:
    svg = gantt_svg("crowd", LANES, crowd(count))
    drawn = sum(len(rectangles(row)) for row in lane_rows(svg))
    assert drawn <= MOST_BARS
    assert (drawn == count) == (count <= MOST_BARS)
    assert len(svg.encode()) < 100_000


def test_the_order_of_the_tasks_changes_no_byte() -> None:
    bars = crowd(2000)
    svg = gantt_svg("crowd", LANES, bars)
    random.Random(1).shuffle(bars)
    assert gantt_svg("crowd", LANES, bars) == svg


@given(st.floats(0, 1e5), st.floats(1e-5, 1e5))
def test_ticks_are_round_and_true(begin_s: float, span_s: float) -> None:
    """Between 2 and 11 of them, 1, 2 or 5 times a power of ten apart, each where its figure is."""
    bar = Bar(lane=0, op="op", start_s=begin_s, end_s=begin_s + span_s)
    svg = gantt_svg("", LANES, [bar])
    found = re.search(r'<g text-anchor="middle">\n(.*?)</g>', svg, re.DOTALL)
    assert found is not None
    ticks = [(float(t.get("x", "")), float(t.text or "")) for t in ET.fromstring(found.group())]
    unit_s = 1e-3 if ">ms<" in svg else 1.0
    assert 2 <= len(ticks) <= 11
    for x, figure in ticks:
        assert x == pytest.approx(LEFT + (figure * unit_s - begin_s) / (bar.end_s - begin_s) * PLOT, abs=0.1)
    steps = {f"{b - a:.1e}" for (_, a), (_, b) in pairwise(ticks)}
    assert {step[:3] for step in steps} <= {"1.0", "2.0", "5.0"}


names = st.text(max_size=12)


@given(names, names, names, names)
def test_any_name_is_valid_xml(title: str, lane: str, op: str, label: str) -> None:
    """Names come back as they were, but for what XML cannot hold and for its line ends."""
    svg = gantt_svg(title, [lane], [Bar(lane=0, op=op, start_s=0.0, end_s=1.0, label=label)])
    root = ET.fromstring(svg.encode())
    assert kept(root.findtext(f"{SVG}title")) == kept(title)
    assert kept(lane_rows(svg)[0].findtext(f"{SVG}text")) == kept(lane)
    assert [kept(name) for name in legend(svg)] == [kept(op)]


def kept(text: str | None) -> str:
    holds = re.sub("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text or "")
    return holds.replace("\r\n", "\n").replace("\r", "\n")


def test_many_operations_are_hatched() -> None:
    """24 looks, each defined; those of one lane come first one after the other."""
    bars = [Bar(lane=n % 3, op=f"op{n}", start_s=float(n), end_s=n + 1.0) for n in range(24)]
    svg = gantt_svg("", LANES, bars)
    fills = legend(svg)
    assert len(set(fills.values())) == 24
    defined = {f"url(#{pattern.get('id')})" for pattern in ET.fromstring(svg).iter(f"{SVG}pattern")}
    assert defined == {fill for fill in fills.values() if fill.startswith("url")}
    assert list(fills)[:8] == [f"op{n}" for n in range(0, 24, 3)]


def test_a_chart_without_tasks_has_its_lanes() -> None:
    assert [rectangles(row) for row in lane_rows(gantt_svg("idle", LANES, []))] == [[], [], []]
