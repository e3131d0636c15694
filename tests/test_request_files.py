"""Prompts and traces: sizes that come out right, and bad rows by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ONLINE

from moeplan.planner.diagnostics import CompileError
from moeplan.planner.request_files import PromptsFile, Trace, read_prompts, read_trace
from moeplan.planner.spec import parse_spec

PROMPTS_SPEC = "name: x\nmodel: mixtral-8x7b\nworkload: {batch: {prompts: p.jsonl}}\nmachine: cpu-2core\n"
SIZES = ONLINE[ONLINE.index("    sizes:") : ONLINE.index("    slo:")]
TRACE_SPEC = ONLINE.replace(SIZES, "    trace: t.csv\n").replace("    rate: 8/s\n", "")


def prompts(tmp_path: Path, text: str) -> PromptsFile:
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    found = read_prompts(parse_spec(PROMPTS_SPEC, str(tmp_path / "spec.yaml")), tmp_path)
    assert found is not None
    return found


def trace(tmp_path: Path, text: str) -> Trace:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    found = read_trace(parse_spec(TRACE_SPEC, str(tmp_path / "spec.yaml")), tmp_path)
    assert found is not None
    return found


def request(**body: object) -> str:
    return json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body})


def test_prompt_sizes(tmp_path: Path) -> None:
    chat = request(messages=[{"role": "user", "content": "x" * 70}], max_completion_tokens=30)
    found = prompts(
        tmp_path, "\n".join([request(prompt="y" * 140, max_tokens=10), chat, request(prompt="z")])
    )
    assert found.requests == 3
    assert found.mean_prompt_tokens == pytest.approx((140 + 70 + 1) / 3 / 3.5)
    assert found.max_prompt_tokens >= 70
    assert (found.mean_output_tokens, found.max_output_tokens) == (pytest.approx((10 + 30 + 16) / 3), 30)


def test_requests_that_the_runtime_refuses_are_not_counted(tmp_path: Path) -> None:
    bad = [
        "{",
        "[]",
        "null",
        request(),
        request(prompt=["a"]),
        request(prompt="a", max_tokens="x"),
        "9" * 5000,
    ]
    assert prompts(tmp_path, "\n".join([*bad, request(prompt="ok")])).requests == 1


def test_a_file_without_requests_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"holds no request that can be read \[no-requests\]"):
        prompts(tmp_path, "\n\n")


def test_missing_file_is_named(tmp_path: Path) -> None:
    spec = parse_spec(PROMPTS_SPEC, str(tmp_path / "spec.yaml"))
    with pytest.raises(CompileError, match=r"spec\.yaml:3:\d+: prompts file .*p\.jsonl: No such file"):
        read_prompts(spec, tmp_path)


def test_trace_statistics(tmp_path: Path) -> None:
    """Evenly spaced arrivals: rate 2/s, no burstiness; bucket means add up to the trace's."""
    rows = [f"{n / 2},{100 + n},{10 + n % 7}" for n in range(200)]
    found = trace(tmp_path, "arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    assert found.rate_per_s == pytest.approx(2.0)
    assert found.arrival_cv == pytest.approx(0.0, abs=1e-9)
    assert len(found.buckets) == 12
    assert sum(b.share for b in found.buckets) == pytest.approx(1.0)
    assert sum(b.share * b.prompt_tokens for b in found.buckets) == pytest.approx(100 + 199 / 2)
    assert sum(b.share * b.output_tokens for b in found.buckets) == pytest.approx(
        sum(10 + n % 7 for n in range(200)) / 200
    )


def test_azure_columns(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,0\n"
    )
    found = trace(tmp_path, text)
    assert found.rate_per_s == pytest.approx(1 / 4.314579, rel=1e-6)
    assert found.max_output_tokens == 44


def test_timestamps_with_an_offset(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-10 00:00:00.009930+00:00,374,44\n"
        "2024-05-10 01:00:02.009930+01:00,396,10\n"
    )
    assert trace(tmp_path, text).rate_per_s == pytest.approx(0.5)


def test_a_huge_cell_is_no_crash(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="is no CSV"):
        trace(tmp_path, "arrival_s,input_tokens,output_tokens\n" + "9" * 200_000 + ",1,1\n0,1,1\n")


def test_line_ends_inside_json_text(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 raw in text; they end no line of the file."""
    line = '{"custom_id": "a", "body": {"prompt": "x\u2028y\x85z"}}'
    assert prompts(tmp_path, line).requests == 1


def test_bad_rows_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    rows = ["0,10,5", *["1,x,5"] * 7, "2,10,5"]
    with pytest.raises(CompileError) as caught:
        trace(tmp_path, "arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    text = str(caught.value)
    assert "t.csv:3:1: cannot read this request" in text
    assert "2 more rows cannot be read" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown columns"),
        ("a,b,c\n1,2,3\n", "unknown columns"),
        ("arrival_s,input_tokens,output_tokens\n", "fewer than two"),
        ("arrival_s,input_tokens,output_tokens\n0,1,1\n0,1,1\n", "at one instant"),
        ("arrival_s,input_tokens,output_tokens\nnan,1,1\n1,1,1\n", "not a finite number"),
        ("arrival_s,input_tokens,output_tokens\n0,1\n1,1,1\n", "cannot read this request"),
        ("arrival_s,input_tokens,output_tokens\n0,-1,1\n1,1,1\n", "'-1' is not a number of tokens"),
        ("arrival_s,input_tokens,output_tokens\n0,0,1\n1,1,1\n", "must be from 1 to 10,000,000"),
    ],
)
def test_bad_traces(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        trace(tmp_path, text)
