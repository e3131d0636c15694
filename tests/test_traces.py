"""Request traces: the published forms, burstiness that knows drift, and rows that cannot be read."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import ONLINE

from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.inputs import load_inputs
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.traces import RequestTrace, read_trace

DATA = Path(os.environ.get("MOEPLAN_ACCURACY_DATA", "no such folder")) / "traces"
SIZES = ONLINE[ONLINE.index("    sizes:") : ONLINE.index("    slo:")]
TRACE_SPEC = ONLINE.replace(SIZES, "    trace: t.csv\n").replace("    rate: 8/s\n", "")
PLAIN = "arrival_s,input_tokens,output_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def trace(tmp_path: Path, text: str, name: str = "t.csv") -> RequestTrace:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_trace(tmp_path / name, Span("spec.yaml", 5, 12))


def arrivals(gaps_s: np.ndarray) -> RequestTrace:
    ones = np.ones(len(gaps_s) + 1, np.int64)
    times = np.concatenate(([0.0], np.cumsum(gaps_s)))
    return RequestTrace(arrival_s=times, prompt_tokens=ones, output_tokens=ones)


def test_plain_csv(tmp_path: Path) -> None:
    """Columns in any order, rows in any order: the first request arrives at 0."""
    found = trace(tmp_path, "x,output_tokens,arrival_s,input_tokens\na,7,12.5,300\nb,0,10.0,20\n")
    assert found.arrival_s.tolist() == [0.0, 2.5]
    assert found.prompt_tokens.tolist() == [20, 300]
    assert found.output_tokens.tolist() == [1, 7]  # an answer has one token at least


def test_azure_columns(tmp_path: Path) -> None:
    found = trace(tmp_path, AZURE + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,0\n")
    assert found.rate_per_s == pytest.approx(1 / 4.314579, rel=1e-6)
    assert found.output_tokens.tolist() == [44, 1]


def test_azure_timestamps_with_an_offset(tmp_path: Path) -> None:
    text = AZURE + "2024-05-10 00:00:00.009930+00:00,374,44\n2024-05-10 01:00:02.009930+01:00,396,10\n"
    assert trace(tmp_path, text).rate_per_s == pytest.approx(0.5)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_mooncake(tmp_path: Path, form: str) -> None:
    """Milliseconds, as JSON lines with hashes or as CSV."""
    rows = [(27482, 6955, 52), (30535, 6472, 26)]
    names = ("timestamp", "input_length", "output_length")
    if form == "csv":
        text = ",".join(names) + "\n" + "\n".join(",".join(map(str, row)) for row in rows)
    else:
        lines = [{**dict(zip(names, row, strict=True)), "hash_ids": [46, 47]} for row in rows]
        text = "\n".join(json.dumps(line) for line in lines) + "\n"
    found = trace(tmp_path, text, f"t.{form}")
    assert found.arrival_s.tolist() == pytest.approx([0.0, 3.053])
    assert found.prompt_tokens.tolist() == [6955, 6472]


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress((PLAIN + "0,10,5\n1,20,5\n").encode()))
    assert read_trace(path, Span("spec.yaml")).prompt_tokens.tolist() == [10, 20]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CompileError, match="is not UTF-8 text, nor that gzipped"):
        read_trace(path, Span("spec.yaml"))


def test_evenly_spaced_arrivals(tmp_path: Path) -> None:
    rows = [f"{n / 2},{100 + n},{10 + n % 7}" for n in range(200)]
    found = trace(tmp_path, PLAIN + "\n".join(rows))
    assert found.rate_per_s == pytest.approx(2.0)
    assert found.arrival_cv == pytest.approx(0.0, abs=1e-9)
    assert found.dispersion(2.0) == pytest.approx(0.0, abs=1e-9)


def test_drift_is_no_burstiness() -> None:
    """A Poisson stream whose rate falls to a tenth over the trace: CV about 1, where all gaps together have
    more; the index of dispersion sees it."""
    unit = np.random.RandomState(0).exponential(1.0, 20_000)
    drifting = arrivals(unit * np.geomspace(1.0, 10.0, len(unit)))
    gaps = np.diff(drifting.arrival_s)
    assert gaps.std() / gaps.mean() > 1.3
    assert drifting.arrival_cv == pytest.approx(1.0, abs=0.06)
    assert arrivals(unit).dispersion(10.0) == pytest.approx(1.0, abs=0.1)
    assert drifting.dispersion(10.0) > 2.0


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_cv_of_gamma_gaps(cv: float) -> None:
    gaps = np.random.RandomState(1).gamma(1 / cv**2, cv**2, 50_000)
    assert arrivals(gaps).arrival_cv == pytest.approx(cv, rel=0.05)


def test_another_rate() -> None:
    slow = arrivals(np.random.RandomState(2).exponential(1.0, 500))
    fast = slow.at_rate(7.0)
    assert fast.rate_per_s == pytest.approx(7.0)
    assert fast.arrival_cv == pytest.approx(slow.arrival_cv)


def test_a_few_bad_rows_are_counted_and_told(tmp_path: Path) -> None:
    rows = [f"{n},10,5" for n in range(20)]
    rows[7], rows[9] = "7,x,5", "9,10"
    found = trace(tmp_path, PLAIN + "\n".join(rows))
    assert (found.requests, found.unread) == (18, 2)
    note = "2 of 20 rows not read, first: t.csv:9: cannot read this request: 'x' is not a number of tokens"
    assert found.unread_note() == note
    spec = parse_spec(TRACE_SPEC, str(tmp_path / "spec.yaml"))
    (requests,) = build_workload(spec, load_inputs(spec)).classes
    assert requests.basis == f"trace, {note}"


def test_more_bad_rows_than_good_are_an_error(tmp_path: Path) -> None:
    rows = ["0,10,5", *["1,x,5"] * 7, "2,10,5"]
    with pytest.raises(CompileError) as caught:
        trace(tmp_path, PLAIN + "\n".join(rows))
    text = str(caught.value)
    assert "t.csv:3:1: cannot read this request" in text
    assert text.count("cannot read this request") == 5
    assert "spec.yaml:5:12" in text
    assert "7 of 9 rows cannot be read" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown columns"),
        ("a,b,c\n1,2,3\n", "unknown columns"),
        (PLAIN, "fewer than two"),
        (PLAIN + "0,1,1\n0,1,1\n", "at one instant"),
        (PLAIN + "nan,1,1\n1,1,1\n", "not a finite number"),
        (PLAIN + "0,1\n1,1,1\n", "2 cells in this row"),
        (PLAIN + "0,-1,1\n1,1,1\n", "'-1' is not a number of tokens"),
        (PLAIN + "0,0,1\n1,1,1\n", "must be from 1 to 10,000,000"),
        (PLAIN + "9" * 200_000 + ",1,1\n0,1,1\n", "is no CSV"),
        (AZURE + "yesterday,1,1\n2023-11-16 18:15:46,1,1\n", "cannot read this request"),
        ('{"timestamp": 1}\n{"timestamp": 2}\n', "it has none of"),
        ('{"timestamp": 1\n{]\n', "no JSON object"),
        ('{"timestamp": true, "input_length": 1, "output_length": 1}\n', "cannot read this request"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        trace(tmp_path, text)


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CompileError, match="is not UTF-8 text"):
        read_trace(tmp_path / "t.csv", Span("spec.yaml"))
    with pytest.raises(CompileError, match="No such file"):
        read_trace(tmp_path / "none.csv", Span("spec.yaml"))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs MOEPLAN_ACCURACY_DATA")
@pytest.mark.parametrize(
    ("name", "requests", "rate_per_s", "cv"),
    [
        ("azure2023_conv", 19_366, 5.53, 1.05),
        ("azure2023_code", 8_819, 2.566, 12.9),
        ("mooncake_conversation", 12_031, 3.401, 3.04),
    ],
)
def test_public_traces(name: str, requests: int, rate_per_s: float, cv: float) -> None:
    """Rates and burstiness of an hour each; over all gaps at once the CVs are 1.09, 13.2 and 3.03."""
    found = read_trace(DATA / f"{name}.csv.gz", Span("spec.yaml"))
    assert (found.requests, found.unread) == (requests, 0)
    assert found.rate_per_s == pytest.approx(rate_per_s, rel=1e-3)
    assert found.arrival_cv == pytest.approx(cv, rel=0.01)
