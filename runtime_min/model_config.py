"""config.json of a checkpoint: what the plan does not say, and whether the rest agrees with the plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.runtime_min.checkpoint import CheckpointError, read_json
from moeplan.runtime_min.plan_file import ModelPlan

DEFAULT_THETA = 1e6  # Mixtral's own, for a config.json that leaves it out


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`eos` are the token numbers that end an answer; `tied` means that the head is the embedding."""

    norm_eps: float
    rope_theta: float
    tied: bool
    eos: frozenset[int]


def read_config(folder: Path, model: ModelPlan, context_tokens: int) -> ModelConfig:
    """Read config.json; raises CheckpointError naming every field this runtime or the plan disagrees with."""
    config = read_json(folder / "config.json")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    problems = [*_shape_problems(config, model), *_feature_problems(config, rope, context_tokens)]
    eps = _number(config, "rms_norm_eps", 1e-5, problems)
    theta = _number({**config, **rope}, "rope_theta", DEFAULT_THETA, problems)
    if problems:
        raise CheckpointError([f"{folder / 'config.json'}: {problem}" for problem in problems])
    tied = bool(config.get("tie_word_embeddings", False))
    return ModelConfig(norm_eps=eps, rope_theta=theta, tied=tied, eos=_eos(folder, config))


def _shape_problems(config: dict[str, Any], model: ModelPlan) -> list[str]:
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
        "num_local_experts": (config.get("num_local_experts"), model.experts),
        "num_experts_per_tok": (config.get("num_experts_per_tok"), model.experts_per_token),
        "intermediate_size": (config.get("intermediate_size"), model.expert_intermediate),
    }
    return [
        f"{key} is {found!r}, the plan has {plan}" for key, (found, plan) in shape.items() if found != plan
    ]


def _feature_problems(config: dict[str, Any], rope: Any, context_tokens: int) -> list[str]:
    """What the runtime would silently compute otherwise than the checkpoint means."""
    problems = []
    if config.get("architectures") != ["MixtralForCausalLM"]:
        problems.append(
            f"architectures is {config.get('architectures')!r}, this runtime runs MixtralForCausalLM"
        )
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {config['hidden_act']!r}, this runtime computes silu")
    if not isinstance(rope, dict):
        return [*problems, f"rope_parameters is {rope!r}, expected an object"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rope type {kind!r} is not supported, only the default")
    window = config.get("sliding_window")
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
