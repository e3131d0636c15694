"""What tells one decoder from another: names of tensors and keys, and the few steps that differ.

All have RMS norms, rotary positions, grouped-query attention without biases, and gated MLPs with SiLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One `model_type`.

    `class_name` is transformers' class. Layer N has its MLP's tensors under `model.layers.N.<mlp>.`;
    `matrices` names an expert's in the order gate, down, up (w1, w2, w3). `routed`: there are experts and a
    router; otherwise one MLP takes every token. `query_norm` says over what queries and keys are normalised:
    nothing, each head, or all heads of a token together.

    `experts_keys` and `width_key` name the experts' number and width in config.json; `norm_eps` and
    `rope_theta` are transformers' values where config.json is silent. The weights of a token's experts sum
    to 1 if `renormalise` says so, or, at None, if config.json's `norm_topk_prob` does.
    """

    class_name: str
    mlp: str
    matrices: tuple[str, str, str]
    routed: bool
    query_norm: Literal["none", "head", "token"]
    experts_keys: tuple[str, ...]
    width_key: str
    renormalise: bool | None
    norm_eps: float
    rope_theta: float
