"""Every block of every row is an event, no two of one track overlap, and the file is always JSON."""

import json
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import pytest

from moeplan.runtime_min.report import Report
from moeplan.runtime_min.run import Watch, bench_plan
from moeplan.runtime_min.trace import Trace

from .folders import Shape, make_plan, save_checkpoint, write_plan

SHAPE = Shape()


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[list[dict], Report]:
    folder = tmp_path_factory.mktemp("traced")
    save_checkpoint(folder / "checkpoint", SHAPE)
    runtime_dir = write_plan(folder, make_plan(SHAPE))
    report = bench_plan(runtime_dir, None, 8, 3, 1, watch=Watch(trace=folder / "trace.json"))
    return json.loads((folder / "trace.json").read_text()), report


def spans(events: list[dict]) -> list[dict]:
    return [event for event in events if event["ph"] == "X"]


def test_events_cover_all_rows(traced):
    """Of a prefill and two decode passes: 2 layers of 4 expert pages, 4 sequences, micro-batches of 2."""
    events, report = traced
    assert report.stats.decode_passes == 2
    computed = Counter(event["name"] for event in spans(events) if event["cat"] == "compute")
    assert set(computed) == {"embed", "attention", "route", "experts", "head"}
    assert computed["head"] == computed["embed"] == 3
    assert computed["route"] == 2 * 3
    assert computed["experts"] == 2 * 4 * 3
    decode = 2 * 2 * 2  # layers, micro-batches, passes
    prefill = 2 * 2  # two prompts of 8 tokens fill a call of 16
    assert computed["attention"] == decode + prefill


def test_reads_say_their_bytes(traced):
    events, report = traced
    reads = [event for event in spans(events) if event["cat"] == "disk"]
    assert {event["name"] for event in reads} == {"read"}
    assert sum(event["args"]["bytes"] for event in reads) == report.bytes_read
    pages = {(event["args"]["layer"], event["args"]["item"]) for event in reads}
    assert pages == {(layer, page) for layer in range(2) for page in range(5)}


def test_events_of_a_track_do_not_overlap(traced):
    events, report = traced
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    tracks = defaultdict(list)
    for event in spans(events):
        assert names[event["tid"]] == event["cat"]
        tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sorted(names.values()) == ["compute", "disk", "disk"][: len(names)]
    for track in tracks.values():
        for (_, end), (start, _) in zip(sorted(track), sorted(track)[1:], strict=False):
            assert start >= end - 0.01  # rounded to nanoseconds
    busy = {lane.name: lane.busy_s for lane in report.lanes}
    assert sum(e["dur"] for e in spans(events) if e["cat"] == "compute") <= busy["compute"] * 1e6


def test_more_events_than_fit_are_counted(tmp_path: Path):
    with Trace(tmp_path / "trace.json", most=2) as trace:
        for at in range(5):
            trace.block("disk", "read", (1, 1, 0, at, 0), 10, at, at + 0.5)
    events = json.loads((tmp_path / "trace.json").read_text())
    assert [event["args"]["item"] for event in spans(events)] == [0, 1]
    assert events[-1]["args"]["labels"] == "3 later events left out"


def test_an_interrupted_trace_is_complete_json(tmp_path: Path):
    trace = Trace(tmp_path / "trace.json")
    with suppress(KeyboardInterrupt), trace:
        trace.block("compute", "embed", (0, 0, 0, 0, -1), 0, 1.0, 2.0)
        raise KeyboardInterrupt
    assert len(spans(json.loads((tmp_path / "trace.json").read_text()))) == 1
