"""config.json of a checkpoint: what the plan does not say, and whether the rest agrees with the plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.runtime_min.checkpoint import CheckpointError, read_json
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.models.architecture import Architecture
from moeplan.runtime_min.plan_file import ModelPlan

# Keys that change what is computed, and the values at which they do not.
_TRIVIAL: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "hidden_act": ("silu",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's way to longer contexts than the `original_context_tokens`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`eos` are the token numbers that end an answer; `tied` means that the head is the embedding.

    `renormalise`: the weights of a token's experts sum to 1. Queries, keys and values are cut to ±`clip_qkv`.
    """

    norm_eps: float
    rope_theta: float
    tied: bool
    eos: frozenset[int]
    renormalise: bool = True
    clip_qkv: float | None = None
    rope_scaling: RopeScaling | None = None


def read_config(folder: Path, model: ModelPlan, context_tokens: int) -> ModelConfig:
    """Read config.json; raises CheckpointError naming every field this runtime or the plan disagrees with."""
    config, kind = read_json(folder / "config.json"), BY_MODEL_TYPE[model.architecture]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    problems = [
        *_shape_problems(config, model, kind),
        *_feature_problems(config, kind),
        *_context_problems(config, context_tokens),
    ]
    if not isinstance(rope, dict):
        problems.append(f"rope_parameters is {rope!r}, expected an object")
        rope = {}
    eps = _number(config, "rms_norm_eps", kind.norm_eps, problems)
    theta = _number({**config, **rope}, "rope_theta", kind.rope_theta, problems)
    clip = None if config.get("clip_qkv") is None else _number(config, "clip_qkv", 1.0, problems)
    scaling = _rope_scaling(rope, problems)
    if problems:
        raise CheckpointError([f"{folder / 'config.json'}: {problem}" for problem in problems])
    tied = bool(config.get("tie_word_embeddings", False))
    sums_to_1 = bool(config.get("norm_topk_prob", False)) if kind.renormalise is None else kind.renormalise
    return ModelConfig(
        norm_eps=eps,
        rope_theta=theta,
        tied=tied,
        eos=_eos(folder, config),
        renormalise=sums_to_1,
        clip_qkv=clip,
        rope_scaling=scaling,
    )


def _shape_problems(config: dict[str, Any], model: ModelPlan, kind: Architecture) -> list[str]:
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads")
    head_dim = config.get("head_dim")
    if (
        head_dim is None
        and isinstance(heads, int)
        and isinstance(config.get("hidden_size"), int)
        and heads > 0
    ):
        head_dim = config["hidden_size"] // heads
    shape = {
        "num_hidden_layers": (config.get("num_hidden_layers"), model.layers),
        "hidden_size": (config.get("hidden_size"), model.hidden),
        "num_attention_heads": (heads, model.heads),
        "num_key_value_heads": (heads if kv_heads is None else kv_heads, model.kv_heads),
        "head_dim": (head_dim, model.head_dim),
        "vocab_size": (config.get("vocab_size"), model.vocab),
        kind.width_key: (config.get(kind.width_key), model.expert_intermediate),
    }
    if kind.routed:
        key = next((key for key in kind.experts_keys if key in config), kind.experts_keys[0])
        shape[key] = (config.get(key), model.experts)
        shape["num_experts_per_tok"] = (config.get("num_experts_per_tok"), model.experts_per_token)
    return [
        f"{key} is {found!r}, the plan has {plan}" for key, (found, plan) in shape.items() if found != plan
    ]


def _feature_problems(config: dict[str, Any], kind: Architecture) -> list[str]:
    """What the runtime would silently compute otherwise than the checkpoint means."""
    problems = []
    if config.get("architectures") != [kind.class_name]:
        found = config.get("architectures")
        problems.append(f"architectures is {found!r}, the plan is for {kind.class_name}")
    for key, trivial in _TRIVIAL.items():
        if key in config and config[key] not in trivial:
            problems.append(f"{key} is {config[key]!r}, this runtime computes {trivial[0]!r} only")
    return problems


def _context_problems(config: dict[str, Any], context_tokens: int) -> list[str]:
    """Contexts of the plan that are longer than what the model sees."""
    problems = []
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and not (isinstance(window, int) and window >= context_tokens):
        problems.append(
            f"sliding_window is {window!r}, shorter than the plan's {context_tokens} tokens of context"
        )
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and limit < context_tokens:
        problems.append(
            f"max_position_embeddings is {limit}, the plan has {context_tokens} tokens of context"
        )
    return problems


def _rope_scaling(rope: dict[str, Any], problems: list[str]) -> RopeScaling | None:
    """The scaling that rope parameters ask for: none, or Llama 3.1's."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        problems.append(
            f"partial_rotary_factor is {rope['partial_rotary_factor']!r}, this runtime rotates all"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        problems.append(f"rope type {kind!r} is not supported, only default and llama3")
        return None
    scaling = RopeScaling(
        factor=_number(rope, "factor", 0.0, problems),
        low_freq_factor=_number(rope, "low_freq_factor", 0.0, problems),
        high_freq_factor=_number(rope, "high_freq_factor", 0.0, problems),
        original_context_tokens=_number(rope, "original_max_position_embeddings", 0.0, problems),
    )
    if not problems and scaling.high_freq_factor <= scaling.low_freq_factor:
        problems.append(f"high_freq_factor is {scaling.high_freq_factor}, not above low_freq_factor")
    return scaling


def _number(config: dict[str, Any], key: str, default: float, problems: list[str]) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        problems.append(f"{key} is {value!r}, expected a positive number")
        return default
    return float(value)


def _eos(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """The end tokens: generation_config.json has the last word, as it has in transformers."""
    value = config.get("eos_token_id")
    if (folder / "generation_config.json").exists():
        value = read_json(folder / "generation_config.json").get("eos_token_id", value)
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if type(token) is int)
