"""Every architecture says what transformers says, however weights move and prompts are read."""

import copy
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplan.runtime_min.engine import Generation, pack
from moeplan.runtime_min.limits import check_supported
from moeplan.runtime_min.model_config import read_config
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.models.tensors import CORRECTION, find_parts
from moeplan.runtime_min.offload import Offload
from moeplan.runtime_min.plan_file import ModelPlan, PlanFileError, load
from moeplan.runtime_min.stream import Engine

from .architectures import MODELS, plan_of, save
from .folders import GREEDY, VOCAB, Shape, make_offload_plan, make_plan, offload_schedule, write_plan

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


@pytest.mark.parametrize("side", ["GPU", "both"])
def test_offload_plans_say_what_transformers_says(model, tmp_path, side):
    """With attention on the CPU, out of copied and out of device memory, and experts on one side or both."""
    folder, reference, counted = model
    cpu = {"cpu_experts": 1} if side == "both" and counted.experts > 1 else {}
    plan = make_offload_plan(Shape(), model=counted, slots=6, **cpu)
    runtime_dir = write_plan(tmp_path, plan, offload_schedule(plan, attend=(1, 2)))
    plan = load(runtime_dir)
    if counted.latent_dim:
        with pytest.raises(PlanFileError, match="cache of latent attention"):
            check_supported(runtime_dir / "runtime.json", plan)
        return
    batch = [Generation(text, NEW, GREEDY, top_scored=1) for text in prompts()]
    with Offload(runtime_dir, plan, folder, torch.device("cpu")) as engine:
        engine.run(batch)
    check(reference, batch)


def test_half_precision_is_as_near_as_transformers(model, tmp_path):
    """Scores in bf16 are no further from float32 than 1.5 times transformers' own in bf16: the median of
    prompts, as rounding changes the choice of experts in some."""
    folder, reference, counted = model
    source = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, VOCAB, (1 + at,), generator=source).tolist() for at in range(32)]
    many = {"sequences": len(texts), "micro_batch": len(texts), "slots": 2}
    runtime_dir = write_plan(
        tmp_path, make_plan(Shape(), model=replace(counted, compute_dtype="bf16"), **many)
    )
    scores: list[torch.Tensor] = []
    with Engine(runtime_dir, load(runtime_dir), folder) as engine:
        batch = [Generation(text, 1, GREEDY) for text in texts]
        engine.run(batch, after_pass=lambda: scores.append(engine.model.logits.clone()))
    order = pack(list(map(len, texts)), {}, len(texts), len(texts))
    rows = [sorted(order).index(place) for place in order]
    half = copy.deepcopy(reference).to(torch.bfloat16)
    ours, theirs = [], []
    for row, text in zip(rows, texts, strict=True):
        with torch.inference_mode():
            tokens = torch.tensor([text])
            exact = reference(tokens, use_cache=False).logits[0, -1]
            their = half(tokens, use_cache=False).logits[0, -1]
        ours.append(float((scores[0][row] - exact).norm()))
        theirs.append(float((their - exact).norm()))
    assert statistics.median(ours) <= 1.5 * statistics.median(theirs)


def test_the_planner_counts_what_the_checkpoint_has(model):
    """Parameters and the corrections beside them, against transformers' own and the tensors read."""
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
