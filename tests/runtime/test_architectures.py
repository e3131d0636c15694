"""Every architecture says what transformers says: streamed, in memory, and as a rehearsed offload plan."""

import json
from pathlib import Path

import pytest
import torch

from moeplan.runtime_min.checkpoint import CheckpointError
from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.model_config import read_config
from moeplan.runtime_min.offload import Offload
from moeplan.runtime_min.plan_file import load
from moeplan.runtime_min.stream import Engine

from .folders import (
    GREEDY,
    VOCAB,
    Shape,
    in_memory,
    make_offload_plan,
    make_plan,
    offload_schedule,
    save_checkpoint,
    write_plan,
)

LENGTHS = (5, 48, 1, 7, 7, 30, 2)
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DENSE = {"kind": "llama", "experts": 1, "top": 1}
SHAPES = {
    "Qwen3": Shape(kind="qwen3_moe", config=(("norm_topk_prob", True),)),
    "Qwen3, shares of all, tied, odd": Shape(
        kind="qwen3_moe", hidden=37, inner=19, head_dim=6, heads=6, kv_heads=3, experts=5, top=3, tied=True
    ),
    "OLMoE": Shape(kind="olmoe", head_dim=6),
    "OLMoE, clipped": Shape(
        kind="olmoe", hidden=36, heads=6, kv_heads=3, head_dim=6, config=(("clip_qkv", 0.5),)
    ),
    "Llama": Shape(**DENSE),
    "Llama 3.1, tied": Shape(**DENSE, layers=3, tied=True, config=(("rope_parameters", LLAMA_3),)),
}


def greedy(engine: Engine | Offload, new: int = 6) -> list[Generation]:
    source = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, VOCAB, (length,), generator=source).tolist() for length in LENGTHS]
    batch = [Generation(text, new, GREEDY) for text in texts]
    with engine:
        engine.run(batch)
    return batch


@pytest.fixture(scope="module", params=SHAPES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = SHAPES[request.param]
    return folder, shape, save_checkpoint(folder, shape)


def check(reference, batch: list[Generation]) -> None:
    for generation in batch:
        with torch.inference_mode():
            context = torch.tensor([[*generation.prompt, *generation.tokens[:-1]]])
            expected = reference(context).logits[0, len(generation.prompt) - 1 :].argmax(-1).tolist()
        assert generation.tokens == expected


@pytest.mark.parametrize("held", ["in memory", "streamed", "half resident"])
def test_stream_plans_say_what_transformers_says(model, tmp_path, held):
    folder, shape, reference = model
    changes = {
        "in memory": in_memory(shape),
        "streamed": {"slots": 2},
        "half resident": {"resident_pages": 1},
    }
    plan = make_plan(shape, sequences=7, micro_batch=3, **changes[held])
    runtime_dir = write_plan(tmp_path, plan)
    check(reference, greedy(Engine(runtime_dir, load(runtime_dir), folder)))


def test_offload_plans_say_what_transformers_says(model, tmp_path):
    folder, shape, reference = model
    cpu = {"cpu_experts": 1} if shape.experts > 1 else {}
    plan = make_offload_plan(shape, slots=6, **cpu)
    runtime_dir = write_plan(tmp_path, plan, offload_schedule(plan, attend=(1, 2)))
    check(reference, greedy(Offload(runtime_dir, load(runtime_dir), folder, torch.device("cpu"))))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("mlp_only_layers", [0]),
        ("decoder_sparse_step", 2),
        ("num_experts", 9),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, key, value):
    shape = SHAPES["Qwen3"]
    save_checkpoint(tmp_path, shape)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("num_local_experts")
    config["num_experts"] = shape.experts
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    match = {"mlp_only_layers": "layers with experts", "decoder_sparse_step": "layers with experts"}
    with pytest.raises(CheckpointError, match=match.get(key, key)):
        read_config(tmp_path, make_plan(shape).model, 64)
