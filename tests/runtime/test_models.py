"""Every architecture says what transformers says, however the plan moves its weights and reads its prompts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.model_config import read_config
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.models.tensors import CORRECTION, find_parts
from moeplan.runtime_min.plan_file import ModelPlan, load
from moeplan.runtime_min.stream import Engine

from .architectures import MODELS, plan_of, save
from .folders import GREEDY, VOCAB, Shape, make_plan, write_plan

LENGTHS = (5, 48, 1, 7, 7, 30, 2)
NEW = 6
HELD = {
    "in memory": lambda model: {"resident_pages": 1 + model.experts, "slots": 0},
    "streamed, prompts in parts": lambda model: {"slots": 2, "pass_tokens": 20, "kv_tokens": 256},
    "half resident, pages of experts": lambda model: {
        "resident_pages": 1,
        "experts_per_page": 2,
        "slots": 2,
    },
    "routed, guessed": lambda model: {"routed": True, "slots": 4, "guesses": min(2, model.experts)},
}


def prompts() -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (length,), generator=source).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> tuple[Path, Any, ModelPlan]:
    folder = tmp_path_factory.mktemp("checkpoint")
    reference = save(folder, MODELS[request.param])
    return folder, reference, plan_of(folder)


def check(reference: Any, batch: list[Generation]) -> None:
    for generation in batch:
        with torch.inference_mode():
            context = torch.tensor([[*generation.prompt, *generation.tokens[:-1]]])
            scores = reference(context, use_cache=False).logits[0, len(generation.prompt) - 1 :]
        assert generation.tokens == scores.argmax(-1).tolist()
        found = [scored.logprob for scored in generation.scored]
        expected = scores.log_softmax(-1).max(-1).values
        torch.testing.assert_close(torch.tensor(found), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("held", HELD)
def test_stream_plans_say_what_transformers_says(model, tmp_path, held):
    folder, reference, counted = model
    plan = make_plan(Shape(), model=counted, sequences=7, micro_batch=3, **HELD[held](counted))
    runtime_dir = write_plan(tmp_path, plan)
    batch = [Generation(text, NEW, GREEDY, top_scored=1) for text in prompts()]
    with Engine(runtime_dir, load(runtime_dir), folder) as engine:
        engine.run(batch)
    check(reference, batch)


def test_the_planner_counts_what_the_checkpoint_has(model):
    """Parameters, and the corrections beside them, against transformers' own and the tensors that are read."""
    folder, reference, counted = model
    assert counted.parameters == sum(p.numel() for p in reference.parameters())
    config = read_config(folder, counted, 64)
    parts = find_parts(folder, counted, config)
    corrections = sum(math.prod(part.shape) for name, part in parts.items() if name.endswith(CORRECTION))
    assert counted.router_corrections == corrections
    assert counted.parameters == sum(math.prod(part.shape) for part in parts.values()) - corrections


def test_every_architecture_is_among_the_models():
    shown = {small.model_type or name.split(",")[0] for name, small in MODELS.items()}
    assert shown >= set(BY_MODEL_TYPE) - {"llama4", "olmoe", "qwen3_moe"}  # these in test_architectures.py
