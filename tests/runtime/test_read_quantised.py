"""Checkpoints in fp8 and MXFP4 as published: read at their own bytes, and saying what they stand for."""

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moeplan.codegen.emit.runtime import emit
from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.model_config import load_model
from moeplan.planner.pipeline import compile_plan
from moeplan.runtime_min.checkpoint import CheckpointError
from moeplan.runtime_min.limits import check_memory, check_supported, stay_bytes
from moeplan.runtime_min.model_config import read_config
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.models.tensors import find_parts, page_names
from moeplan.runtime_min.plan_file import PlanFileError, load, page_bytes, weights_bytes
from moeplan.runtime_min.stream import Engine

from .architectures import LATENT, LOCAL, MODELS, QWEN_MOE, SIZES, Small, plan_of, save
from .folders import Shape, make_offload_plan, make_plan, offload_schedule, write_plan
from .test_models import HELD, Model, check, generated

KEPT = ["lm_head", "model.layers.0.input_layernorm", "model.layers.1.mlp.gate", "re:.*mlp.gate$"]
CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    },
}


def blocks(height: int, width: int) -> dict[str, Any]:
    return {"quant_method": "fp8", "weight_block_size": [height, width], "modules_to_not_convert": KEPT}


WIDE = {**SIZES, "hidden_size": 96, "intermediate_size": 160, "head_dim": 10, "sliding_window": 9}
NAMES: dict[str, tuple[Small, dict[str, Any]]] = {
    "deepseek_v3": (MODELS["deepseek_v3"], blocks(16, 24)),
    "deepseek_v3, even": (Small("DeepseekV3", {**LATENT, "hidden_size": 128}), blocks(128, 128)),
    "kimi_k2, yarn": (replace(MODELS["deepseek_v3, yarn, biases"], model_type="kimi_k2"), blocks(7, 5)),
    "glm4_moe": (MODELS["glm4_moe"], blocks(128, 128)),
    "mixtral, by channel": (Small("Mixtral", {**SIZES, **LOCAL}), CHANNEL),
    "qwen2_moe, one scale": (MODELS["qwen2_moe"], {"quant_method": "fp8"}),
    "qwen3_moe": (Small("Qwen3Moe", {**QWEN_MOE, "mlp_only_layers": [1]}), blocks(16, 16)),
    "llama": (MODELS["llama, biases"], blocks(8, 8)),
    "gpt_oss": (Small("GptOss", {**WIDE, **LOCAL}), {"quant_method": "mxfp4"}),
}
Found = dict[str, Tensor]


def rounded(weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in fp8, the scales of its blocks, and what both stand for, block by block."""
    rows, columns = weight.shape
    data, stand = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
    scales = torch.empty(-(-rows // height), -(-columns // width))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            scales[i, j] = weight[here].abs().max() / 448
            data[here] = (weight[here] / scales[i, j]).to(torch.float8_e4m3fn)
            stand[here] = data[here].float() * scales[i, j]
    return data, scales, stand


def in_fp8(found: Found, told: dict[str, Any], kind: Any) -> tuple[Found, Found]:
    """The tensors as stored, and as what these stand for."""
    stored, stand = {}, dict(found)
    gates = (f".{kind.gate}.weight", f".{kind.shared_gate}.weight")
    for name, weight in found.items():
        stored[name] = weight
        if weight.dim() != 2 or ".layers." not in name or name.endswith(gates):
            continue
        rows, columns = weight.shape
        height, width = told.get("weight_block_size") or (
            (1, columns) if told is CHANNEL else (rows, columns)
        )
        stored[name], scales, stand[name] = rounded(weight, height, width)
        if told.get("weight_block_size"):
            stored[f"{name}_scale_inv"] = scales
        else:
            stored[f"{name}_scale"] = scales if told is CHANNEL else scales[0, 0].clone()
            stored[name.replace("weight", "input_scale")] = torch.ones(1)
    return stored, stand


def in_mxfp4(found: Found) -> tuple[Found, Found]:
    source = torch.Generator().manual_seed(0)
    stored, stand = {}, dict(found)
    for name, weight in found.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = weight
            continue
        experts, inner, outer = weight.shape
        shape = (experts, outer, inner // 32, 16)
        data = torch.randint(0, 256, shape, generator=source, dtype=torch.uint8)
        scales = torch.randint(120, 126, shape[:3], generator=source, dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = data, scales
        stand[name] = convert_moe_packed_tensors(data, scales, dtype=torch.float32).contiguous()
    return stored, stand


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """A quantised model by its name, transformers' of what it stands for, and what the planner counts."""

    @functools.cache
    def written(name: str) -> Model:
        small, told = NAMES[name]
        folder = tmp_path_factory.mktemp("checkpoint")
        reference = save(folder, small)
        file = folder / "model.safetensors"
        config = json.loads((folder / "config.json").read_text())
        found = load_file(file)
        kind = BY_MODEL_TYPE[config["model_type"]]
        stored, stand = in_mxfp4(found) if name == "gpt_oss" else in_fp8(found, told, kind)
        save_file(stand, file, {"format": "pt"})
        plain = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**plain, "model_type": reference.config.model_type}))
        model_class = getattr(transformers, f"{small.name}ForCausalLM")
        reference = model_class.from_pretrained(folder, dtype=torch.float32).eval()
        if hasattr(reference, "set_experts_implementation"):
            reference.set_experts_implementation("eager")
        save_file(stored, file)
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
        return folder, reference, plan_of(folder)

    return written


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_stands_for(name: str, held: str, saved: Any, tmp_path: Path) -> None:
    folder, reference, counted = saved(name)
    changes = HELD[held](counted)
    plan = make_plan(Shape(), model=counted, sequences=7, micro_batch=3, **changes)
    runtime_dir = write_plan(tmp_path, plan)
    check(reference, generated(Engine(runtime_dir, load(runtime_dir), folder)))


def test_transformers_dequantises_alike() -> None:
    torch.manual_seed(0)
    data, scales, stand = rounded(torch.randn(256, 384), 128, 128)
    assert torch.equal(Fp8Dequantize(None)._dequantize_one(data, scales), stand)


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_read_at_the_bytes_that_the_planner_counts(name: str, saved: Any) -> None:
    folder, _, counted = saved(name)
    refs = find_parts(folder, counted, read_config(folder, counted, 64))
    pages = make_plan(Shape(), model=counted).pages
    config = read_config(folder, counted, 64)
    for layer in range(counted.layers):
        for page in range(pages.pages_per_layer):
            names = page_names(counted, config, pages, layer, page)
            if names:
                assert sum(refs[n].nbytes for n in names) == page_bytes(counted, pages, page, 4)
    everything = sum(ref.nbytes for n, ref in refs.items())
    stored = sum(
        t.nbytes for n, t in load_file(folder / "model.safetensors").items() if "input_scale" not in n
    )
    assert everything == stored


@pytest.mark.parametrize("memory", ["2 GiB", "640 MiB"])
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "gpt_oss", "llama", "mixtral, by channel"])
def test_a_compiled_plan_counts_to_the_byte(
    name: str, memory: str, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(name)[0]
    text = (
        f"name: small\nmodel: {{path: {folder}, dtype: float32}}\n"
        "workload: {batch: {requests: 300, prompt: 50, output: 12}}\n"
        f"machine: {{name: cpu-2core, memory: {memory}}}\n"
    )
    with monkeypatch.context() as patch:  # the planner's loops are compiled once, not for each plan
        patch.setitem(sys.modules, "numba", numba)
        made = compile_plan(text, str(tmp_path / "spec.yaml"))
    for path, content in emit(made).items():
        (tmp_path / Path(path).name).write_text(content)
    plan = load(tmp_path)
    m, pages = plan.model, plan.pages
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
    assert stay == weights_bytes(m, pages) == plan.memory.weights_bytes
    with Engine(tmp_path, plan, folder) as engine:
        kept = engine.model._weights
        held = sum(getattr(x, "nbytes", 0) or x.data.nbytes for x in kept.values())
    assert held == stay


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("deepseek_v3", {"modules_to_not_convert": ["model.layers.0.self_attn"]}),
        ("deepseek_v3", {"fmt": "e5m2"}),
        ("deepseek_v3", {"weight_block_size": [16]}),
        ("mixtral, by channel", {"kv_cache_scheme": {"num_bits": 8}}),
        ("mixtral, by channel", {"config_groups": {"a": {}, "b": {}}}),
        ("gpt_oss", {"quant_method": "fp8"}),
        ("gpt_oss", {"quant_method": "awq", "bits": 4, "group_size": 128}),
    ],
)
def test_what_is_in_other_bits_is_refused_by_planner_and_runtime_alike(
    name: str, change: dict[str, Any], saved: Any, tmp_path: Path
) -> None:
    """The planner refuses altogether where it does not know the size."""
    folder, _, counted = saved(name)
    told = json.loads((folder / "config.json").read_text())
    told["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"quantization_config is .*, the plan has"):
        read_config(tmp_path, counted, 64)
    if "weight_block_size" in change or name == "mixtral, by channel":
        with pytest.raises(CompileError, match=r"weight_block_size|quant_method 'compressed-tensors'"):
            load_model(tmp_path, Span("spec.yaml", 1, 1))
    else:
        [what] = load_model(tmp_path, Span("spec.yaml", 1, 1)).not_executed
        assert what.startswith("quantised checkpoints")


def test_a_tensor_in_another_dtype_is_named(saved: Any, tmp_path: Path) -> None:
    folder, _, counted = saved("deepseek_v3")
    shutil.copytree(folder, tmp_path / "copy")
    found = load_file(folder / "model.safetensors")
    plain, lost = (
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv",
    )
    found[plain] = found[plain].float()
    found.pop(lost)
    odd = "model.layers.1.mlp.gate.weight"
    found[odd] = found[odd].to(torch.float8_e4m3fn)
    save_file(found, tmp_path / "copy" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        find_parts(tmp_path / "copy", counted, read_config(folder, counted, 64))
    text = "\n".join(caught.value.problems)
    assert f"{plain}: is F32 [36, 48], not F8_E4M3 [36, 48] of fp8" in text
    assert f"{lost}: is missing" in text
    assert f"{odd}: has dtype F8_E4M3" in text


def test_offload_plans_are_refused_by_name(saved: Any, tmp_path: Path) -> None:
    counted = saved("gpt_oss")[2]
    plan = make_offload_plan(Shape(), model=counted)
    runtime_dir = write_plan(tmp_path, plan, offload_schedule(plan))
    with pytest.raises(PlanFileError, match="weights in mxfp4 are executed by stream plans only"):
        check_supported(runtime_dir / "runtime.json", load(runtime_dir))


def test_the_planner_counts_published_bytes() -> None:
    """A layer of DeepSeek-V3 by hand, its projections in blocks of 128 x 128."""
    from moeplan.planner.catalog import load_catalog

    models = load_catalog(None, Span("spec.yaml", 1, 1)).models
    scaled, hidden = models["deepseek-v3"].scaled, 7168
    shapes = [(1536, hidden), (128 * 192, 1536), (576, hidden), (128 * 256, 512), (hidden, 128 * 128)]
    scales = sum(4 * math.ceil(rows / 128) * math.ceil(columns / 128) for rows, columns in shapes)
    assert scaled.attention_bytes == sum(map(math.prod, shapes)) + scales
    assert scaled.expert_bytes == 3 * hidden * 2048 + 4 * 3 * 56 * 16
    assert models["gpt-oss-20b"].scaled.expert_bytes == 3 * 2880 * 2880 * 17 // 32
    assert not models["kimi-k2"].not_executed
    assert not models["gpt-oss-120b"].not_executed
