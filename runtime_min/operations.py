"""The operations that the engines call, for every architecture of `models/`.

N sequences, T tokens, H hidden, Q query heads, V key and value heads, D head dimension
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min.layers import (
    Rope,
    Routing,
    choose_experts,
    expert,
    linear,
    rms_norm,
    rope_frequencies,
)
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.plan_file import RuntimePlan, call_tokens

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


Matrices = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # expert -> w1, w2, w3


class Operations:
    """A decoder's operations on the tensors they are given, in pieces of at most `call_tokens` tokens.

    `resident` are the weights that do not move.
    """

    def __init__(self, plan: RuntimePlan, config: ModelConfig, resident: Mapping[str, Tensor]) -> None:
        m, batch, dtype = plan.model, plan.batch, DTYPES[plan.model.compute_dtype]
        self._model, self._config, self._weights = m, config, resident
        self._call = call_tokens(batch)
        self._head_rows = batch.micro_batch
        self._kind = BY_MODEL_TYPE[m.architecture]
        frequencies = rope_frequencies(m.head_dim, config.rope_theta, config.rope_scaling)
        self._rope = Rope(frequencies, batch.context_tokens, dtype)

    def embed(self, tokens: Tensor, out: Tensor) -> None:
        """The embeddings of `tokens` [T], to `out` [T, H]."""
        weight = self._weight("model.embed_tokens")
        for rows in pieces(len(tokens), self._call):
            out[rows] = F.embedding(tokens[rows], weight)

    def queries(
        self, layer: int, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `hidden` [T, H], rotated: [T, Q, D], [T, V, D], [T, V, D]."""
        x = rms_norm(hidden, self._layer(layer, "input_layernorm"), self._config.norm_eps)
        q, k, v = (linear(x, weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]) for name in "qkv")
        if self._kind.query_norm != "none":
            q, k = self._normalise(layer, "q", q), self._normalise(layer, "k", k)
        if self._config.clip_qkv is not None:
            q, k, v = (z.clamp(-self._config.clip_qkv, self._config.clip_qkv) for z in (q, k, v))
        q, k, v = (z.view(len(x), -1, self._model.head_dim) for z in (q, k, v))
        return self._rope(q, positions), self._rope(k, positions), v

    def _normalise(self, layer: int, name: str, x: Tensor) -> Tensor:
        """Queries or keys [T, heads * D], over each head or over all of a token."""
        weight = self._layer(layer, f"self_attn.{name}_norm")
        return rms_norm(x.view(len(x), -1, len(weight)).float(), weight, self._config.norm_eps).view_as(x)

    def add_attended(self, layer: int, hidden: Tensor, out: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Add the output projection of `out` [T, Q * D] to `hidden`."""
        hidden += linear(out, weights[f"model.layers.{layer}.self_attn.o_proj.weight"])

    def choose(self, layer: int, hidden: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights: [T, K] float32, [T, K]; `normed` gets their input.

        A dense model has one expert, which all take.
        """
        norm = self._layer(layer, "post_attention_layernorm")
        for rows in pieces(len(hidden), self._call):
            normed[rows] = rms_norm(hidden[rows], norm, self._config.norm_eps)
        if not self._kind.routed:
            one = hidden.new_ones(len(hidden), 1)
            return one, torch.zeros_like(one, dtype=torch.int64)
        gate, top = self._layer(layer, f"{self._kind.mlp}.gate"), self._model.experts_per_token
        choices = [
            choose_experts(normed[rows], gate, top, self._config.renormalise)
            for rows in pieces(len(hidden), self._call)
        ]
        weights, experts = (torch.cat(parts) for parts in zip(*choices, strict=True))
        return weights, experts

    def add_experts(
        self, experts: Iterable[int], routing: Routing, normed: Tensor, out: Tensor, matrices: Matrices
    ) -> None:
        """Add what `experts` say of `normed` [T, H] to `out` [T, H], float32."""
        for e in experts:
            first, end = routing.starts[e : e + 2]
            if first == end:
                continue
            w1, w2, w3 = matrices(e)
            for rows in pieces(end - first, self._call, first):
                if not self._kind.routed:  # all tokens, in their order
                    out[rows] += expert(normed[rows], w1, w2, w3)
                    continue
                tokens = routing.tokens[rows]
                x = normed.index_select(0, tokens)  # faster than indexing
                out.index_add_(0, tokens, expert(x, w1, w2, w3).float().mul_(routing.weights[rows, None]))

    def scores(self, hidden: Tensor, rows: Tensor, out: Tensor) -> None:
        """The next-token scores of `rows` [N] of `hidden`, to `out` [N, vocab], float32."""
        weight = self._weight("model.embed_tokens" if self._config.tied else "lm_head")
        norm = self._weight("model.norm")
        for some in pieces(len(rows), self._head_rows):
            x = rms_norm(hidden[rows[some]], norm, self._config.norm_eps)
            out[some] = linear(x, weight)

    def _weight(self, name: str) -> Tensor:
        return self._weights[name + ".weight"]

    def _layer(self, layer: int, name: str) -> Tensor:
        return self._weight(f"model.layers.{layer}.{name}")


def pieces(count: int, most: int, first: int = 0) -> Sequence[slice]:
    """Slices of at most `most` rows that cover `count` rows from `first`."""
    end = first + count
    return [slice(start, min(end, start + most)) for start in range(first, end, most)]
