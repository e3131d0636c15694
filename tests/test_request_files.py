"""Prompts files: sizes that come out right, and what the runtime will refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeplan.planner.diagnostics import CompileError
from moeplan.planner.request_files import PromptsFile, read_prompts
from moeplan.planner.spec import parse_spec

PROMPTS_SPEC = "name: x\nmodel: mixtral-8x7b\nworkload: {batch: {prompts: p.jsonl}}\nmachine: cpu-2core\n"


def prompts(tmp_path: Path, text: str) -> PromptsFile:
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    found = read_prompts(parse_spec(PROMPTS_SPEC, str(tmp_path / "spec.yaml")), tmp_path)
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


def test_line_ends_inside_json_text(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 raw in text; they end no line of the file."""
    line = '{"custom_id": "a", "body": {"prompt": "x\u2028y\x85z"}}'
    assert prompts(tmp_path, line).requests == 1
