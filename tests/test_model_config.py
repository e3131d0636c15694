"""config.json -> Model: counts against transformers' own classes and published figures; every refusal."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.ir.model import Model
from moeplan.planner.model_config import load_model, model_from_config, supported_model_types
from moeplan.runtime_min.plan_file import ARCHITECTURES

WHERE = Span("spec.yaml", 3, 10)

GQA = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MLA = {
    "vocab_size": 128,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
}
V3 = {**MLA, "n_group": 1, "topk_group": 1}
GLM = {
    **GQA,
    "head_dim": 20,
    "first_k_dense_replace": 1,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "use_qk_norm": True,
}
QWEN_MOE = {
    **GQA,
    "head_dim": 20,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
LLAMA4 = {
    **GQA,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 56,
    "interleave_moe_layer_step": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
}
MIXTRAL = {**GQA, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT_OSS = {**MIXTRAL, "head_dim": 20, "sliding_window": 8}
DBRX = {
    "vocab_size": 128,
    "d_model": 48,
    "n_heads": 4,
    "n_layers": 3,
    "max_seq_len": 256,
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000},
    "ffn_config": {"ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2},
}
PHIMOE = {**MIXTRAL, "attention_bias": True, "lm_head_bias": True}

SMALL: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", **MIXTRAL},
    "mixtral, tied, head_dim": {
        "model_type": "mixtral",
        **MIXTRAL,
        "head_dim": 10,
        "tie_word_embeddings": True,
    },
    "dbrx": {"model_type": "dbrx", **DBRX},
    "qwen3_moe": {"model_type": "qwen3_moe", **QWEN_MOE},
    "qwen3_moe, some layers dense": {
        "model_type": "qwen3_moe",
        **QWEN_MOE,
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "attention_bias": True,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **GQA,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe, some layers dense, no biases": {
        "model_type": "qwen2_moe",
        **GQA,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "qkv_bias": False,
    },
    "olmoe": {
        "model_type": "olmoe",
        **GQA,
        "intermediate_size": 40,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "phimoe": {"model_type": "phimoe", **PHIMOE},
    "phimoe, no biases": {"model_type": "phimoe", **MIXTRAL},
    "deepseek_v2": {"model_type": "deepseek_v2", **MLA},
    "deepseek_v2, queries not compressed": {"model_type": "deepseek_v2", **MLA, "q_lora_rank": None},
    "deepseek_v3": {"model_type": "deepseek_v3", **V3},
    "deepseek_v3, biases": {"model_type": "deepseek_v3", **V3, "attention_bias": True},
    "kimi_k2": {"model_type": "kimi_k2", **V3},
    "gpt_oss": {"model_type": "gpt_oss", **GPT_OSS},
    "glm4_moe": {"model_type": "glm4_moe", **GLM},
    "glm4_moe, plain": {"model_type": "glm4_moe", **GLM, "attention_bias": False, "use_qk_norm": False},
    "llama4_text": {"model_type": "llama4_text", **LLAMA4},
    "llama4_text, all moe": {"model_type": "llama4_text", **LLAMA4, "interleave_moe_layer_step": 1},
    "llama4": {"model_type": "llama4", "text_config": {"model_type": "llama4_text", **LLAMA4}},
    "llama": {"model_type": "llama", **GQA, "intermediate_size": 56},
    "llama, biases": {
        "model_type": "llama",
        **GQA,
        "intermediate_size": 56,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", **GQA, "head_dim": 20, "intermediate_size": 56},
    "mistral": {"model_type": "mistral", **GQA, "head_dim": 20, "intermediate_size": 56},
}


def build(config: dict[str, Any], name: str = "small") -> Model:
    return model_from_config(config, name, "test", WHERE)


def transformers_count(config: dict[str, Any]) -> int:
    """Parameters of transformers' model, instantiated without memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    given = dict(config.get("text_config", config))
    model_type = given.pop("model_type")
    # Kimi-K2 is DeepSeek-V3's architecture under another name; transformers knows the latter.
    known = transformers.AutoConfig.for_model({"kimi_k2": "deepseek_v3"}.get(model_type, model_type), **given)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(known)
    return sum(p.numel() for p in model.parameters())


def test_every_supported_type_is_checked_against_transformers() -> None:
    assert {config["model_type"] for config in SMALL.values()} == set(supported_model_types())


@pytest.mark.parametrize("name", SMALL)
def test_parameters_are_those_of_transformers(name: str) -> None:
    """The count equals what the reference implementation allocates, tensor by tensor."""
    assert build(SMALL[name]).parameters.total() == transformers_count(SMALL[name])


@settings(max_examples=12)
@given(
    heads=st.sampled_from([2, 4, 6]),
    head_dim=st.sampled_from([4, 6, 10]),
    layers=st.integers(1, 3),
    inter=st.integers(1, 40),
    experts=st.integers(2, 6),
    tied=st.booleans(),
)
def test_mixtral_of_any_size(
    heads: int, head_dim: int, layers: int, inter: int, experts: int, tied: bool
) -> None:
    config = {
        **SMALL["mixtral"],
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_hidden_layers": layers,
        "intermediate_size": inter,
        "num_local_experts": experts,
        "tie_word_embeddings": tied,
    }
    assert build(config).parameters.total() == transformers_count(config)


@settings(max_examples=12)
@given(
    layers=st.integers(1, 5),
    step=st.integers(1, 3),
    dense=st.lists(st.integers(0, 0), max_size=1),
    head_dim=st.sampled_from([4, 6, 10]),
    bias=st.booleans(),
)
def test_qwen3_moe_of_any_size(layers: int, step: int, dense: list[int], head_dim: int, bias: bool) -> None:
    config = {
        **SMALL["qwen3_moe"],
        "num_hidden_layers": layers,
        "decoder_sparse_step": step,
        "mlp_only_layers": dense,
        "head_dim": head_dim,
        "attention_bias": bias,
    }
    assert build(config).parameters.total() == transformers_count(config)


# Total and active parameters (input embedding included; without multi-token-prediction layers and vision
# towers), in units of one parameter. The rounded figures are those of the model cards and papers named.
PUBLISHED = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),  # 46.7 B / 12.9 B, mistral.ai/news/mixtral-of-experts
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744),  # 141 B / 39 B, mistral.ai/news/mixtral-8x22b
    "dbrx": (131_596_523_520, 36_469_708_800),  # 132 B / 36 B, databricks/dbrx-instruct
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),  # 30.5 B / 3.3 B, arXiv 2505.09388
    "qwen3-235b-a22b": (235_093_634_560, 22_190_763_520),  # 235 B / 22 B, arXiv 2505.09388
    "qwen3-coder-480b-a35b": (480_154_875_392, 35_474_765_312),  # 480 B / 35 B, Qwen3-Coder model card
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280),  # 6.9 B / 1.3 B, arXiv 2409.02060
    "phi-3.5-moe": (41_873_153_344, 6_640_999_744),  # 42 B / 6.6 B, arXiv 2404.14219
    "deepseek-v2-lite": (15_706_484_224, 2_661_150_208),  # 15.7 B, arXiv 2405.04434, appendix B.1
    "deepseek-v3": (671_026_404_352, 37_552_282_624),  # 671 B / 37 B, arXiv 2412.19437
    "kimi-k2": (1_026_408_209_408, 32_861_477_888),  # 1 T / 32 B, arXiv 2507.20534
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704),  # 20.9 B, arXiv 2508.10925, Table 1
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912),  # 116.8 B, arXiv 2508.10925, Table 1
    "glm-4.5": (352_797_814_784, 33_632_251_904),  # 355 B / 32 B with MTP, arXiv 2508.06471
    "glm-4.5-air": (106_852_245_504, 13_424_123_904),  # 106 B / 12 B, arXiv 2508.06471
    "llama-4-scout": (107_769_861_120, 17_172_894_720),  # 109 B with vision / 17 B, Llama 4 model card
    "llama-4-maverick": (400_711_848_960, 17_184_691_200),  # 400 B / 17 B, Llama 4 model card
    "llama-3.1-8b": (8_030_261_248, 8_030_261_248),  # arXiv 2407.21783
    "llama-3.1-70b": (70_553_706_496, 70_553_706_496),  # arXiv 2407.21783
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_catalog_models_have_their_published_size(name: str) -> None:
    model = load_catalog(None, WHERE).models[name]
    assert (model.parameters.total(), model.active_parameters()) == PUBLISHED[name]


def test_every_catalog_model_is_checked() -> None:
    assert set(load_catalog(None, WHERE).models) == set(PUBLISHED)


def test_head_dim_is_not_hidden_over_heads_where_given() -> None:
    """Qwen3-30B-A3B: 32 heads of 128 from a hidden size of 2048."""
    attention = load_catalog(None, WHERE).models["qwen3-30b-a3b"].attention
    assert (attention.heads, attention.kv_heads, attention.head_dim) == (32, 4, 128)


def test_mla_caches_the_latent() -> None:
    """DeepSeek-V3: 512 + 64 values a token and layer, 1,152 bytes in bf16."""
    assert load_catalog(None, WHERE).models["deepseek-v3"].attention.kv_values_per_token() == 576


def test_windows() -> None:
    """gpt-oss: every other layer looks at 128 tokens; Llama 4: three of four at 8192."""
    models = load_catalog(None, WHERE).models
    windows = {
        n: (a.window_tokens, a.windowed_layers) for n, a in ((n, m.attention) for n, m in models.items())
    }
    assert windows["gpt-oss-20b"] == (128, 12)
    assert windows["llama-4-scout"] == (8192, 36)
    assert windows["phi-3.5-moe"] == (0, 0)  # as wide as its context: no window


def test_window_as_wide_as_the_context_is_none() -> None:
    config = {**SMALL["mistral"], "sliding_window": 256}
    assert build(config).attention.window_tokens == 0
    assert build({**config, "sliding_window": 32}).attention.windowed_layers == 3


def test_listed_layer_types_decide_the_window() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert build({**SMALL["gpt_oss"], "layer_types": kinds}).attention.windowed_layers == 1


# Bytes in the checkpoint ------------------------------------------------------------------------------------


def test_gpt_oss_20b_is_as_large_as_published() -> None:
    """openai/gpt-oss-20b, model.safetensors.index.json: total_size 13,761,264,768 bytes."""
    assert load_catalog(None, WHERE).models["gpt-oss-20b"].weight_bytes() == 13_761_264_768


def test_fp8_blocks_carry_a_scale() -> None:
    """128 x 128 blocks: one float32 for 16,384 weights; embeddings, router and norms stay bf16."""
    model = load_catalog(None, WHERE).models["deepseek-v3"]
    assert model.stored_bytes_per_expert_parameter == 1 + 4 / 128**2
    p = model.parameters
    plain = p.embedding + p.lm_head + p.router + p.norms
    expected = (p.total() - plain) * (1 + 4 / 128**2) + 2 * plain
    assert math.isclose(model.weight_bytes(), expected, rel_tol=1e-9)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_four_bit_groups_carry_a_scale_and_a_zero_point(method: str) -> None:
    """4 bits, and for 128 of them a 16-bit scale and a 4-bit zero point; one per row is not counted."""
    quantized = {**SMALL["mixtral"], "torch_dtype": "float16"}
    four = build({**quantized, "quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}})
    assert four.stored_bytes_per_expert_parameter == pytest.approx(0.5 + 2.5 / 128)
    eight = build({**quantized, "quantization_config": {"quant_method": method, "bits": 8, "group_size": -1}})
    assert eight.stored_bytes_per_expert_parameter == 1.0


@pytest.mark.parametrize(
    ("key", "dtype", "expected"),
    [("torch_dtype", "float32", 4.0), ("dtype", "float16", 2.0), ("torch_dtype", "torch.bfloat16", 2.0)],
)
def test_dtype_sets_the_bytes(key: str, dtype: str, expected: float) -> None:
    model = build({**SMALL["mixtral"], key: dtype})
    assert model.stored_bytes_per_other_parameter == model.stored_bytes_per_expert_parameter == expected


def test_nested_dtype_is_found() -> None:
    config = {**SMALL["llama4"], "text_config": {**SMALL["llama4"]["text_config"], "dtype": "float32"}}
    assert build(config).stored_bytes_per_other_parameter == 4.0


# Refusals ---------------------------------------------------------------------------------------------------


def problems(config: Any) -> str:
    with pytest.raises(CompileError) as raised:
        build(config)
    assert all(d.span == WHERE and d.hint for d in raised.value.diagnostics)
    return str(raised.value)


def test_all_missing_keys_at_once() -> None:
    text = problems({"model_type": "mixtral", "hidden_size": 64})
    for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"):
        assert f"missing key '{key}'" in text
    assert "num_local_experts" in text
    assert "intermediate_size" in text


def test_nested_keys_are_named_with_their_group() -> None:
    text = problems({**SMALL["dbrx"], "ffn_config": {"moe_top_k": 2}, "attn_config": 7})
    assert "missing key 'ffn_config.ffn_hidden_size'" in text
    assert "'attn_config' is 7, expected a group of keys" in text


@pytest.mark.parametrize(
    "value",
    [0, -1, 10**12, True, 64.0, math.nan, math.inf, "64", [64], {}, 10**5000, [[]] * 50],
    ids=lambda value: type(value).__name__,
)
def test_senseless_sizes_are_refused(value: object) -> None:
    assert "'hidden_size' is" in problems({**SMALL["mixtral"], "hidden_size": value})


def test_relations_are_checked() -> None:
    assert "5 experts per token of 4 experts" in problems({**SMALL["mixtral"], "num_experts_per_tok": 5})
    assert "4 heads do not divide among 3 KV heads" in problems(
        {**SMALL["mixtral"], "num_key_value_heads": 3}
    )
    assert "'head_dim' is missing" in problems({**SMALL["mixtral"], "hidden_size": 50})
    assert "beyond any model" in problems(
        {**SMALL["mixtral"], "hidden_size": 2**18, "intermediate_size": 2**22, "num_local_experts": 2**16}
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tie_word_embeddings", 1, "'tie_word_embeddings' is 1, expected true or false"),
        ("torch_dtype", "int3", "'torch_dtype' is \"int3\", expected one of"),
        ("quantization_config", {"quant_method": "eetq"}, "unsupported quant_method 'eetq'"),
        ("quantization_config", {"quant_method": "awq"}, "missing key 'quantization_config.bits'"),
        ("quantization_config", {}, "missing key 'quantization_config.quant_method'"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [0, 1]}, "two whole numbers"),
        ("quantization_config", 4, "expected a group of keys"),
    ],
)
def test_other_ill_typed_keys(key: str, value: object, message: str) -> None:
    assert message in problems({**SMALL["mixtral"], key: value})


def test_unset_query_compression_must_be_said() -> None:
    """transformers would fill in 1536; a missing key is not null."""
    config = {k: v for k, v in SMALL["deepseek_v2"].items() if k != "q_lora_rank"}
    assert "missing key 'q_lora_rank'" in problems(config)


@pytest.mark.parametrize("model_type", [None, "gpt2", 3, ["mixtral"], {}])
def test_unsupported_type_names_the_supported(model_type: object) -> None:
    text = problems({**SMALL["mixtral"], "model_type": model_type})
    assert "model_type" in text
    assert "hint: supported: dbrx, deepseek_v2, deepseek_v3, glm4_moe, gpt_oss, kimi_k2" in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300)
@given(name=st.sampled_from(sorted(SMALL)), data=st.data())
def test_a_spoiled_config_gives_a_model_or_a_diagnosis(name: str, data: st.DataObject) -> None:
    config = dict(SMALL[name])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3)):
        config[key] = data.draw(JSON)
    try:
        model = build(config)
    except CompileError:
        return
    assert model.parameters.total() > 0
    assert model.weight_bytes() > 0


# Files ------------------------------------------------------------------------------------------------------


def test_load_from_file_and_from_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL["mixtral"]))
    model = load_model(folder, WHERE)
    assert load_model(folder / "config.json", WHERE).parameters == model.parameters
    assert (model.name, model.source) == ("my-mixtral", "my-mixtral/config.json")
    assert model.parameters == build(SMALL["mixtral"]).parameters


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is not JSON: line 1 column 2"),
        (b"\xff\xfe\xfa", "is not UTF-8 text"),
        (b"[1]", "holds [1], not an object"),
        (b"", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model_type": ' + b"1" * 5000 + b"}", "is not usable"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CompileError, match=re.escape(str(file))) as raised:
        load_model(file, WHERE)
    assert reason in str(raised.value)
    assert raised.value.diagnostics[0].span == WHERE


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="no such file"):
        load_model(tmp_path, WHERE)
    with pytest.raises(CompileError, match=r"cannot be read|is not usable"):
        load_model(Path("a\0b"), WHERE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ()),
        ({"mlp_bias": True}, ("biases in MLPs",)),
        ({"hidden_act": "gelu"}, ('the activation "gelu"',)),
        ({"rope_scaling": {"type": "linear"}}, ('rotary positions of type "linear"',)),
        ({"rope_parameters": {"rope_type": "yarn"}}, ()),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
            ("quantised checkpoints (awq)",),
        ),
    ],
)
def test_what_the_bundled_runtime_does_not_execute(change: dict[str, Any], says: tuple[str, ...]) -> None:
    assert build({**SMALL["llama"], **change}).not_executed == says
    nested = {**SMALL["llama4"]["text_config"], **change}
    assert build({"model_type": "llama4", "text_config": nested}).not_executed == says


def test_longrope_is_executed_within_the_original_context() -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    assert build({**SMALL["phimoe"], "rope_parameters": rope}).executed_context_tokens == 64
    assert build(SMALL["phimoe"]).executed_context_tokens == 256


def test_the_runtime_executes_every_type() -> None:
    assert supported_model_types() == ARCHITECTURES
