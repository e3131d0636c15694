"""From a spec to tokens on a GPU plan: compiled for a card too small for the model, rehearsed on the CPU."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moeplan, plain_children
from runtime.architectures import Small, save
from runtime.folders import Shape, save_checkpoint

from moeplan.codegen.emit.runtime import emit as emit_runtime
from moeplan.planner.pipeline import compile_plan
from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.offload import Offload
from moeplan.runtime_min.plan_file import RuntimePlan, load
from moeplan.runtime_min.ranks import started
from moeplan.runtime_min.sampling import Sampling

SIZES = {"max_position_embeddings": 256, "vocab_size": 40_000}
LARGE = {  # embedding, head and experts of a layer fill what is left of all GPUs
    "mixtral": Small(
        "Mixtral",
        {
            **SIZES,
            "hidden_size": 64,
            "intermediate_size": 1024,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_local_experts": 8,
        },
    ),
    "dbrx": Small(
        "Dbrx",
        {
            "vocab_size": 40_000,
            "d_model": 64,
            "n_heads": 8,
            "n_layers": 18,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.9, "rope_theta": 500.0},
            "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 1024, "moe_num_experts": 8, "moe_top_k": 2},
        },
    ),
    "qwen3_moe": Small(
        "Qwen3Moe",
        {
            **SIZES,
            "hidden_size": 64,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "num_experts": 64,
            "num_experts_per_tok": 4,
        },
    ),
}
EXAMPLE = Path(__file__).parents[1] / "examples" / "tinymoe"
BOX = """\
name: small-box
provenance: calibrated
sigma: 0.4
cpu: {{cores: 2, flops_per_s: {{float32: 2.0e+11, bf16: 1.4e+11}}, launch_s: 5.0e-6}}
dram: {{bytes: 25000000000, bytes_per_s: 2.2e+10}}
disk: {{bytes: 270000000000, bytes_per_s: 2.0e+9}}
gpu: {{name: T4, count: {count}, memory_bytes: {memory_bytes}}}
"""
SPEC = """\
name: job
model: {path: checkpoint, dtype: float32}
workload: {batch: {prompts: prompts.jsonl}}
machine: {file: box.yaml}
"""


def answers(path: Path) -> dict[str, str]:
    lines = map(json.loads, path.read_text().splitlines())
    return {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(EXAMPLE / "checkpoint", tmp_path / "checkpoint")
    for line in (EXAMPLE / "prompts.jsonl").read_text().splitlines()[:6]:
        with (tmp_path / "prompts.jsonl").open("a") as file:
            file.write(line + "\n")
    return tmp_path


def run(folder: Path, memory_bytes: int) -> dict[str, str]:
    """The answers of a plan for a GPU of so much memory."""
    (folder / "box.yaml").write_text(BOX.format(memory_bytes=memory_bytes, count=1))
    (folder / "spec.yaml").write_text(SPEC)
    done = moeplan("compile", "spec.yaml", "--force", cwd=folder)
    assert done.returncode == 0, done.stderr
    command = ["run", "job.plan", "--input", "prompts.jsonl", "--output", f"{memory_bytes}.jsonl"]
    refused = moeplan(*command, cwd=folder)
    assert refused.returncode == 2
    assert "--rehearse" in refused.stderr
    done = moeplan(*command, "--rehearse", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "rehearsal: the CPU took the accelerator's place" in done.stdout
    return answers(folder / f"{memory_bytes}.jsonl")


def test_tokens_do_not_depend_on_where_the_work_is(folder: Path) -> None:
    """The runtime accepts what the planner budgeted, and says what the CPU plan says."""
    (folder / "spec.yaml").write_text(SPEC.replace("{file: box.yaml}", "cpu-2core"))
    assert moeplan("compile", "spec.yaml", cwd=folder).returncode == 0
    command = ["run", "job.plan", "--input", "prompts.jsonl", "--output", "cpu.jsonl"]
    assert moeplan(*command, cwd=folder).returncode == 0
    expected = answers(folder / "cpu.jsonl")
    assert len(expected) == 6
    assert run(folder, 80_000_000) == expected


def test_a_dense_model_on_a_gpu_too_small_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime accepts the plan and streams the MLPs through the GPU; tokens are transformers'."""
    shape = Shape(kind="llama", layers=8, hidden=256, head_dim=16, experts=1, top=1, inner=1024)
    reference = save_checkpoint(tmp_path / "checkpoint", shape)
    (tmp_path / "box.yaml").write_text(BOX.format(memory_bytes=125_000_000, count=1))
    (tmp_path / "spec.yaml").write_text(
        SPEC.replace("prompts: prompts.jsonl", "requests: 3, prompt: 20, output: 8")
    )
    folder, made = compiled(tmp_path)
    monkeypatch.setitem(sys.modules, "numba", None)  # the schedule runs as plain Python
    assert (made.model.experts, made.offload.resident_experts, made.schedule.kind) == (1, 0, "offload")
    prompts = [[257, 1, 2, 3], [257, *range(40, 59)], [257]]
    batch = [Generation(prompt, 8, Sampling(temperature=0.0, top_p=1.0, seed=0)) for prompt in prompts]
    with Offload(folder, made, tmp_path / "checkpoint", torch.device("cpu")) as engine:
        engine.run(batch)
    check(reference, batch)


@pytest.mark.parametrize(
    ("kind", "gpus", "memory_bytes", "form"),
    [
        ("mixtral", 2, 66_000_000, "width"),
        ("dbrx", 4, 44_000_000, "width"),
        ("qwen3_moe", 2, 56_000_000, "whole"),
    ],
)
def test_a_model_that_only_several_gpus_hold(
    tmp_path: Path, kind: str, gpus: int, memory_bytes: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published settings in small: experts streamed through 2 and 4 T4s, the model on all of them; many
    small experts come out whole."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    reference = save(checkpoint, LARGE[kind])
    (tmp_path / "box.yaml").write_text(BOX.format(memory_bytes=memory_bytes, count=gpus))
    (tmp_path / "spec.yaml").write_text(
        SPEC.replace("prompts: prompts.jsonl", "requests: 3, prompt: 20, output: 3")
    )
    folder, made = compiled(tmp_path)
    monkeypatch.setitem(sys.modules, "numba", None)
    assert (made.offload.gpus, made.offload.expert_shares, made.schedule.kind) == (gpus, form, "offload")
    assert made.pages.pages_per_layer > 0
    prompts = [[257, 1, 2, 3], [257, *range(40, 59)], [39_999]]
    batch = [Generation(prompt, 3, Sampling(temperature=0.0, top_p=1.0, seed=0)) for prompt in prompts]
    with (
        plain_children(),
        started(folder, made, checkpoint, rehearse=True) as ranks,
        Offload(folder, made, checkpoint, ranks.device, ranks) as engine,
    ):
        engine.run(batch)
        loaded = [rank.loaded_bytes for rank in ranks.reports]
    assert len(loaded) == gpus
    assert max(loaded) < 1.05 * min(loaded)
    check(reference, batch)


def compiled(folder: Path) -> tuple[Path, RuntimePlan]:
    """The runtime folder of folder/spec.yaml's plan, and what it says."""
    plan = compile_plan((folder / "spec.yaml").read_bytes(), str(folder / "spec.yaml"))
    for name, text in emit_runtime(plan).items():
        (folder / "job.plan" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "job.plan" / name).write_text(text)
    (runtime_dir,) = (folder / "job.plan" / "runtime").iterdir()
    return runtime_dir, load(runtime_dir)


def check(reference: Any, batch: list[Generation]) -> None:
    """Each token is the reference's best after those before it."""
    for generation in batch:
        prompt = generation.prompt
        context = torch.tensor([[*prompt, *generation.tokens[:-1]]])
        with torch.inference_mode():
            scores = reference(context).logits[0, len(prompt) - 1 :]
        assert generation.tokens == scores.argmax(-1).tolist()
