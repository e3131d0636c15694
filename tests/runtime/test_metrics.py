"""The metrics file is what Prometheus' text format says, replaced whole, and never in the run's way."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moeplan.runtime_min import metrics
from moeplan.runtime_min.engine import Stats
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.metrics import MetricsFile, metrics_text
from moeplan.runtime_min.report import LaneReport, Report

from .folders import Shape, make_plan

PLAN = replace(make_plan(Shape()), name='a "b" \\ c')
REPORT = Report(
    requests=9,
    answered=4,
    failed=1,
    resumed=2,
    stats=Stats(prompt_tokens=100, generated_tokens=50, prefill_s=0.5, decode_s=1.5, mixed_s=0.25),
    lanes=(
        LaneReport(name="compute", busy_s=1.75, stall_s=0.25, bytes_read=0),
        LaneReport(name="disk", busy_s=1e-5, stall_s=0.0, bytes_read=12345),
    ),
    bytes_read=12345,
    peak_bytes=1 << 30,
    full=None,
    rehearsed=False,
)
# https://prometheus.io/docs/instrumenting/exposition_formats/ (text-based format)
NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
LINE = re.compile(
    rf"# HELP (?P<helped>{NAME}) .+|# TYPE (?P<typed>{NAME}) (?P<kind>counter|gauge)"
    rf"|(?P<name>{NAME})\{{(?P<labels>{LABEL}(?:,{LABEL})*)\}} (?P<value>{NUMBER})"
)


def parse(text: str) -> dict[tuple[str, str], float]:
    """Samples by name and labels; every line valid, a family's lines together, its type said first."""
    assert text.endswith("\n")
    samples, types = {}, {}
    for line in text.removesuffix("\n").split("\n"):
        match = LINE.fullmatch(line)
        assert match, line
        if match["typed"]:
            assert match["typed"] not in types
            types[match["typed"]] = match["kind"]
        elif match["name"]:
            assert list(types)[-1] == match["name"]
            assert (types[match["name"]] == "counter") == match["name"].endswith("_total")
            key = match["name"], match["labels"]
            assert key not in samples
            samples[key] = float(match["value"])
    return samples


def test_every_figure_is_a_sample():
    samples = parse(metrics_text(PLAN, REPORT))
    plan = r'plan="a \"b\" \\ c"'
    assert samples["moeplan_requests", plan] == 9
    assert samples["moeplan_requests_answered_total", plan] == 4
    assert samples["moeplan_requests_failed_total", plan] == 1
    assert samples["moeplan_generated_tokens_total", plan] == 50
    assert samples["moeplan_read_bytes_total", plan] == 12345
    assert samples["moeplan_lane_busy_seconds_total", plan + ',lane="disk"'] == 1e-5
    assert samples["moeplan_lane_stall_seconds_total", plan + ',lane="compute"'] == 0.25
    assert samples["moeplan_planned_tokens_per_second", plan] == 100


def test_the_file_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaced while the run goes on, and once more at its end; nothing is left beside it."""
    monkeypatch.setattr(metrics, "INTERVAL_S", 0.001)
    path, answered = tmp_path / "run.prom", iter(range(10**9))
    with MetricsFile(path, PLAN, lambda: replace(REPORT, answered=next(answered))):
        first = path.read_bytes()
        while path.read_bytes() == first:
            pass
        during = path.read_bytes()
    key = "moeplan_requests_answered_total", r'plan="a \"b\" \\ c"'
    assert parse(first.decode())[key] < parse(during.decode())[key] < parse(path.read_text())[key]
    assert [p.name for p in tmp_path.iterdir()] == ["run.prom"]


def test_a_place_that_cannot_be_written_is_said_at_once(tmp_path: Path):
    with (
        pytest.raises(RunError, match=r"absent/run\.prom: cannot be written: No such file"),
        MetricsFile(tmp_path / "absent" / "run.prom", PLAN, lambda: REPORT),
    ):
        pass
