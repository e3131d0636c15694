"""The operations that the engines call, for every architecture of `models/`.

N sequences, T tokens, H hidden, Q query heads, V key and value heads, D head dimension
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min import routers
from moeplan.runtime_min.layers import (
    Rope,
    Routing,
    clamped_expert,
    expert,
    fused_expert,
    layer_norm,
    linear,
    rms_norm,
    rope_frequencies,
)
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.models.tensors import CORRECTION
from moeplan.runtime_min.plan_file import RuntimePlan, call_tokens
from moeplan.runtime_min.ranks import ALONE, Ranks
from moeplan.runtime_min.shares import has_whole_experts

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


Matrices = Callable[[int], tuple[Any, ...]]  # expert -> its tensors


class Operations:
    """A decoder's operations on the tensors they are given, in pieces of at most `call_tokens` tokens.

    `resident` are the weights that do not move. Weights and plan are those of one of `ranks`.
    """

    def __init__(
        self, plan: RuntimePlan, config: ModelConfig, resident: Mapping[str, Tensor], ranks: Ranks = ALONE
    ) -> None:
        m, batch, dtype = plan.model, plan.batch, DTYPES[plan.model.compute_dtype]
        self._model, self._config, self._weights, self._ranks = m, config, resident, ranks
        self._adds_bias = ranks.leads or has_whole_experts(plan)  # of an expert, once in the sum
        part = ranks.share.part(m.vocab)
        self._tokens = slice(part.start, part.stop)  # those whose embeddings and scores are here
        self._call = call_tokens(batch)
        self._head_rows = batch.micro_batch
        self._kind = m.kind
        rotated = config.latent.rotated if config.latent else config.rotary_dim or m.head_dim
        frequencies = rope_frequencies(rotated, config.rope_theta, config.rope_scaling)
        neighbours = self._kind.neighbours
        self._rope = Rope(frequencies, batch.context_tokens, dtype, config.rope_factor, neighbours)

    def embed(self, tokens: Tensor, out: Tensor) -> None:
        """The embeddings of `tokens` [T], to `out` [T, H]."""
        weight = self._weight("model.embed_tokens")
        for rows in pieces(len(tokens), self._call):
            out[rows] = self._ranks.sum(self._embedded(tokens[rows], weight))

    def _embedded(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """The embeddings of `tokens` [T], zero for those that other ranks have: [T, H]."""
        if self._ranks.count == 1:
            return F.embedding(tokens, weight)
        here = (tokens >= self._tokens.start) & (tokens < self._tokens.stop)
        return F.embedding((tokens - self._tokens.start) * here, weight) * here[:, None]

    def queries(
        self, layer: int, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `hidden` [T, H], rotated: [T, Q, D], [T, V, D], [T, V, D]."""
        x = self._norm(hidden, f"model.layers.{layer}.input_layernorm")
        q, k, v = (
            self._project(layer, f"{name}_proj", x, weights, self._config.input_bias) for name in "qkv"
        )
        if self._config.query_norm in ("head", "token"):
            q, k = self._normalise(layer, "q", q), self._normalise(layer, "k", k)
        if self._config.clip_qkv is not None:
            q, k, v = (z.clamp(-self._config.clip_qkv, self._config.clip_qkv) for z in (q, k, v))
        q, k, v = (z.view(len(x), -1, self._model.head_dim) for z in (q, k, v))
        if layer in self._config.unrotated:
            return self._tempered(q, positions), k, v
        q, k = self._rope(q, positions), self._rope(k, positions)
        if self._config.query_norm == "rotated":
            eps = self._config.norm_eps
            q, k = (F.rms_norm(z.float(), z.shape[-1:], None, eps).to(z.dtype) for z in (q, k))
        return q, k, v

    def latents(
        self, layer: int, hidden: Tensor, positions: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Queries [T, Q, plain + rotated] and latents [T, kv + rotated] of `hidden` [T, H], rotated."""
        sizes, biased = self._config.latent, self._config.input_bias
        assert sizes is not None  # only then latents are asked for
        x = self._norm(hidden, f"model.layers.{layer}.input_layernorm")
        if sizes.query:
            q = self._project(layer, "q_a_proj", x, weights, biased)
            q = self._project(layer, "q_b_proj", self._latent_norm(layer, "q_a", q), weights)
        else:
            q = self._project(layer, "q_proj", x, weights)
        plain, rotated = q.view(len(x), -1, self._model.head_dim).tensor_split((sizes.plain,), 2)
        q = torch.cat((plain, self._rope(rotated, positions)), dim=2)
        both = self._project(layer, "kv_a_proj_with_mqa", x, weights, biased)
        kv, shared = both.tensor_split((sizes.kv,), 1)
        shared = self._rope(shared[:, None], positions)[:, 0]
        return q, torch.cat((self._latent_norm(layer, "kv_a", kv), shared), dim=1)

    def _latent_norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """Its epsilon is the class's, not config.json's."""
        return rms_norm(x.float(), self._layer(layer, f"self_attn.{name}_layernorm"), 1e-6)

    def _tempered(self, q: Tensor, positions: Tensor) -> Tensor:
        """Queries [T, Q, D] of a layer without positions."""
        if self._config.temperature is None:
            return q
        strength, tokens = self._config.temperature
        factor = strength * torch.log1p(torch.floor((positions + 1) / tokens)) + 1
        return (q * factor[:, None, None]).to(q.dtype)

    def _normalise(self, layer: int, name: str, x: Tensor) -> Tensor:
        """Queries or keys [T, heads * D], over each head or over all of a token."""
        weight, eps = self._layer(layer, f"self_attn.{name}_norm"), self._config.norm_eps
        heads = x.view(len(x), -1, len(weight)).float()
        if self._config.query_norm == "head" or self._ranks.count == 1:
            return rms_norm(heads, weight, eps).view_as(x)
        mean = self._ranks.sum(heads.square().mean(-1, keepdim=True)) / self._ranks.count
        return ((heads * (mean + eps).rsqrt()).to(weight.dtype) * weight).view_as(x)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, eps = self._weight(name), self._config.norm_eps
        if self._kind.norm == "rms":
            return rms_norm(x, weight, eps)
        return layer_norm(x, weight, self._weights.get(name + ".bias"), eps)

    def _project(
        self, layer: int, name: str, x: Tensor, weights: Mapping[str, Tensor], biased: bool = False
    ) -> Tensor:
        """One of attention's projections of x [T, in]."""
        name = f"model.layers.{layer}.self_attn.{name}"
        return linear(x, weights[name + ".weight"], weights[name + ".bias"] if biased else None)

    def sinks(self, layer: int, weights: Mapping[str, Tensor]) -> Tensor | None:
        """The score of each query head's sink, [Q]."""
        return weights[f"model.layers.{layer}.self_attn.sinks"] if self._kind.sinks else None

    def add_attended(self, layer: int, hidden: Tensor, out: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Add the output projection of `out` [T, Q * D] to `hidden`."""
        biased = self._config.output_bias and self._ranks.leads  # once in the sum
        hidden += self._ranks.sum(self._project(layer, "o_proj", out, weights, biased))

    def choose(self, layer: int, hidden: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights: [T, K] float32, [T, K]; `normed` gets their input.

        A dense model has one expert, which all take. In a layer without experts K is 0.
        """
        for rows in pieces(len(hidden), self._call):
            normed[rows] = self._norm(hidden[rows], f"model.layers.{layer}.post_attention_layernorm")
        if not self._kind.routed or layer in self._config.dense:
            one = hidden.new_ones(len(hidden), 0 if self._kind.routed else 1)
            return one, torch.zeros_like(one, dtype=torch.int64)
        choices = [self._route(layer, normed[rows]) for rows in pieces(len(hidden), self._call)]
        weights, experts = (torch.cat(parts) for parts in zip(*choices, strict=True))
        return weights, experts

    def _route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts that the layer's router gives x [T, H]."""
        name, top = f"{self._kind.mlp}.{self._kind.gate}", self._model.experts_per_token
        gate, choice, renormalise = self._layer(layer, name), self._config.choice, self._config.renormalise
        match self._kind.router:
            case "grouped softmax":
                return routers.grouped_softmax(x, gate, top, choice)
            case "sigmoid":
                correction = self._weights[f"model.layers.{layer}.{name}.{CORRECTION}"]
                return routers.sigmoid(x, gate, correction, top, choice, renormalise)
            case "sparsemixer":
                return routers.sparsemixer(x, gate, top, choice.jitter)
            case "input":
                return routers.of_input(x, gate, top)
        bias = self._weights[f"model.layers.{layer}.{name}.bias"] if self._kind.gate_bias else None
        return routers.softmax(x, gate, bias, top, renormalise)

    def add_common(self, layer: int, normed: Tensor, out: Tensor) -> None:
        """Add to `out` [T, H], float32, what the MLP says that takes all of `normed` [T, H]: a layer's
        shared experts, or its MLP where it has no others."""
        dense = layer in self._config.dense
        if not dense and not self._model.shared_intermediate:
            return
        mlp = self._kind.mlp if dense else f"{self._kind.mlp}.{self._kind.shared}"
        names = ("gate_proj", "down_proj", "up_proj")
        w1, w2, w3 = (self._layer(layer, f"{mlp}.{name}") for name in names)
        for rows in pieces(len(normed), self._call):
            said = expert(normed[rows], w1, w2, w3)
            if self._kind.shared_gate and not dense:
                gate = self._layer(layer, f"{self._kind.mlp}.{self._kind.shared_gate}")
                said = said * F.linear(normed[rows], gate).sigmoid()
            out[rows] += said

    def add_experts(
        self, experts: Iterable[int], routing: Routing, normed: Tensor, out: Tensor, matrices: Matrices
    ) -> None:
        """Add what `experts` say of `normed` [T, H] to `out` [T, H], float32."""
        for e in experts:
            first, end = routing.starts[e : e + 2]
            if first == end:
                continue
            tensors = matrices(e)
            for rows in pieces(end - first, self._call, first):
                if not self._kind.routed:  # all tokens, in their order
                    out[rows] += self._expert(normed[rows], tensors)
                    continue
                tokens, weights = routing.tokens[rows], routing.weights[rows, None]
                x = normed.index_select(0, tokens)  # faster than indexing
                if self._kind.router == "input":
                    out.index_add_(0, tokens, self._expert(x * weights.to(x.dtype), tensors).float())
                    continue
                out.index_add_(0, tokens, self._expert(x, tensors).float().mul_(weights))

    def _expert(self, x: Tensor, tensors: tuple[Any, ...]) -> Tensor:
        """What an expert says of x [T, H]."""
        match self._kind.experts:
            case "pairs":
                gate_up, gate_up_bias, down, bias = tensors
                bias = bias if self._adds_bias else torch.zeros_like(bias)
                return clamped_expert(x, gate_up, gate_up_bias, down, bias, *self._config.clamp)
            case "halves":
                return fused_expert(x, *tensors)
        w1, w2, w3 = tensors
        return expert(x, w1, w2.T if self._kind.experts == "rows" else w2, w3)

    def scores(self, hidden: Tensor, rows: Tensor, out: Tensor) -> None:
        """The next-token scores of `rows` [N] of `hidden`, to `out` [N, vocab], float32."""
        weight = self._weight("model.embed_tokens" if self._config.tied else "lm_head")
        bias = self._weights["lm_head.bias"] if self._config.head_bias and not self._config.tied else None
        for some in pieces(len(rows), self._head_rows):
            x = self._norm(hidden[rows[some]], "model.norm")
            if self._ranks.count > 1:
                out[some] = 0
            out[some, self._tokens] = linear(x, weight, bias)
            self._ranks.collect(out[some])

    def _weight(self, name: str) -> Tensor:
        return self._weights[name + ".weight"]

    def _layer(self, layer: int, name: str) -> Tensor:
        return self._weight(f"model.layers.{layer}.{name}")


def pieces(count: int, most: int, first: int = 0) -> Sequence[slice]:
    """Slices of at most `most` rows that cover `count` rows from `first`."""
    end = first + count
    return [slice(start, min(end, start + most)) for start in range(first, end, most)]
