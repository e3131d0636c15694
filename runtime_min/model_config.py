"""config.json of a checkpoint: what the plan does not say, and whether the rest agrees with the plan."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moeplan.runtime_min.checkpoint import CheckpointError, read_json
from moeplan.runtime_min.config_keys import Keys
from moeplan.runtime_min.formats import PACKINGS
from moeplan.runtime_min.models.architecture import Architecture
from moeplan.runtime_min.plan_file import ModelPlan
from moeplan.runtime_min.rope_scaling import LongScaling, Scaling, read_scaling

_KEPT_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore")
_KEPT = ("lm_head", "embed_tokens", "norm", ".gate", ".router", ".shared_expert_gate")  # never in fp8
_SCORING = {"grouped softmax": "softmax", "sigmoid": "sigmoid"}


@dataclass(frozen=True, slots=True)
class Sight:
    """The keys that a query sees: the `window` latest up to its own, or those of its `chunk`; at 0 all."""

    window: int = 0
    chunk: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """The widths of latent attention (DeepSeek-V2, section 2.1). At `query` 0 queries are not compressed.

    A head's query has `plain` values and `rotated` ones. Scores are multiplied by `score_scale`.
    """

    query: int
    kv: int
    plain: int
    rotated: int
    value: int
    score_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How experts are chosen: of the best `kept` of `groups` groups; weights are multiplied by `scale`.
    `jitter`: sparsemixer weighs an expert against those whose scores are within twice this part of it."""

    groups: int = 1
    kept: int = 1
    scale: float = 1.0
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """`eos` are the token numbers that end an answer; `tied` means that the head is the embedding.

    `renormalise`: the weights of a token's experts sum to 1. Queries, keys and values are cut to ±`clip_qkv`.
    The first `rotary_dim` dimensions of a head are rotated (0: all), but not in the layers `unrotated`, where
    `temperature` (a, tokens) multiplies queries by a · log(1 + position / tokens) + 1. All that is rotated is
    multiplied by `rope_factor`. Layers `dense` have no experts. `sights` is empty where all layers see all.
    `clamp` (limit, gain) are those of a clamped SwiGLU. In fp8 a `scale_block` of so many rows and values of
    a matrix shares a scale, 0 being all.
    """

    norm_eps: float
    rope_theta: float
    tied: bool
    eos: frozenset[int]
    renormalise: bool = True
    clip_qkv: float | None = None
    rope_scaling: Scaling | None = None
    rope_factor: float = 1.0
    rotary_dim: int = 0
    unrotated: frozenset[int] = frozenset()
    temperature: tuple[float, float] | None = None
    input_bias: bool = False
    output_bias: bool = False
    head_bias: bool = False
    query_norm: Literal["none", "head", "token", "rotated"] = "none"
    dense: frozenset[int] = frozenset()
    latent: Latent | None = None
    sights: tuple[Sight, ...] = ()
    choice: Choice = Choice()
    clamp: tuple[float, float] = (0.0, 0.0)
    scale_block: tuple[int, int] = (0, 0)

    def sight(self, layer: int) -> Sight:
        return self.sights[layer] if self.sights else Sight()


def read_config(folder: Path, model: ModelPlan, context_tokens: int) -> ModelConfig:
    """Read config.json; raises CheckpointError naming every field this runtime or the plan disagrees with."""
    outer, kind = read_json(folder / "config.json"), model.kind
    keys = Keys(outer, kind)
    rope = keys.group("rope_parameters", "rope_scaling")
    scaling, rope_factor, score_factor = read_scaling(keys, rope, context_tokens)
    biased = bool(keys.get(kind.bias_key, kind.has_biases))
    # Where config.json is silent queries are normalised, as in Llama 4, but not in GLM-4.5.
    normalised = keys.get(kind.query_norm_key, kind.query_norm == "rotated" or not kind.query_norm_key)
    rotated = _rotated_layers(keys, kind, model.layers)
    packing, block = _packing(keys.get("quantization_config"), kind)
    said = keys.said(kind.renormalise_key)  # null says no
    config = ModelConfig(
        norm_eps=keys.number("rms_norm_eps", kind.norm_eps),
        rope_theta=rope.number("rope_theta", keys.number("rope_theta", kind.rope_theta)),
        tied=bool(keys.get("tie_word_embeddings", False)),
        eos=_eos(folder, keys.get("eos_token_id")),
        renormalise=bool(keys.get(kind.renormalise_key)) if said else kind.renormalise,
        clip_qkv=None if keys.get("clip_qkv") is None else keys.number("clip_qkv"),
        rope_scaling=scaling,
        rope_factor=rope_factor,
        rotary_dim=_rotary_dim(keys, kind, rope, model),
        unrotated=frozenset(range(model.layers)) - rotated,
        temperature=_temperature(keys, kind),
        input_bias=kind.biases != "none" and biased,
        output_bias=kind.biases == "all" and biased,
        head_bias=bool(keys.get("lm_head_bias", False)),
        query_norm=kind.query_norm if normalised else "none",
        dense=_dense_layers(keys, kind, model.layers),
        latent=_latent(keys, score_factor) if kind.attention == "latent" else None,
        sights=_sights(keys, kind, model.layers, context_tokens, rotated),
        choice=_choice(keys, kind),
        clamp=(keys.number("swiglu_limit", 7.0), keys.number("swiglu_alpha", 1.702)),
        scale_block=block,
    )
    problems = [
        *keys.problems,
        *_shape_problems(keys, model, kind, config),
        *_feature_problems(outer, keys, kind, biased),
        *_plan_problems(keys, packing, model.packing, context_tokens),
    ]
    if problems:
        raise CheckpointError([f"{folder / 'config.json'}: {problem}" for problem in problems])
    return config


def _packing(quantization: Any, kind: Architecture) -> tuple[str, tuple[int, int]]:
    """The format that a checkpoint is in, "unknown" where it is none of this runtime's, and fp8's block."""
    match quantization:
        case None:
            return "none", (0, 0)
        case {"quant_method": "moeplan", "format": str(name), **others} if not others:
            return name, (0, 0)
        case {"quant_method": "mxfp4"} if kind.experts == "pairs":
            return "mxfp4", (0, 0)
        case {"quant_method": "fp8" | "compressed-tensors"} if kind.experts == "apart" and not kind.fused_qkv:
            block = _fp8_block(quantization)
            return ("unknown", (0, 0)) if block is None else ("fp8", block)
    return "unknown", (0, 0)


def _fp8_block(quantization: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and values that share a scale; None where the weights are in something else, or some in bf16."""
    kept = [name for key in _KEPT_KEYS for name in quantization.get(key) or ()]
    if any(not re.sub(r"[^\w.]", "", str(name)).endswith(_KEPT) for name in kept):
        return None
    match quantization:
        case {"quant_method": "fp8"}:
            block = quantization.get("weight_block_size") or [0, 0]
            good = isinstance(block, list) and [type(n) for n in block] == [int, int] and min(block) >= 0
            return (block[0], block[1]) if good and quantization.get("fmt", "e4m3") == "e4m3" else None
        case {"config_groups": {**groups}} if len(groups) == 1 and not quantization.get("kv_cache_scheme"):
            (group,) = groups.values()
            match group:
                case {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": how}}:
                    return {"channel": (1, 0), "tensor": (0, 0)}.get(how)
    return None


def _rotary_dim(keys: Keys, kind: Architecture, rope: Keys, model: ModelPlan) -> int:
    """Of a head; in latent attention of what is rotated apart."""
    if kind.attention == "latent":
        return 0
    given = rope.number("partial_rotary_factor", keys.number("partial_rotary_factor", kind.partial))
    if given > 1:
        keys.problems.append(f"partial_rotary_factor is {given!r}, expected a number up to 1")
        return 0
    if given != 1 and kind.partial == 1:
        keys.problems.append(f"partial_rotary_factor is {given!r}, this runtime rotates all")
    return int(model.head_dim * given)


def _rotated_layers(keys: Keys, kind: Architecture, layers: int) -> frozenset[int]:
    if not kind.chunks:
        return frozenset(range(layers))
    every = keys.size("no_rope_layer_interval", 4)
    rotated = keys.numbers("no_rope_layers", layers) or [(i + 1) % every for i in range(layers)]
    return frozenset(i for i in range(layers) if rotated[i])


def _temperature(keys: Keys, kind: Architecture) -> tuple[float, float] | None:
    if not kind.chunks or not keys.get("attn_temperature_tuning", True):
        return None
    return keys.number("attn_scale", 0.1), keys.number("floor_scale", 8192)


def _dense_layers(keys: Keys, kind: Architecture, layers: int) -> frozenset[int]:
    """The layers without experts of a model that has some."""
    every = range(layers)
    if kind.dense == "first":
        first, step = keys.size("first_k_dense_replace", 0, least=0), keys.size("moe_layer_freq", 1)
        return frozenset(i for i in every if i < first or i % step)
    if kind.dense == "stepped":
        step, listed = keys.size("decoder_sparse_step", 1), keys.numbers("mlp_only_layers", 1) or ()
        return frozenset(i for i in every if i in listed or (i + 1) % step)
    if kind.dense == "interleaved":
        step = keys.size("interleave_moe_layer_step", 1)
        mixed = keys.numbers("moe_layers", 1) or range(step - 1, layers, step)
        return frozenset(every) - frozenset(mixed)
    return frozenset()


def _latent(keys: Keys, score_factor: float) -> Latent:
    plain, rotated = keys.size("qk_nope_head_dim"), keys.size("qk_rope_head_dim")
    return Latent(
        query=0 if keys.get("q_lora_rank") is None else keys.size("q_lora_rank"),
        kv=keys.size("kv_lora_rank"),
        plain=plain,
        rotated=rotated,
        value=keys.size("v_head_dim"),
        score_scale=score_factor * (plain + rotated) ** -0.5,
    )


def _sights(
    keys: Keys, kind: Architecture, layers: int, context_tokens: int, rotated: frozenset[int]
) -> tuple[Sight, ...]:
    """What each layer sees; empty where all see the plan's whole context."""
    if kind.chunks:
        size, some = keys.get("attention_chunk_size"), rotated
        listed = _listed(keys, "chunked_attention", layers)
    else:
        size, some = keys.get("sliding_window"), _windowed(keys, kind, layers)
        listed = _listed(keys, "sliding_attention", layers) if kind.windows in ("above", "listed") else None
    some = some if listed is None else listed
    if size is None or not some:
        return ()
    if type(size) is not int or size < 1:
        keys.problems.append(f"{'attention_chunk_size' if kind.chunks else 'sliding_window'} is {size!r}")
        return ()
    if size >= context_tokens:
        return ()
    sight = Sight(chunk=size) if kind.chunks else Sight(window=size)
    return tuple(sight if layer in some else Sight() for layer in range(layers))


def _windowed(keys: Keys, kind: Architecture, layers: int) -> frozenset[int]:
    """The layers with a window where config.json has no list of them."""
    used = bool(keys.get("use_sliding_window", False))
    if kind.windows == "above":
        first = keys.size("max_window_layers", 28, least=0)
        return frozenset(range(first, layers)) if used else frozenset()
    if kind.windows == "listed":
        return frozenset(range(0, layers, 2))
    every = kind.windows == "all" or (kind.windows == "used" and used)
    return frozenset(range(layers)) if every else frozenset()


def _listed(keys: Keys, name: str, layers: int) -> frozenset[int] | None:
    kinds = keys.get("layer_types")
    if not isinstance(kinds, list):
        return None
    unknown = sorted({str(k) for k in kinds} - {name, "full_attention"})
    if unknown or len(kinds) != layers:
        keys.problems.append(f"layer_types has {len(kinds)} layers of {', '.join(unknown) or 'known kinds'}")
    return frozenset(i for i, k in enumerate(kinds) if k == name)


def _choice(keys: Keys, kind: Architecture) -> Choice:
    if kind.router == "sparsemixer":
        return Choice(jitter=keys.number("router_jitter_noise", 0.01))
    if kind.router not in _SCORING:
        return Choice()
    scale = keys.number("routed_scaling_factor", 1.0)
    if kind.router == "grouped softmax" and keys.get("topk_method", "greedy") == "greedy":
        return Choice(scale=scale)
    return Choice(groups=keys.size("n_group", 1), kept=keys.size("topk_group", 1), scale=scale)


def _shape_problems(keys: Keys, model: ModelPlan, kind: Architecture, config: ModelConfig) -> list[str]:
    heads, hidden = keys.get("num_attention_heads"), keys.get("hidden_size")
    head_dim = keys.get("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        head_dim = hidden // heads
    shape = {
        "num_hidden_layers": (keys.get("num_hidden_layers"), model.layers),
        "hidden_size": (hidden, model.hidden),
        "num_attention_heads": (heads, model.heads),
        "vocab_size": (keys.get("vocab_size"), model.vocab),
    }
    if config.latent:
        wide = config.latent.kv + config.latent.rotated
        shape["qk_nope_head_dim + qk_rope_head_dim"] = (
            config.latent.plain + config.latent.rotated,
            model.head_dim,
        )
        shape["kv_lora_rank + qk_rope_head_dim"] = (wide, model.latent_dim)
    else:
        shape["num_key_value_heads"] = (keys.get("num_key_value_heads", heads), model.kv_heads)
        shape["head_dim"] = (head_dim, model.head_dim)
    shape[kind.width_key] = (keys.get(kind.width_key), model.expert_intermediate)
    if kind.routed:
        for names, plan in ((kind.experts_keys, model.experts), (kind.top_keys, model.experts_per_token)):
            key, found = keys.first(names)
            shape[key] = (found, plan)
        shape["layers with experts"] = (model.layers - len(config.dense), model.moe_layers)
        shape["width of shared experts"] = (_shared_width(keys, kind, model), model.shared_intermediate)
    if config.dense and kind.dense_width_key != kind.width_key:
        shape[kind.dense_width_key] = (keys.get(kind.dense_width_key), model.dense_intermediate)
    wrong = [
        f"{key} is {found!r}, the plan has {plan}" for key, (found, plan) in shape.items() if found != plan
    ]
    groups, rotated = config.choice.groups, config.rotary_dim or model.head_dim
    if model.experts % groups or config.choice.kept > groups:
        wrong.append(
            f"n_group is {groups}, which does not divide {model.experts} experts, or topk_group is above"
        )
    if isinstance(config.rope_scaling, LongScaling) and 2 * len(config.rope_scaling.factors) != rotated:
        wrong.append(
            f"short_factor has {len(config.rope_scaling.factors)} numbers, a head {rotated // 2} pairs"
        )
    return wrong


def _shared_width(keys: Keys, kind: Architecture, model: ModelPlan) -> int:
    if not kind.shared:
        return 0
    if kind.shared_gate:
        return keys.size("shared_expert_intermediate_size")
    return model.expert_intermediate * keys.size("n_shared_experts", 1, least=0)


def _feature_problems(outer: dict[str, Any], keys: Keys, kind: Architecture, biased: bool) -> list[str]:
    """What the runtime would silently compute otherwise than the checkpoint means."""
    problems, found = [], outer.get("architectures")
    if not isinstance(found, list) or [str(f).lower() for f in found] != [kind.class_name.lower()]:
        problems.append(f"architectures is {found!r}, the plan is for {kind.class_name}")
    for key, computed in (("mlp_bias", False), ("hidden_act", "silu")):
        if keys.get(key, computed) != computed:
            problems.append(f"{key} is {keys.get(key)!r}, this runtime computes {computed!r} only")
    if biased and kind.biases == "none":
        problems.append(f"{kind.bias_key} is {biased}, this runtime knows no biases of {kind.class_name}")
    if keys.get("use_sliding_window") and kind.windows == "none":
        problems.append("use_sliding_window is True, this runtime computes False only")
    if keys.get("scoring_func") not in (None, _SCORING.get(kind.router, "softmax")):
        problems.append(f"scoring_func is {keys.get('scoring_func')!r}, the router's is {kind.router}")
    if kind.router == "grouped softmax" and keys.get("norm_topk_prob"):
        problems.append("norm_topk_prob is True, this runtime computes False only")
    if keys.get(kind.renormalise_key) not in (None, False, True):
        problems.append(f"{kind.renormalise_key} is {keys.get(kind.renormalise_key)!r}, expected 1 or none")
    return problems


def _plan_problems(keys: Keys, packing: str, planned: str, context_tokens: int) -> list[str]:
    """A context longer than the model was made for, and a checkpoint in other bits than the plan's."""
    problems, limit = [], keys.get("max_position_embeddings")
    if isinstance(limit, int) and limit < context_tokens:
        problems.append(f"max_position_embeddings is {limit}, the plan's context {context_tokens} tokens")
    if packing != planned:
        quantization = keys.get("quantization_config")
        packable = quantization is None and planned in PACKINGS
        how = f": write it with `runtime_min quantize --to {planned}`" if packable else ""
        problems.append(f"quantization_config is {quantization!r}, the plan has {planned}{how}")
    return problems


def _eos(folder: Path, value: object) -> frozenset[int]:
    """The end tokens: generation_config.json has the last word, as it has in transformers."""
    if (folder / "generation_config.json").exists():
        value = read_json(folder / "generation_config.json").get("eos_token_id", value)
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if type(token) is int)
