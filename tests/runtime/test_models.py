"""Every architecture says what transformers says, however weights move and prompts are read."""

import copy
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

from moeplan.codegen.emit.runtime import emit
from moeplan.planner.diagnostics import Span
from moeplan.planner.model_config import load_model
from moeplan.planner.pipeline import compile_plan
from moeplan.runtime_min.checkpoint import CheckpointError
from moeplan.runtime_min.engine import Generation, pack
from moeplan.runtime_min.limits import check_memory, check_supported, stay_bytes
from moeplan.runtime_min.model_config import read_config
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.models.tensors import CORRECTION, find_parts, page_names
from moeplan.runtime_min.offload import Offload
from moeplan.runtime_min.plan_file import (
    ModelPlan,
    kv_bytes,
    load,
    weights_bytes,
    workspace_bytes,
)
from moeplan.runtime_min.stream import Engine

from .architectures import MODELS, plan_of, save
from .folders import GREEDY, VOCAB, Shape, make_offload_plan, make_plan, offload_schedule, write_plan

Model = tuple[Path, Any, ModelPlan]  # the checkpoint, transformers' model of it, what the planner counts

ONE_OF_EACH = {name.split(",")[0]: name for name in reversed(MODELS)}  # by model_type, the first of each
LENGTHS = (5, 48, 1, 7, 7, 30, 2)
NEW = 4
HELD = {
    "in memory": lambda model: {"resident_pages": 1 + model.experts, "slots": 0},
    "streamed, prompts in parts": lambda model: {"slots": 2, "pass_tokens": 20, "kv_tokens": 256},
    "half resident, pages of experts": lambda model: {
        "resident_pages": 1,
        "experts_per_page": 2,
        "slots": 2,
    },
}
SOME = ("deepseek_v3", "gpt_oss", "llama4_text")  # with layers without experts, fused ones, both


def prompts() -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (length,), generator=source).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], Model]:
    """A model by its name, written once."""

    @functools.cache
    def written(name: str) -> Model:
        folder = tmp_path_factory.mktemp("checkpoint")
        return folder, save(folder, MODELS[name]), plan_of(folder)

    return written


@pytest.fixture(params=MODELS)
def model(request, saved) -> Model:
    found: Model = saved(request.param)
    return found


def generated(engine: Engine | Offload) -> list[Generation]:
    batch = [Generation(text, NEW, GREEDY, top_scored=1) for text in prompts()]
    with engine:
        engine.run(batch)
    return batch


def check(reference: Any, batch: list[Generation]) -> None:
    for generation in batch:
        with torch.inference_mode():
            context = torch.tensor([[*generation.prompt, *generation.tokens[:-1]]])
            scores = reference(context, use_cache=False).logits[0, len(generation.prompt) - 1 :]
        assert generation.tokens == scores.argmax(-1).tolist()
        found = [scored.logprob for scored in generation.scored]
        expected = scores.log_softmax(-1).max(-1).values
        torch.testing.assert_close(torch.tensor(found), expected, atol=2e-4, rtol=1e-4)


def check_stream(model: Model, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder, reference, counted = model
    plan = make_plan(Shape(), model=counted, sequences=7, micro_batch=3, **changes)
    runtime_dir = write_plan(tmp_path, plan)
    check(reference, generated(Engine(runtime_dir, load(runtime_dir), folder)))


@pytest.mark.parametrize("held", HELD)
def test_stream_plans_say_what_transformers_says(model, tmp_path, held):
    check_stream(model, tmp_path, HELD[held](model[2]))


@pytest.mark.parametrize("name", SOME)
def test_routed_reading_says_what_transformers_says(name, saved, tmp_path):
    check_stream(saved(name), tmp_path, {"routed": True, "slots": 4, "guesses": 2})


def check_offload(model: Model, tmp_path: Path, cpu_experts: int) -> None:
    """Attention on the CPU, out of copied and out of device memory."""
    folder, reference, counted = model
    plan = make_offload_plan(Shape(), model=counted, slots=6, cpu_experts=cpu_experts)
    runtime_dir = write_plan(tmp_path, plan, offload_schedule(plan, attend=(1, 2)))
    plan = load(runtime_dir)
    check_supported(runtime_dir / "runtime.json", plan)
    check(reference, generated(Offload(runtime_dir, plan, folder, torch.device("cpu"))))


def test_offload_plans_say_what_transformers_says(model, tmp_path):
    check_offload(model, tmp_path, int(model[2].experts > 1))


@pytest.mark.parametrize("name", SOME)
def test_experts_on_the_device_alone(name, saved, tmp_path):
    check_offload(saved(name), tmp_path, 0)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_half_precision_is_as_near_as_transformers(name, saved, tmp_path):
    """Scores in bf16 are no further from float32 than 1.5 times transformers' own in bf16: the median of
    prompts, as rounding changes the choice of experts in some."""
    folder, reference, counted = saved(ONE_OF_EACH[name])
    source = torch.Generator().manual_seed(5)
    texts = [torch.randint(0, VOCAB, (1 + at,), generator=source).tolist() for at in range(24)]
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


@pytest.mark.parametrize("memory", ["2 GiB", "640 MiB"])
@pytest.mark.parametrize("name", ["deepseek_v3, yarn, biases", "gpt_oss", "glm4_moe", "dbrx", "llama4_text"])
def test_a_compiled_plan_counts_to_the_byte(name, memory, saved, tmp_path, monkeypatch):
    """Items that the planner made and the runtime's own counts; with all weights in memory and streamed."""
    folder = saved(name)[0]
    text = (
        f"name: small\nmodel: {{path: {folder}, dtype: float32}}\n"
        "workload: {batch: {requests: 300, prompt: 50, output: 12}}\n"
        f"machine: {{name: cpu-2core, memory: {memory}}}\n"
    )
    with monkeypatch.context() as patch:  # the planner's loops are compiled once, not for each plan
        patch.setitem(sys.modules, "numba", numba)
        plan = compile_plan(text, str(tmp_path / "spec.yaml"))
    for path, content in emit(plan).items():
        (tmp_path / Path(path).name).write_text(content)
    plan = load(tmp_path)
    m, pages, held = plan.model, plan.pages, plan.memory
    config = read_config(folder, m, plan.batch.context_tokens)
    shapes = {n: ref.shape for n, ref in find_parts(folder, m, config).items()}
    moving = {
        n
        for layer in range(m.layers)
        for page in range(pages.resident_pages, pages.pages_per_layer)
        for n in page_names(m, config, pages, layer, page)
    }
    check_memory(tmp_path / "runtime.json", plan, shapes, moving)
    stay = sum(stay_bytes(plan, n, shape) for n, shape in shapes.items() if n not in moving)
    assert stay == weights_bytes(m, pages) == held.weights_bytes
    assert kv_bytes(m, plan.batch) == held.kv_bytes
    assert workspace_bytes(m, plan.batch, pages) == held.workspace_bytes


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("deepseek_v3", {"n_group": 4}, "n_group is 4"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is None, expected a whole number"),
        ("deepseek_v3", {"kv_lora_rank": 21}, "kv_lora_rank + qk_rope_head_dim is 27, the plan has 26"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "layers with experts is 1, the plan has 2"),
        ("deepseek_v3", {"n_shared_experts": 1}, "width of shared experts is 18, the plan has 36"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        (
            "phimoe, longrope, window",
            {"max_position_embeddings": 256},
            "original_max_position_embeddings is 64",
        ),
        ("gpt_oss", {"layer_types": ["sliding_attention"]}, "layer_types has 1 layers"),
        ("dbrx", {"attn_config": {"kv_n_heads": 2}}, "num_key_value_heads is 2, the plan has 3"),
        ("llama4", {"text_config": None}, "text_config is None, expected an object"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_a_config_that_is_not_executed_is_refused_by_name(name, change, says, saved, tmp_path):
    folder, _, counted = saved(name)
    told = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, **change}))
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path, counted, 65)
    assert any(problem.startswith(f"{tmp_path / 'config.json'}: {says}") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama, biases", {"mlp_bias": True}),
        ("mixtral, window", {"hidden_act": "gelu"}),
        ("qwen3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("qwen2_moe", {"use_sliding_window": True}),
        ("dbrx", {"quantization_config": {"quant_method": "fp8"}}),
        ("llama4", {"quantization_config": {"quant_method": "fp8"}}),
        ("gpt_oss", {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}),
        ("mixtral, window", {"quantization_config": {"quant_method": "mxfp4"}}),
    ],
)
def test_planner_and_runtime_refuse_alike(name, change, saved, tmp_path):
    folder, _, counted = saved(name)
    told = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, **change}))
    assert not load_model(folder, Span("spec.yaml", 1, 1)).not_executed
    assert load_model(tmp_path, Span("spec.yaml", 1, 1)).not_executed
    with pytest.raises(CheckpointError):
        read_config(tmp_path, counted, 64)


def test_capitals_of_a_class_may_differ(saved, tmp_path):
    folder, _, counted = saved("phimoe")
    told = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "architectures": ["PhiMoEForCausalLM"]}))
    assert read_config(tmp_path, counted, 64) == read_config(folder, counted, 64)


def test_rotary_base_of_a_nested_group(saved, tmp_path):
    """DBRX's published config.json has it among the keys of attention."""
    folder, _, counted = saved("dbrx")
    told = json.loads((folder / "config.json").read_text())
    told.pop("rope_parameters")
    told["attn_config"]["rope_theta"] = 500000
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert read_config(tmp_path, counted, 64).rope_theta == 500000


def test_every_architecture_is_among_the_models():
    assert set(ONE_OF_EACH) == set(BY_MODEL_TYPE)
