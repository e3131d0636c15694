"""From a spec to answers for each architecture: the runtime accepts what the planner budgeted for it."""

import json
from pathlib import Path

import pytest
import torch
from commands import moeplan

from moeplan.runtime_min.__main__ import main
from moeplan.runtime_min.batch_file import parse_line
from moeplan.runtime_min.prompts import Prompts

from .architectures import MODELS, save
from .folders import VOCAB, Shape, save_checkpoint

SHAPES = {
    "llama": Shape(kind="llama", experts=1, top=1, inner=53),
    "olmoe": Shape(kind="olmoe", head_dim=6),
    "qwen3_moe": Shape(kind="qwen3_moe", tied=True),
}
NEW = 12
SPEC = f"""\
name: job
model: {{path: checkpoint, dtype: float32}}
workload: {{batch: {{requests: 4, prompt: 40, output: {NEW}}}}}
machine: cpu-2core
"""
TEXTS = ["Once upon a time", "I", "A man, a plan, a canal", "It was"]


def request(name: str, text: str) -> str:
    body = {"prompt": text, "max_tokens": NEW, "temperature": 0}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})


@pytest.mark.parametrize("kind", [*SHAPES, "deepseek_v3", "gpt_oss"])
def test_a_compiled_plan_answers_as_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    reference = save_checkpoint(folder, SHAPES[kind]) if kind in SHAPES else save(folder, MODELS[kind])
    lines = [request(str(number), text) for number, text in enumerate(TEXTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "spec.yaml").write_text(SPEC)
    done = moeplan("compile", "spec.yaml", "--no-html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (runtime_dir,) = (tmp_path / "job.plan" / "runtime").iterdir()
    files = [f"--input={tmp_path / 'prompts.jsonl'}", f"--output={tmp_path / 'answers.jsonl'}"]
    assert main(["run", str(runtime_dir), *files]) == 0
    prompts = Prompts(folder, VOCAB)
    answers = (tmp_path / "answers.jsonl").read_text().splitlines()
    for line, answer in zip(lines, answers, strict=True):
        ids = torch.tensor([prompts.encode(parse_line(1, line.encode()))])
        mask = torch.ones_like(ids)
        said = reference.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[0].tolist()
        new = [token for token in said[ids.shape[1] :] if token != 258]
        choice = json.loads(answer)["response"]["body"]["choices"][0]
        assert choice["text"] == prompts.decode(ids[0].tolist(), new)
