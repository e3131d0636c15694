"""What tells one decoder from another: names of tensors and keys, and the steps that differ.

All normalise before attention and before the MLP, and have gated MLPs. A field's default is what most do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One `model_type`.

    `class_name` is transformers' class; capitals may differ, as they do in Phi-3.5-MoE's config.json. Layer N
    has its MLP's tensors under `model.layers.N.<mlp>.`; `matrices` names those of an MLP or expert in the
    order gate, down, up. `routed`: some layers have experts and a router; otherwise one MLP takes every
    token. Which layers have none `dense` says: none; the first ones; those that `decoder_sparse_step` leaves
    out; those between the layers with experts.

    `experts`: each has matrices of its own, or its part of one tensor for all: rows of gate, down and up
    alike (down is stored transposed); or gate and up side by side, in `halves` or in `pairs`, both and down
    stored transposed. `shared` names an MLP that takes all tokens beside the experts; `shared_gate` a
    factor for each token. Experts in pairs have biases and a clamped SwiGLU, others SiLU.

    `norm` is RMS or LayerNorm, with or without bias. `attention` keeps keys and values, or (MLA) the latents
    that these are made of. `query_norm` says over what queries and keys are normalised: nothing, each head,
    all heads of a token together, or each head without weights and after it is rotated; where
    `query_norm_key` is false in config.json there is none. `biases`: where the key `bias_key` (or without
    it `has_biases`) says that projections have them, these are of all of them or not of the output.
    `neighbours`: rotary pairs are neighbouring dimensions, not ones half a head apart. `partial` is the part
    of a head's dimensions that is rotated. `windows`: which layers see only the latest tokens, where
    config.json gives a window; `chunks`: those with rotary positions see only their own chunk.

    `router` gives the experts' weights: `softmax`, or of some groups of experts only; `sigmoid`, chosen with
    a correction and in groups; `sparsemixer`; or `input`: sigmoids, which weigh what goes into the experts.
    They sum to 1 if config.json's `renormalise_key` says so, or, where there is none, `renormalise`.

    `experts_keys`, `top_keys` and `width_key` name the experts' number, number a token and width in
    config.json; `norm_eps` and `rope_theta` are transformers' values where it is silent. `inner` is the key
    of config.json that holds the decoder's keys. `keys` gives other keys for some, from groups with a dot,
    and `names` other beginnings for parts of tensor names. Tensors whose names begin as in `unused` are not
    of the decoder.
    """

    class_name: str
    mlp: str = "mlp"
    matrices: tuple[str, ...] = ("gate_proj", "down_proj", "up_proj")
    routed: bool = True
    dense: Literal["none", "first", "stepped", "interleaved"] = "none"
    experts: Literal["apart", "rows", "halves", "pairs"] = "apart"
    shared: str = ""
    shared_gate: str = ""
    norm: Literal["rms", "layer", "biased layer"] = "rms"
    attention: Literal["grouped", "latent"] = "grouped"
    query_norm: Literal["none", "head", "token", "rotated"] = "none"
    query_norm_key: str = ""
    biases: Literal["none", "all", "inputs"] = "none"
    bias_key: str = "attention_bias"
    has_biases: bool = False
    fused_qkv: bool = False
    sinks: bool = False
    neighbours: bool = False
    partial: float = 1.0
    windows: Literal["none", "all", "used", "above", "listed"] = "none"
    chunks: bool = False
    router: Literal["softmax", "grouped softmax", "sigmoid", "sparsemixer", "input"] = "softmax"
    gate: str = "gate"
    gate_bias: bool = False
    renormalise: bool = True
    renormalise_key: str = ""
    experts_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_keys: tuple[str, ...] = ("num_experts_per_tok",)
    width_key: str = "intermediate_size"
    dense_width_key: str = "intermediate_size"
    norm_eps: float = 1e-5
    rope_theta: float = 1e4
    inner: str = ""
    keys: tuple[tuple[str, str], ...] = ()
    names: tuple[tuple[str, str], ...] = ()
    unused: tuple[str, ...] = ()
