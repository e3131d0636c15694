"""Spot traces as files: every accepted form, and every way in which one is wrong, named with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from spot_data import REGIONS, needs_data, published

from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.ir.spot import UNLIMITED, SpotTrace, ZoneName
from moeplan.planner.spot_traces import read_spot_trace

GOOD = """\
# step_seconds: 300
# start: 2025-10-04
# instance: a3-highgpu-1g (1x H100)
step,us-central1-a,us-east4-b
0,4,0
1,4,2
2,0,2
"""


def read(path: Path, text: str | None = None) -> SpotTrace:
    if text is not None:
        path.write_text(text)
    return read_spot_trace(path, Span("spec.yaml", 9, 3), REGIONS)


def problems(tmp_path: Path, text: str) -> str:
    with pytest.raises(CompileError) as caught:
        read(tmp_path / "spot.csv", text)
    return str(caught.value).replace(str(tmp_path), "")


def test_csv(tmp_path: Path) -> None:
    trace = read(tmp_path / "spot.csv", GOOD)
    assert trace.zones == (
        ZoneName(cloud="gcp", region="us-central1", zone="us-central1-a"),
        ZoneName(cloud="gcp", region="us-east4", zone="us-east4-b"),
    )
    assert trace.capacity.tolist() == [[4, 0], [4, 2], [0, 2]]
    assert (trace.step_s, trace.span_s, trace.counted, trace.start) == (300.0, 900.0, True, "2025-10-04")


def test_gzip_npz_and_times_are_the_same_trace(tmp_path: Path) -> None:
    wanted = read(tmp_path / "spot.csv", GOOD)
    (tmp_path / "spot.csv.gz").write_bytes(gzip.compress(GOOD.encode()))
    np.savez(
        tmp_path / "spot.npz",
        capacity=wanted.capacity,
        zones=np.array(["us-central1-a", "us-east4-b"]),
        step_seconds=np.float64(300),
    )
    timed = GOOD.replace("# step_seconds: 300\n", "").replace("step,", "time,")
    for n, stamp in enumerate(("2025-10-04T00:00Z", "2025-10-04T00:05Z", "2025-10-04T00:10:02Z")):
        timed = timed.replace(f"\n{n},", f"\n{stamp},")
    for path, text in (("spot.csv.gz", None), ("spot.npz", None), ("timed.csv", timed)):
        trace = read(tmp_path / path, text)
        assert np.array_equal(trace.capacity, wanted.capacity)
        assert trace.zones == wanted.zones
        assert trace.step_s == pytest.approx(300.0, abs=2.0)


def test_a_folder_of_pings(tmp_path: Path) -> None:
    for zone, data in (("us-east-1a", [1, 0, 1, 1]), ("us-west-2b", [1, 1, 1])):
        content = {"metadata": {"gap_seconds": 195}, "data": data}
        (tmp_path / f"{zone}_v100_1.json").write_text(json.dumps(content))
    trace = read(tmp_path)
    assert [zone.zone for zone in trace.zones] == ["us-east-1a", "us-west-2b"]
    assert (trace.capacity > 0).tolist() == [[True, True], [False, True], [True, True]]
    assert (trace.step_s, trace.counted) == (195.0, False)
    assert "cut to the shortest, 3 steps" in trace.notes[0]
    content = {"metadata": {"gap_seconds": 300}, "data": [1, 1, 1]}
    (tmp_path / "us-east-2a_v100_1.json").write_text(json.dumps(content))
    with pytest.raises(CompileError, match=r"mixed steps: us-east-1a_v100_1\.json 195 s, us-east-2a"):
        read(tmp_path)


def test_zero_and_one_is_any_number(tmp_path: Path) -> None:
    trace = read(tmp_path / "spot.csv", GOOD.replace(",4", ",1").replace(",2", ",1"))
    assert not trace.counted
    assert trace.capacity.max() == UNLIMITED


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("\n1,4,2", ""), "/spot.csv:6:1: a gap: 1 step missing before this row"),
        (("\n1,4,2", "\n1,4,"), "/spot.csv:6:1: a gap: 1 value of us-east4-b missing, the first here"),
        (("\n2,0,2", "\n0,0,2"), "/spot.csv:7:1: the clock jumps from 1 to 0"),
        (("us-east4-b", "us-east9-b"), "/spot.csv:4:20: unknown zone 'us-east9-b'"),
        (("us-east4-b", "us-central1-a"), "/spot.csv:4:20: zone 'us-central1-a' comes twice"),
        (("\n1,4,2", "\n1,4"), "/spot.csv:6:1: 1 values, expected 2"),
        (("\n1,4,2", "\n1,4,x"), "/spot.csv:6:5: 'x' is no number of machines"),
        (("\n1,4,2", "\n1,4,-2"), "/spot.csv:6:1: -2 is no number of machines"),
        (("\n1,4,2", "\n1,4,0.5"), "/spot.csv:6:1: 0.5 is no number of machines"),
        (("# step_seconds: 300\n", ""), "no step_seconds"),
        (("seconds: 300", "seconds: often"), "step_seconds is 'often'"),
        (("seconds: 300", "seconds: 0.1"), "a step of 0.1 s"),
        (("# start: 2025-10-04", "# encoding: gone"), "encoding is 'gone'"),
        (
            ("# start: 2025-10-04", "# encoding: preempted"),
            "encoding is preempted, yet there are values above",
        ),
        (("step,", "when,"), "the header is 'when,us-central1-a,us-east4-b'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], found: str) -> None:
    assert found in problems(tmp_path, GOOD.replace(*change))


def timed(*stamps: float) -> str:
    return "time,us-east-1a,us-east-1b\n" + "".join(f"{stamp},3,1\n" for stamp in stamps)


def test_clocks(tmp_path: Path) -> None:
    """Gaps, jumps and mixed steps of rows that carry times."""
    assert "a gap: 2 steps missing" in problems(tmp_path, timed(0, 300, 600, 1500, 1800, 2100))
    jumped = problems(tmp_path, timed(0, 300, 600, 500, 800, 1100))
    assert ":5:1: the clock jumps from 600 to 500 s" in jumped
    assert "hint: sort the rows by time" in jumped
    mixed = problems(tmp_path, timed(*range(0, 3000, 300), *range(3000, 9000, 600)))
    assert "mixed steps: rows are 300 s, 600 s apart" in mixed
    told = problems(tmp_path, "# step_seconds: 600\n" + timed(0, 300, 600))
    assert "mixed steps: step_seconds is 600, rows are 300 s apart" in told


def test_all_problems_at_once_but_few_shown(tmp_path: Path) -> None:
    text = GOOD + "".join(f"{n},?,?\n" for n in range(3, 30))
    found = problems(tmp_path, text)
    assert found.count("no number of machines") == 5
    assert "more problems" in found


INVERTED = "# step_seconds: 300\nstep,us-east-1a\n" + "".join(f"{n},{int(n % 5 == 0)}\n" for n in range(50))


def test_inverted_encoding(tmp_path: Path) -> None:
    """A 0/1 trace that has a machine less than half of the time must say what 1 means."""
    found = problems(tmp_path, INVERTED)
    assert "the encoding looks inverted: the trace has a machine only 20% of the time" in found
    assert "hint: add `# encoding: preempted`" in found
    preempted = read(tmp_path / "a.csv", "# encoding: preempted\n" + INVERTED)
    assert float((preempted.capacity > 0).mean()) == pytest.approx(0.8)
    scarce = read(tmp_path / "b.csv", "# encoding: available\n" + INVERTED)
    assert float((scarce.capacity > 0).mean()) == pytest.approx(0.2)
    says = problems(tmp_path, "# value: 1 = preempted\n" + GOOD.replace(",4", ",1").replace(",2", ",1"))
    assert "the trace says '1 = preempt'" in says


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"\x1f\x8b broken", b"PK\x03\x04"])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".npz", ".json"])
def test_files_that_are_no_trace(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"spot{suffix}"
    path.write_bytes(content)
    with pytest.raises(CompileError, match=r"spec.yaml:9:3: spot trace"):
        read(path)
    with pytest.raises(CompileError, match="No such file"):
        read(tmp_path / f"none{suffix}")


@needs_data
@pytest.mark.parametrize(
    ("name", "zones", "steps", "step_s"),
    [("aws1", 3, 3156, 300), ("aws3_first_half", 9, 10079, 195), ("h100_gcp_first7d", 13, 1008, 600)],
)
def test_published_files(name: str, zones: int, steps: int, step_s: float) -> None:
    trace = published(name)
    assert (len(trace.zones), trace.steps, trace.step_s) == (zones, steps, step_s)


@needs_data
def test_published_traces_inverted_are_found(tmp_path: Path) -> None:
    """Each 0/1 reading of a published trace passes, its inversion does not."""
    for name in ("aws1", "aws2", "aws3_first_half", "gcp1", "h100_gcp_first7d"):
        trace = published(name)
        for up, accepted in ((trace.capacity > 0, True), (trace.capacity == 0, False)):
            path = tmp_path / f"{name}.npz"
            names = np.array([str(zone) for zone in trace.zones])
            np.savez(path, capacity=up, zones=names, step_seconds=np.float64(trace.step_s))
            if accepted:
                assert read(path).steps == trace.steps
            else:
                with pytest.raises(CompileError, match="looks inverted"):
                    read(path)
