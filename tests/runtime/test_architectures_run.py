"""From a spec to answers for each architecture: the runtime accepts what the planner budgeted for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .folders import Shape, save_checkpoint

SHAPES = {
    "llama": Shape(kind="llama", experts=1, top=1, inner=53),
    "olmoe": Shape(kind="olmoe", head_dim=6),
    "qwen3_moe": Shape(kind="qwen3_moe", tied=True),
}
SPEC = """\
name: job
model: {path: checkpoint, dtype: float32}
workload: {batch: {prompts: prompts.jsonl}}
machine: cpu-2core
"""
PROMPTS = Path(__file__).parents[2] / "examples" / "tinymoe" / "prompts.jsonl"


def moeplan(*arguments: str, cwd: Path) -> None:
    code = "import sys; sys.argv[0] = 'moeplan'; from moeplan.planner.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", SHAPES)
def test_a_compiled_plan_is_executed(kind: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    save_checkpoint(tmp_path / "checkpoint", SHAPES[kind])
    (tmp_path / "prompts.jsonl").write_text("\n".join(PROMPTS.read_text().splitlines()[:4]) + "\n")
    (tmp_path / "spec.yaml").write_text(SPEC)
    moeplan("compile", "spec.yaml", cwd=tmp_path)
    moeplan("run", "job.plan", "--input", "prompts.jsonl", "--output", "answers.jsonl", cwd=tmp_path)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    # Lengths are estimated at compile time and this tokenizer spends a token per byte: only the first fits.
    assert answers[0]["response"]["body"]["usage"]["completion_tokens"] == 48
