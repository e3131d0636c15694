"""Mixtral: its tensors by name, and the operations that the engines call.

N sequences, T tokens, H hidden, Q query heads, V key and value heads, D head dimension
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min.layers import Rope, Routing, choose_experts, expert, linear, rms_norm
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.plan_file import ModelPlan, PagePlan, RuntimePlan, call_tokens

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


def tensor_shapes(model: ModelPlan, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint by name."""
    hidden, inner = model.hidden, model.expert_intermediate
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab, hidden)}
    for layer in range(model.layers):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        shapes |= {
            p + "self_attn.q_proj.weight": (queries, hidden),
            p + "self_attn.k_proj.weight": (keys, hidden),
        }
        shapes |= {
            p + "self_attn.v_proj.weight": (keys, hidden),
            p + "self_attn.o_proj.weight": (hidden, queries),
        }
        shapes[p + "block_sparse_moe.gate.weight"] = (model.experts, hidden)
        for e in range(model.experts):
            w1, w2, w3 = expert_names(layer, e)
            shapes |= {w1: (inner, hidden), w2: (hidden, inner), w3: (inner, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (model.vocab, hidden)
    return shapes


def page_names(model: ModelPlan, pages: PagePlan, layer: int, page: int) -> list[str]:
    """The tensors of one page: the attention projections, or the matrices of its experts."""
    if page == 0:
        return [f"model.layers.{layer}.self_attn.{x}_proj.weight" for x in "qkvo"]
    return [name for e in page_experts(model, pages, page) for name in expert_names(layer, e)]


def page_experts(model: ModelPlan, pages: PagePlan, page: int) -> range:
    """The experts of page `page`, which is not 0."""
    first = (page - 1) * pages.experts_per_page
    return range(first, min(model.experts, first + pages.experts_per_page))


def expert_names(layer: int, e: int) -> tuple[str, str, str]:
    """w1, w2, w3."""
    p = f"model.layers.{layer}.block_sparse_moe.experts.{e}."
    return p + "w1.weight", p + "w2.weight", p + "w3.weight"


Matrices = Callable[[int], tuple[Tensor, Tensor, Tensor]]  # expert -> w1, w2, w3


class Operations:
    """Mixtral's operations on the tensors they are given, in pieces of at most `call_tokens` tokens.

    `resident` are the weights that do not move.
    """

    def __init__(self, plan: RuntimePlan, config: ModelConfig, resident: Mapping[str, Tensor]) -> None:
        m, batch, dtype = plan.model, plan.batch, DTYPES[plan.model.compute_dtype]
        self._model, self._config, self._weights = m, config, resident
        self._call = call_tokens(batch)
        self._head_rows = batch.micro_batch
        self._rope = Rope(m.head_dim, config.rope_theta, batch.context_tokens, dtype)

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
        q, k, v = (
            linear(x, weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]).view(
                len(x), -1, self._model.head_dim
            )
            for name in "qkv"
        )
        return self._rope(q, positions), self._rope(k, positions), v

    def add_attended(self, layer: int, hidden: Tensor, out: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Add the output projection of `out` [T, Q * D] to `hidden`."""
        hidden += linear(out, weights[f"model.layers.{layer}.self_attn.o_proj.weight"])

    def choose(self, layer: int, hidden: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token and their weights: [T, K] float32, [T, K]; `normed` gets their input."""
        norm = self._layer(layer, "post_attention_layernorm")
        gate = self._layer(layer, "block_sparse_moe.gate")
        choices = []
        for rows in pieces(len(hidden), self._call):
            normed[rows] = rms_norm(hidden[rows], norm, self._config.norm_eps)
            choices.append(choose_experts(normed[rows], gate, self._model.experts_per_token))
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
