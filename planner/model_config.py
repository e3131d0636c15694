"""Hugging Face config.json -> Model: shape and exact parameter counts, nothing downloaded, nothing executed.

One adapter per `model_type` reads the published keys and says what the layers hold; the counts follow from
that. They are the `nn.Parameter`s of transformers' classes: vision towers, multi-token-prediction layers and
the routers' score-correction buffers (one number per expert) are not in them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.model import (
    EXPERTS_TOGETHER,
    PACKED_BYTES,
    SCALED,
    Attention,
    Model,
    Packing,
    Parameters,
    Scaled,
)

_STORED_BYTES = {"bfloat16": 2.0, "float16": 2.0, "float32": 4.0}
_CONFIG_BYTES_LIMIT = 16 * 2**20  # a config.json has a few kilobytes

# The largest believable value of each size; ten times beyond any model known in 2026.
_LIMITS = {
    "hidden_size": 2**18,
    "d_model": 2**18,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**30,
    "max_seq_len": 2**30,
    "sliding_window": 2**30,
    "attention_chunk_size": 2**30,
    "num_hidden_layers": 4096,
    "n_layers": 4096,
}
_DEFAULT_LIMIT = 2**22
_MOST_PARAMETERS = 10**15


def load_model(path: Path, where: Span) -> Model:
    """The model described by a config.json, or by the one in a checkpoint folder.

    Name and source are those of the folder that holds the file, without the way there: the same checkpoint
    makes the same plan wherever it lies. Raises CompileError at `where`.
    """
    file = path / "config.json" if path.is_dir() else path
    config = _read_json_object(file, where)
    name = file.parent.name if file.name == "config.json" and file.parent.name else file.stem
    return model_from_config(config, name, f"{name}/{file.name}", where)


def model_from_config(config: Mapping[str, object], name: str, source: str, where: Span) -> Model:
    """The model that a parsed config.json describes; raises CompileError with every wrong key at once."""
    model_type = config.get("model_type")
    adapter = _ADAPTERS.get(model_type) if isinstance(model_type, str) else None
    if adapter is None:
        raise CompileError(_unsupported(model_type, name, where))
    keys = _Keys(config, name, where)
    architecture = adapter(keys)
    architecture.check(keys)
    experts_bytes, other_bytes = _stored_bytes(keys, architecture)
    packing, block = _packing(keys)
    keys.raise_problems()
    return Model(
        name=name,
        model_type=str(model_type),
        source=source,
        hidden=architecture.hidden,
        vocab=architecture.frame.vocab,
        attention=architecture.attention,
        dense_layers=architecture.dense_layers,
        dense_intermediate=architecture.dense_intermediate,
        moe_layers=architecture.moe_layers,
        experts=architecture.experts,
        experts_per_token=architecture.experts_per_token,
        expert_intermediate=architecture.expert_intermediate,
        shared_intermediate=architecture.shared_intermediate,
        parameters=architecture.parameters(),
        stored_bytes_per_expert_parameter=experts_bytes,
        stored_bytes_per_other_parameter=other_bytes,
        max_context_tokens=architecture.frame.max_context_tokens,
        executed_context_tokens=_executed_context(keys, architecture.frame.max_context_tokens),
        router_corrections=architecture.moe_layers * architecture.experts * architecture.router_correction,
        not_executed=tuple(_not_executed(keys)),
        packing=packing,
        scaled=_scaled(keys, architecture, packing, block),
    )


def supported_model_types() -> tuple[str, ...]:
    """Every `model_type` with an adapter, sorted."""
    return tuple(sorted(_ADAPTERS))


# What a model's layers hold ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    """What stands around the layers; every model type names it alike."""

    vocab: int
    max_context_tokens: int
    tied: bool


def _frame(keys: _Keys) -> _Frame:
    return _Frame(
        vocab=keys.size("vocab_size"),
        max_context_tokens=keys.context_tokens(),
        tied=keys.flag("tie_word_embeddings", False),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Architecture:
    """What an adapter found out; counts called `_per_layer` are parameters of one layer."""

    frame: _Frame
    hidden: int
    attention: Attention
    attention_per_layer: int
    norms_per_layer: int
    norm_bias: bool = False
    dense_layers: int = 0
    dense_intermediate: int = 0
    mlp_bias: bool = False
    moe_layers: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    expert_bias: bool = False
    router_bias: bool = False
    router_correction: bool = False
    shared_gate: bool = False
    shared_intermediate: int = 0
    lm_head_bias: bool = False

    def parameters(self) -> Parameters:
        """Counts of the whole model. Every MLP is gated: three matrices of hidden x intermediate."""
        layers = self.dense_layers + self.moe_layers
        return Parameters(
            embedding=self.frame.vocab * self.hidden,
            lm_head=0 if self.frame.tied else self.frame.vocab * (self.hidden + self.lm_head_bias),
            attention=layers * self.attention_per_layer,
            router=self.moe_layers * self.experts * (self.hidden + self.router_bias),
            routed_experts=self.moe_layers * self.experts * self.expert_parameters(),
            shared_experts=self.moe_layers
            * (self._mlp(self.shared_intermediate, self.mlp_bias) + self.hidden * self.shared_gate),
            dense_mlp=self.dense_layers * self._mlp(self.dense_intermediate, self.mlp_bias),
            norms=layers * self.norms_per_layer + self.hidden * (1 + self.norm_bias),
        )

    def expert_parameters(self) -> int:
        """One routed expert, with its biases."""
        return self._mlp(self.expert_intermediate, self.expert_bias)

    def expert_biases(self) -> int:
        """The biases among `expert_parameters`."""
        return self.expert_parameters() - self._mlp(self.expert_intermediate, False)

    def _mlp(self, intermediate: int, bias: bool) -> int:
        if not intermediate:
            return 0
        return 3 * self.hidden * intermediate + bias * (2 * intermediate + self.hidden)

    def check(self, keys: _Keys) -> None:
        """Relations between keys that each make sense alone."""
        if self.experts_per_token > self.experts:
            keys.wrong(f"{self.experts_per_token} experts per token of {self.experts} experts")
        if self.attention.heads % self.attention.kv_heads:
            keys.wrong(f"{self.attention.heads} heads do not divide among {self.attention.kv_heads} KV heads")
        if self.parameters().total() > _MOST_PARAMETERS:
            keys.wrong(f"{self.parameters().total():,} parameters are beyond any model")


def _gqa(
    keys: _Keys,
    *,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bias: bool = False,
    output_bias: bool | None = None,
    sinks: bool = False,
    window: tuple[int, int] = (0, 0),
) -> tuple[Attention, int]:
    """Grouped-query attention and its parameters per layer; `window` is (tokens, layers that have it)."""
    output_bias = bias if output_bias is None else output_bias
    inward = (hidden + bias) * (heads + 2 * kv_heads) * head_dim
    outward = (heads * head_dim + output_bias) * hidden
    tokens, layers = window if window[0] < keys.context_tokens() else (0, 0)
    attention = Attention(
        kind="gqa",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        window_tokens=tokens if layers else 0,
        windowed_layers=layers if tokens else 0,
    )
    return attention, inward + outward + heads * sinks


def _head_dim(keys: _Keys, hidden: int, heads: int) -> int:
    """The given `head_dim`, or hidden / heads where the config leaves it out."""
    given = keys.optional_size("head_dim")
    if given is not None:
        return given
    if hidden % heads:
        keys.wrong(f"'head_dim' is missing and hidden size {hidden} does not divide among {heads} heads")
    return max(1, hidden // heads)


def _window(keys: _Keys, key: str, windowed_layers: int) -> tuple[int, int]:
    """(tokens, layers) of a sliding window; (0, 0) where the config gives none."""
    tokens = keys.optional_size(key)
    return (tokens, windowed_layers) if tokens else (0, 0)


# One adapter per model_type ---------------------------------------------------------------------------------


def _mixtral(keys: _Keys) -> _Architecture:
    """Mixtral: every layer a mixture. arXiv 2401.04088."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=_head_dim(keys, hidden, heads),
        window=_window(keys, "sliding_window", layers),
    )
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden,
        moe_layers=layers,
        experts=keys.size("num_local_experts", "num_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        expert_intermediate=keys.size("intermediate_size"),
    )


def _phimoe(keys: _Keys) -> _Architecture:
    """Phi-3.5-MoE: Mixtral's shape with LayerNorms (weight and bias), optional biases. arXiv 2404.14219."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=_head_dim(keys, hidden, heads),
        bias=keys.flag("attention_bias", False),
        window=_window(keys, "sliding_window", layers),
    )
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * 2 * hidden,
        norm_bias=True,
        moe_layers=layers,
        experts=keys.size("num_local_experts", "num_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        expert_intermediate=keys.size("intermediate_size"),
        lm_head_bias=keys.flag("lm_head_bias", False),
    )


def _dbrx(keys: _Keys) -> _Architecture:
    """DBRX: its own key names, two of its groups nested; LayerNorms without bias."""
    attention_keys, ffn_keys = keys.group("attn_config"), keys.group("ffn_config")
    hidden, heads = keys.size("d_model"), keys.size("n_heads")
    if hidden % heads:
        keys.wrong(f"'d_model' {hidden} does not divide among {heads} heads")
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=attention_keys.size("kv_n_heads"),
        head_dim=max(1, hidden // heads),
    )
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden,
        moe_layers=keys.size("n_layers"),
        experts=ffn_keys.size("moe_num_experts"),
        experts_per_token=ffn_keys.size("moe_top_k"),
        expert_intermediate=ffn_keys.size("ffn_hidden_size"),
    )


def _stepped_moe_layers(keys: _Keys, layers: int) -> int:
    """Qwen's: every so many layers, but for those named."""
    sparse_step = keys.optional_size("decoder_sparse_step") or 1
    dense_ids = set(keys.layer_ids("mlp_only_layers", layers))
    return sum(i not in dense_ids and (i + 1) % sparse_step == 0 for i in range(layers))


def _qwen3_moe(keys: _Keys) -> _Architecture:
    """Qwen3-MoE: head_dim apart from hidden/heads, a norm over each query and key head. arXiv 2505.09388."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    moe_layers = _stepped_moe_layers(keys, layers)
    slides = keys.flag("use_sliding_window", False)
    head_dim = _head_dim(keys, hidden, heads)
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=head_dim,
        bias=keys.flag("attention_bias", False),
        window=_window(keys, "sliding_window", layers) if slides else (0, 0),
    )
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden + 2 * head_dim,
        dense_layers=layers - moe_layers,
        dense_intermediate=keys.size("intermediate_size") if moe_layers < layers else 0,
        moe_layers=moe_layers,
        experts=keys.size("num_experts", "num_local_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        expert_intermediate=keys.size("moe_intermediate_size"),
    )


def _qwen2_moe(keys: _Keys) -> _Architecture:
    """Qwen2-MoE: biases on the inputs only, a shared expert with width and gate. arXiv 2407.10671."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    moe_layers = _stepped_moe_layers(keys, layers)
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.optional_size("num_key_value_heads") or heads,
        head_dim=_head_dim(keys, hidden, heads),
        bias=keys.flag("qkv_bias", True),
        output_bias=False,
    )
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden,
        dense_layers=layers - moe_layers,
        dense_intermediate=keys.size("intermediate_size") if moe_layers < layers else 0,
        moe_layers=moe_layers,
        experts=keys.size("num_experts", "num_local_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        expert_intermediate=keys.size("moe_intermediate_size"),
        shared_intermediate=keys.size("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _olmoe(keys: _Keys) -> _Architecture:
    """OLMoE: one norm over all query heads and one over all key heads. arXiv 2409.02060."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    kv_heads = keys.optional_size("num_key_value_heads") or heads
    if hidden % heads:
        keys.wrong(f"hidden size {hidden} does not divide among {heads} heads")
    head_dim = max(1, hidden // heads)
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        bias=keys.flag("attention_bias", False),
    )
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden + (heads + kv_heads) * head_dim,
        moe_layers=layers,
        experts=keys.size("num_experts", "num_local_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        expert_intermediate=keys.size("intermediate_size"),
    )


def _mla(keys: _Keys, hidden: int) -> tuple[Attention, int, int]:
    """Multi-head latent attention, its parameters and its norms per layer. DeepSeek-V2, section 2.1."""
    heads, kv_lora = keys.size("num_attention_heads"), keys.size("kv_lora_rank")
    nope, rope = keys.size("qk_nope_head_dim"), keys.size("qk_rope_head_dim")
    value, bias = keys.size("v_head_dim"), keys.flag("attention_bias", False)
    q_lora = keys.size_or_null("q_lora_rank")  # null: queries are not compressed
    if q_lora:
        queries = (hidden + bias) * q_lora + q_lora * heads * (nope + rope)
    else:
        queries = hidden * heads * (nope + rope)
    down = (hidden + bias) * (kv_lora + rope)
    up = kv_lora * heads * (nope + value)
    outward = (heads * value + bias) * hidden
    attention = Attention(
        kind="mla",
        heads=heads,
        kv_heads=heads,
        head_dim=nope + rope,
        value_dim=value,
        kv_lora_dim=kv_lora,
        rope_dim=rope,
    )
    return attention, queries + down + up + outward, q_lora + kv_lora


def _deepseek(keys: _Keys) -> _Architecture:
    """DeepSeek-V2 (arXiv 2405.04434), V3 (2412.19437), Kimi-K2: MLA, dense first layers, shared experts."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    attention, count, norms = _mla(keys, hidden)
    first_moe = keys.size("first_k_dense_replace", least=0)
    every = keys.optional_size("moe_layer_freq") or 1
    moe_layers = sum(i % every == 0 for i in range(first_moe, layers))
    expert = keys.size("moe_intermediate_size")
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden + norms,
        dense_layers=layers - moe_layers,
        dense_intermediate=keys.size("intermediate_size") if moe_layers < layers else 0,
        mlp_bias=keys.flag("mlp_bias", False),
        moe_layers=moe_layers,
        experts=keys.size("n_routed_experts", "num_local_experts", "num_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        expert_intermediate=expert,
        shared_intermediate=expert * keys.size("n_shared_experts", least=0),
    )


def _deepseek_v3(keys: _Keys) -> _Architecture:
    """DeepSeek-V2's form with routers whose choices are corrected."""
    return replace(_deepseek(keys), router_correction=True)


def _glm4_moe(keys: _Keys) -> _Architecture:
    """GLM-4.5: biases on the inputs only, optional head norms, dense first layers, shared experts."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    head_dim = _head_dim(keys, hidden, heads)
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=head_dim,
        bias=keys.flag("attention_bias", False),
        output_bias=False,
    )
    dense_layers = min(layers, keys.size("first_k_dense_replace", least=0))
    expert = keys.size("moe_intermediate_size")
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden + 2 * head_dim * keys.flag("use_qk_norm", False),
        dense_layers=dense_layers,
        dense_intermediate=keys.size("intermediate_size") if dense_layers else 0,
        moe_layers=layers - dense_layers,
        experts=keys.size("n_routed_experts", "num_local_experts", "num_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        expert_intermediate=expert,
        shared_intermediate=expert * keys.size("n_shared_experts", least=0),
        router_correction=True,
    )


def _gpt_oss(keys: _Keys) -> _Architecture:
    """gpt-oss: biases everywhere, a sink per head, every other layer windowed. arXiv 2508.10925."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    windowed = keys.layers_of_type("sliding_attention", layers)
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=keys.size("head_dim"),
        bias=keys.flag("attention_bias", True),
        sinks=True,
        window=_window(keys, "sliding_window", (layers + 1) // 2 if windowed is None else windowed),
    )
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden,
        moe_layers=layers,
        experts=keys.size("num_local_experts", "num_experts"),
        experts_per_token=keys.size("num_experts_per_tok", "experts_per_token"),
        expert_intermediate=keys.size("intermediate_size"),
        expert_bias=True,
        router_bias=True,
    )


def _llama4(keys: _Keys) -> _Architecture:
    """Llama 4 with its vision tower left out: the text model is nested under `text_config`."""
    return _llama4_text(keys.group("text_config"))


def _llama4_text(keys: _Keys) -> _Architecture:
    """Llama 4: one shared expert beside the routed ones; layers without rotary positions see everything."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    step = keys.size("interleave_moe_layer_step")
    listed = keys.layer_ids("moe_layers", layers)
    moe_layers = len(listed) if listed else len(range(step - 1, layers, step))
    expert = keys.size("intermediate_size")
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=keys.size("num_attention_heads"),
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=keys.size("head_dim"),
        bias=keys.flag("attention_bias", False),
        window=_window(keys, "attention_chunk_size", _llama4_chunked_layers(keys, layers)),
    )
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=count,
        norms_per_layer=2 * hidden,
        dense_layers=layers - moe_layers,
        dense_intermediate=keys.size("intermediate_size_mlp") if moe_layers < layers else 0,
        moe_layers=moe_layers,
        experts=keys.size("num_local_experts", "num_experts"),
        experts_per_token=keys.size("num_experts_per_tok"),
        expert_intermediate=expert,
        shared_intermediate=expert,
    )


def _llama4_chunked_layers(keys: _Keys, layers: int) -> int:
    """Layers that attend within a chunk: as listed, or all but every fourth."""
    listed = keys.layers_of_type("chunked_attention", layers)
    if listed is not None:
        return listed
    interval = keys.optional_size("no_rope_layer_interval") or 4
    return layers - layers // interval


def _llama(keys: _Keys) -> _Architecture:
    """Llama: dense, attention biases and MLP biases off unless the config asks for them."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.optional_size("num_key_value_heads") or heads,
        head_dim=_head_dim(keys, hidden, heads),
        bias=keys.flag("attention_bias", False),
    )
    return _dense(keys, hidden, layers, attention, count, 2 * hidden)


def _mistral(keys: _Keys) -> _Architecture:
    """Mistral: Llama's shape with a sliding window in all layers (v0.1) or none."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    heads = keys.size("num_attention_heads")
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=heads,
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=_head_dim(keys, hidden, heads),
        window=_window(keys, "sliding_window", layers),
    )
    return _dense(keys, hidden, layers, attention, count, 2 * hidden)


def _qwen3(keys: _Keys) -> _Architecture:
    """Qwen3, dense: a norm over each query and key head; the window, where used, spares the first layers."""
    hidden, layers = keys.size("hidden_size"), keys.size("num_hidden_layers")
    head_dim = keys.size("head_dim")
    spared = keys.optional_size("max_window_layers") or 0
    slides = keys.flag("use_sliding_window", False)
    attention, count = _gqa(
        keys,
        hidden=hidden,
        heads=keys.size("num_attention_heads"),
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=head_dim,
        bias=keys.flag("attention_bias", False),
        window=_window(keys, "sliding_window", max(0, layers - spared)) if slides else (0, 0),
    )
    return _dense(keys, hidden, layers, attention, count, 2 * hidden + 2 * head_dim)


def _dense(
    keys: _Keys,
    hidden: int,
    layers: int,
    attention: Attention,
    attention_per_layer: int,
    norms_per_layer: int,
) -> _Architecture:
    """What the dense adapters share."""
    return _Architecture(
        frame=_frame(keys),
        hidden=hidden,
        attention=attention,
        attention_per_layer=attention_per_layer,
        norms_per_layer=norms_per_layer,
        dense_layers=layers,
        dense_intermediate=keys.size("intermediate_size"),
        mlp_bias=keys.flag("mlp_bias", False),
    )


_ADAPTERS: dict[str, Callable[[_Keys], _Architecture]] = {
    "dbrx": _dbrx,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    "kimi_k2": _deepseek_v3,
    "llama": _llama,
    "llama4": _llama4,
    "llama4_text": _llama4_text,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "phimoe": _phimoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


# What the bundled runtime does not compute ------------------------------------------------------------------

_ROPE_TYPES = (None, "default", "llama3", "yarn", "longrope")


def _not_executed(keys: _Keys) -> Iterator[str]:
    """What of a model runtime_min refuses, in words: as runtime_min.model_config has it."""
    packing = _packing(keys)[0]
    quantization = keys.value("quantization_config")
    if keys.value("text_config") is not None:
        keys = keys.group("text_config")
        quantization = keys.value("quantization_config") or quantization
    if quantization is not None and packing == "none":
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        yield f"quantised checkpoints ({method})"
    rope = _rope(keys)
    rope_type = rope.get("rope_type", rope.get("type"))
    if keys.value("mlp_bias"):
        yield "biases in MLPs"
    if keys.value("hidden_act") not in (None, "silu"):
        yield f"the activation {_shown(keys.value('hidden_act'))}"
    if rope_type not in _ROPE_TYPES:
        yield f"rotary positions of type {_shown(rope_type)}"
    if keys.value("use_sliding_window") and keys.value("model_type") == "qwen2_moe":
        yield "sliding windows of qwen2_moe"


def _executed_context(keys: _Keys, longest: int) -> int:
    """Beyond the original context LongRoPE changes cached keys too: runtime_min stays within."""
    rope = _rope(keys)
    original = rope.get("original_max_position_embeddings", keys.value("original_max_position_embeddings"))
    if rope.get("rope_type", rope.get("type")) != "longrope" or not isinstance(original, int):
        return longest
    return min(original, longest)


def _rope(keys: _Keys) -> Mapping[str, object]:
    found = keys.value("rope_parameters") or keys.value("rope_scaling")
    return found if isinstance(found, Mapping) else {}


_KEPT_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore")
_KEPT = ("lm_head", "embed_tokens", "norm", ".gate", ".router", ".shared_expert_gate")  # never in fp8


def _packing(keys: _Keys) -> tuple[Packing, tuple[int, int]]:
    """The format in which runtime_min reads this checkpoint, and the rows and values that share a scale in
    fp8 (0: all); every known format has a size. As runtime_min.model_config has it."""
    found: Any = keys.value("quantization_config")
    model_type = keys.value("model_type")
    match found:
        case {"quant_method": "moeplan", "format": wanted}:
            if name := next((n for n in get_args(Packing) if n == wanted and n in PACKED_BYTES), None):
                return name, (0, 0)
            keys.wrong(f"quantization_config has format {wanted!r}, supported are {', '.join(PACKED_BYTES)}")
        case {"quant_method": "mxfp4"} if model_type == "gpt_oss":
            return "mxfp4", (0, 0)
        case {"quant_method": "fp8" | "compressed-tensors"} if model_type not in EXPERTS_TOGETHER:
            block = _fp8_block(found)
            return ("none", (0, 0)) if block is None else ("fp8", block)
    return "none", (0, 0)


def _fp8_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and values that share a scale; None where the weights are in something else, or some in bf16."""
    lists = [quantization.get(key) or () for key in _KEPT_KEYS]
    kept = [name for names in lists if isinstance(names, (list, tuple)) for name in names]
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
                    return {"channel": (1, 0), "tensor": (0, 0)}.get(str(how))
    return None


def _scaled(keys: _Keys, architecture: _Architecture, packing: Packing, block: tuple[int, int]) -> Scaled:
    """What matrices take whose scales lie apart: experts', and in fp8 all of a layer but its router."""
    a, hidden = architecture, architecture.hidden

    def sizes(*matrices: tuple[int, int]) -> tuple[int, int]:
        values = sum(rows * columns for rows, columns in matrices)
        if packing == "mxfp4":
            return values, values // 2 + values // 32
        blocks = (
            math.ceil(rows / (block[0] or rows)) * math.ceil(columns / (block[1] or columns))
            for rows, columns in matrices
            if rows and columns
        )
        return values, values + 4 * sum(blocks)

    def mlp(width: int) -> tuple[int, int]:
        return sizes((width, hidden), (hidden, width), (width, hidden))

    if packing not in SCALED:
        return Scaled()
    expert = mlp(a.expert_intermediate)
    if packing == "mxfp4":
        return Scaled(expert_values=expert[0], expert_bytes=expert[1])
    attention = sizes(*_projections(keys, a.attention, hidden))
    dense, shared = mlp(a.dense_intermediate), mlp(a.shared_intermediate)
    return Scaled(
        attention_values=attention[0],
        attention_bytes=attention[1],
        expert_values=expert[0],
        expert_bytes=expert[1],
        mlp_values=a.dense_layers * dense[0] + a.moe_layers * shared[0],
        mlp_bytes=a.dense_layers * dense[1] + a.moe_layers * shared[1],
    )


def _projections(keys: _Keys, a: Attention, hidden: int) -> Iterator[tuple[int, int]]:
    """Rows and columns of the matrices of a layer's attention."""
    queries, outward = a.heads * a.head_dim, (hidden, a.heads * a.value_dim)
    if a.kind == "gqa":
        keys_shape = (a.kv_heads * a.head_dim, hidden)
        return iter(((queries, hidden), keys_shape, keys_shape, outward))
    compressed = keys.optional_size("q_lora_rank")
    inward = ((compressed, hidden), (queries, compressed)) if compressed else ((queries, hidden),)
    down = (a.kv_lora_dim + a.rope_dim, hidden)
    up = (a.heads * (a.head_dim - a.rope_dim + a.value_dim), a.kv_lora_dim)
    return iter((*inward, down, up, outward))


# Bytes in the checkpoint ------------------------------------------------------------------------------------


def _stored_bytes(keys: _Keys, architecture: _Architecture) -> tuple[float, float]:
    """Mean bytes per parameter of the routed experts and of the rest, as the checkpoint stores them."""
    plain = keys.dtype_bytes()
    quantization = keys.optional_group("quantization_config")
    if quantization is None:
        return plain, plain
    method = quantization.text("quant_method")
    if method == "mxfp4":
        return _mxfp4_bytes(architecture, plain), plain
    if method == "compressed-tensors" and _packing(keys)[0] == "fp8":
        return _layer_bytes(architecture, plain, 1.0, 4.0, 0)
    if method == "fp8":
        return _layer_bytes(architecture, plain, 1.0, 4.0, quantization.block_values())
    if method in ("awq", "gptq"):
        bits, group = quantization.size("bits"), quantization.group_values()
        return _layer_bytes(architecture, plain, bits / 8, 2.0 + bits / 8, group)
    if method == "moeplan":
        packed = {str(name): size for name, size in PACKED_BYTES.items()}
        return packed.get(quantization.text("format"), plain), plain
    if method:
        keys.wrong(
            f"unsupported quant_method {method!r}: supported are awq, compressed-tensors in fp8, "
            "fp8, gptq, moeplan and mxfp4"
        )
    return plain, plain


def _mxfp4_bytes(architecture: _Architecture, plain: float) -> float:
    """Experts only: 4 bits a weight, 8 bits of scale for 32 of them (OCP MX 1.0); biases stay as they are."""
    if not architecture.experts:
        return plain
    biases = architecture.expert_biases() / architecture.expert_parameters()
    return (1 - biases) * 4.25 / 8 + biases * plain


def _layer_bytes(
    architecture: _Architecture, plain: float, weight: float, block: float, block_values: int
) -> tuple[float, float]:
    """Every matrix in a layer but the router: `weight` bytes and a share of the `block` bytes that some
    values have in common. fp8: a float32 scale; AWQ and GPTQ: a 16-bit scale and a zero point."""
    matrix = weight + block / block_values if block_values else weight
    parameters = architecture.parameters()
    quantized = parameters.attention + parameters.shared_experts + parameters.dense_mlp
    other = parameters.total() - parameters.routed_experts
    return matrix, (quantized * matrix + (other - quantized) * plain) / other


# Reading keys -----------------------------------------------------------------------------------------------


class _Keys:
    """Typed access to a config; notes every problem and hands out 1 in place of a wrong size."""

    def __init__(self, config: Mapping[str, object], name: str, where: Span) -> None:
        self._config = config
        self._outer: _Keys = self
        self._prefix = ""
        self._name = name
        self._where = where
        self._problems: dict[str, None] = {}  # in the order met, each once

    def group(self, key: str) -> _Keys:
        """The nested group `key`, required."""
        value = self._config.get(key)
        if value is None:
            self._missing(key)
        elif not isinstance(value, Mapping):
            self._ill_typed(key, value, "a group of keys")
        return self._nested(key, value)

    def value(self, key: str) -> object:
        """Whatever `key` holds, None where it is absent."""
        return self._config.get(key)

    def optional_group(self, key: str) -> _Keys | None:
        """The nested group `key`, or None where it is absent or null."""
        return None if self._config.get(key) is None else self.group(key)

    def _nested(self, key: str, value: object) -> _Keys:
        inner = _Keys(value if isinstance(value, Mapping) else {}, self._name, self._where)
        inner._prefix = f"{self._prefix}{key}."
        inner._outer = self
        inner._problems = self._problems
        return inner

    def size(self, *names: str, least: int = 1) -> int:
        """The whole number under the first of `names` that is present, required."""
        key = next((name for name in names if self._config.get(name) is not None), names[0])
        value = self._config.get(key)
        if value is None:
            self._missing(key)
            return 1
        return self._checked_size(key, value, least)

    def optional_size(self, key: str) -> int | None:
        """As `size`, or None where the key is absent or null."""
        value = self._config.get(key)
        return None if value is None else self._checked_size(key, value, 1)

    def size_or_null(self, key: str) -> int:
        """As `size` for a key that must be there but may be null, read as 0."""
        if key not in self._config:
            self._missing(key)
            return 0
        return self.optional_size(key) or 0

    def _checked_size(self, key: str, value: object, least: int) -> int:
        limit = _LIMITS.get(key, _DEFAULT_LIMIT)
        if isinstance(value, bool) or not isinstance(value, int):
            self._ill_typed(key, value, "a whole number")
        elif not least <= value <= limit:
            self.wrong(f"'{self._prefix}{key}' is {_shown(value)}, expected {least} to {limit}")
        else:
            return value
        return 1

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where the key is absent or null."""
        value = self._config.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._ill_typed(key, value, "true or false")
            return default
        return value

    def text(self, key: str) -> str:
        """A string, required; empty after a complaint."""
        value = self._config.get(key)
        if isinstance(value, str):
            return value
        if value is None:
            self._missing(key)
        else:
            self._ill_typed(key, value, "a string")
        return ""

    def layer_ids(self, key: str, layers: int) -> tuple[int, ...]:
        """A list of layer numbers, empty where absent or null."""
        value = self._config.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < layers for i in value):
            self._ill_typed(key, value, f"a list of layer numbers below {layers}")
            return ()
        return tuple(sorted(set(value)))

    def layers_of_type(self, name: str, layers: int) -> int | None:
        """How many entries of `layer_types` say `name`; None where the config has no such list."""
        value = self._config.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or not all(isinstance(t, str) for t in value):
            self._ill_typed("layer_types", value, f"a list of {layers} names")
            return None
        return value.count(name)

    def context_tokens(self) -> int:
        """The longest context the model was made for."""
        return self.size("max_position_embeddings", "max_seq_len")

    def dtype_bytes(self) -> float:
        """Bytes per parameter of the unquantised tensors; bfloat16 where the config is silent."""
        inner = self._config.get("text_config")
        places: list[Mapping[str, object]] = [self._config]
        if isinstance(inner, Mapping):
            places.append(inner)
        for key in ("torch_dtype", "dtype"):
            for place in places:
                if place.get(key) is not None:
                    return self._dtype_size(key, place[key])
        return _STORED_BYTES["bfloat16"]

    def _dtype_size(self, key: str, value: object) -> float:
        if isinstance(value, str) and value.removeprefix("torch.") in _STORED_BYTES:
            return _STORED_BYTES[value.removeprefix("torch.")]
        self._ill_typed(key, value, f"one of {', '.join(_STORED_BYTES)}")
        return 2.0

    def block_values(self) -> int:
        """How many weights share one scale: the product of `weight_block_size`, 0 where whole tensors do."""
        value = self._config.get("weight_block_size")
        if value is None:
            return 0
        if (
            not isinstance(value, list)
            or len(value) != 2
            or not all(type(n) is int and 0 < n <= _DEFAULT_LIMIT for n in value)
        ):
            self._ill_typed("weight_block_size", value, "two whole numbers")
            return 0
        return int(value[0] * value[1])

    def group_values(self) -> int:
        """How many weights share one scale in AWQ and GPTQ: `group_size`, 0 where a whole row does (-1)."""
        return 0 if self._config.get("group_size") == -1 else self.size("group_size")

    def wrong(self, problem: str) -> None:
        """Note a problem in the config."""
        self._problems[problem] = None

    def _missing(self, key: str) -> None:
        self.wrong(f"missing key '{self._prefix}{key}'")

    def _ill_typed(self, key: str, value: object, expected: str) -> None:
        self.wrong(f"'{self._prefix}{key}' is {_shown(value)}, expected {expected}")

    def raise_problems(self) -> None:
        """Raise all that was noted, if anything was."""
        if self._problems:
            raise CompileError(*(self._diagnostic(problem) for problem in self._problems))

    def _diagnostic(self, problem: str) -> Diagnostic:
        return Diagnostic(
            code="model-config",
            span=self._where,
            message=f"configuration of {self._name}: {problem}",
            hint="give the config.json exactly as it was published with the weights",
        )


def _shown(value: object) -> str:
    """A value as JSON would write it, cut to a readable length."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:37]}..."


def _unsupported(model_type: object, name: str, where: Span) -> Diagnostic:
    found = "no model_type" if model_type is None else f"unsupported model_type {_shown(model_type)}"
    return Diagnostic(
        code="unsupported-model",
        span=where,
        message=f"configuration of {name}: {found}",
        hint=f"supported: {', '.join(supported_model_types())}",
    )


# Reading the file -------------------------------------------------------------------------------------------


def _read_json_object(file: Path, where: Span) -> Mapping[str, object]:
    try:
        if file.stat().st_size > _CONFIG_BYTES_LIMIT:
            raise _unreadable(file, where, "is too large for a config.json")
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise _unreadable(file, where, _reason(error)) from None
    except RecursionError:
        raise _unreadable(file, where, "is nested too deeply") from None
    if not isinstance(value, dict):
        raise _unreadable(file, where, f"holds {_shown(value)}, not an object")
    return value


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {(error.strerror or type(error).__name__).lower()}"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: line {error.lineno} column {error.colno}: {error.msg}"
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 text: byte {error.start}"
    return f"is not usable: {error}"


def _unreadable(file: Path, where: Span, reason: str) -> CompileError:
    return CompileError(
        Diagnostic(
            code="model-file",
            span=where,
            message=f"{file} {reason}",
            hint="give the path of a Hugging Face config.json, or of a folder that holds one",
        )
    )
