"""A small random model of every architecture, its sizes chosen to break assumptions, and its plan."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from moeplan.codegen.emit.runtime import model_plan
from moeplan.planner.diagnostics import Span
from moeplan.planner.model_config import load_model
from moeplan.runtime_min.plan_file import ModelPlan

from .folders import VOCAB, save_tokenizer

SIZES = {
    "hidden_size": 36,
    "intermediate_size": 22,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
}
MOE = {"num_experts": 5, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 8.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
LATENT = {
    **SIZES,
    "num_key_value_heads": 6,
    "q_lora_rank": 14,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "intermediate_size": 46,
    "moe_intermediate_size": 18,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
GLM = {
    **SIZES,
    "head_dim": 12,
    "first_k_dense_replace": 1,
    "intermediate_size": 46,
    "moe_intermediate_size": 18,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
}
LLAMA4 = {
    **SIZES,
    **LOCAL,
    "num_hidden_layers": 4,
    "head_dim": 10,
    "intermediate_size_mlp": 46,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 20,
    "floor_scale": 7,
    "pad_token_id": None,
}
QWEN_MOE = {**SIZES, **MOE, "head_dim": 10, "moe_intermediate_size": 18}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.5],
    "long_factor": [1.0, 4.0, 8.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
}

_EYES = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 8,
    "projector_input_dim": 8,
    "projector_output_dim": 8,
}


@dataclass(frozen=True)
class Small:
    """`keys` of config.json for transformers' class; `model_type` where the checkpoint has another.
    `seeing`: the text model is part of one that sees images."""

    name: str
    keys: dict[str, Any]
    model_type: str = ""
    seeing: bool = False


MODELS = {
    "qwen3": Small("Qwen3", {**SIZES, "head_dim": 10}),
    "qwen3, window in the last layers, biases": Small(
        "Qwen3",
        {
            **SIZES,
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": Small("GptOss", {**SIZES, **LOCAL, "head_dim": 10, "sliding_window": 9}),
    "gpt_oss, yarn": Small(
        "GptOss",
        {
            **SIZES,
            **LOCAL,
            "head_dim": 12,
            "sliding_window": 40,
            "swiglu_limit": 0.4,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "deepseek_v2": Small("DeepseekV2", {**LATENT, "topk_method": "group_limited_greedy"}),
    "deepseek_v2, queries not compressed, greedy": Small(
        "DeepseekV2", {**LATENT, "q_lora_rank": None, "first_k_dense_replace": 0, "attention_bias": True}
    ),
    "deepseek_v3": Small("DeepseekV3", LATENT),
    "deepseek_v3, yarn, biases": Small(
        "DeepseekV3",
        {
            **LATENT,
            "attention_bias": True,
            "norm_topk_prob": False,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
        },
    ),
    "kimi_k2": Small("DeepseekV3", {**LATENT, "n_group": 1, "topk_group": 1}, "kimi_k2"),
    "glm4_moe": Small("Glm4Moe", {**GLM, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe, plain, groups": Small(
        "Glm4Moe", {**GLM, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 0.6}
    ),
    "phimoe": Small("Phimoe", {**SIZES, **LOCAL, "attention_bias": True, "lm_head_bias": True}),
    "phimoe, longrope, window": Small(
        "Phimoe",
        {**SIZES, **LOCAL, "rope_parameters": LONG, "sliding_window": 11, "router_jitter_noise": 0.1},
    ),
    "dbrx": Small(
        "Dbrx",
        {
            "d_model": 36,
            "n_heads": 6,
            "n_layers": 3,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 3, "clip_qkv": 0.9, "rope_theta": 500.0},
            "ffn_config": {
                "hidden_size": 36,
                "ffn_hidden_size": 22,
                "moe_num_experts": 5,
                "moe_top_k": 2,
            },
        },
    ),
    "llama4_text": Small("Llama4", LLAMA4),
    "llama4_text, all mixed, no norm": Small(
        "Llama4", {**LLAMA4, "interleave_moe_layer_step": 1, "use_qk_norm": False, "num_experts_per_tok": 1}
    ),
    "llama4": Small("Llama4", LLAMA4, seeing=True),
    "qwen2_moe": Small(
        "Qwen2Moe", {**SIZES, **MOE, "moe_intermediate_size": 18, "shared_expert_intermediate_size": 26}
    ),
    "qwen3_moe, some layers dense, biases": Small(
        "Qwen3Moe", {**QWEN_MOE, "mlp_only_layers": [1], "attention_bias": True, "norm_topk_prob": True}
    ),
    "olmoe": Small("Olmoe", {**SIZES, **MOE}),
    "mixtral, window": Small("Mixtral", {**SIZES, **LOCAL, "sliding_window": 9}),
    "mistral, window": Small("Mistral", {**SIZES, "sliding_window": 9}),
    "llama, biases": Small("Llama", {**SIZES, "attention_bias": True}),
}


def save(folder: Path, small: Small) -> Any:
    """Write a random checkpoint with a byte tokenizer; return transformers' model in float32."""
    torch.manual_seed(0)
    config_name = "Llama4TextConfig" if small.name == "Llama4" else f"{small.name}Config"
    model_class = getattr(transformers, f"{small.name}ForCausalLM")
    ids = {"vocab_size": VOCAB, "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": None}
    config = getattr(transformers, config_name)(**ids | {"initializer_range": 0.3} | small.keys)
    if small.seeing:
        model_class = transformers.Llama4ForConditionalGeneration
        config = transformers.Llama4Config(text_config=config.to_dict(), vision_config=_EYES)
    model = model_class(config).eval()
    _spread(model)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    reference = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    reference = reference.language_model if small.seeing else reference
    _plainly(reference)
    if small.model_type:
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, "model_type": small.model_type}))
    return reference


def _spread(model: Any) -> None:
    """Nothing stays at a value, one or zero, at which it would not be seen where it is used."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("norm.weight", "norm_1.weight", "norm_2.weight", "norm_f.weight")):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith(("bias", "sinks")) or (weight.dim() > 1 and not weight.any()):
            torch.nn.init.normal_(weight, 0.0, 0.3)


def _plainly(model: Any) -> None:
    """The grouped kernels of experts refuse odd sizes."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def plan_of(folder: Path, dtype: Any = "float32") -> ModelPlan:
    """What the planner counts of the checkpoint."""
    model = load_model(folder, Span("spec.yaml", 1, 1))
    return replace(model_plan(model, "checkpoint", dtype))
