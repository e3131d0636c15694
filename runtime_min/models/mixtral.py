"""Mixtral: the operations that a stream schedule calls, on all tokens of a pass at once.

N sequences, T tokens, H hidden, Q query heads, V key and value heads, D head dimension
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min.attention import KvCache, MicroBatch, attend
from moeplan.runtime_min.lanes import ATTENTION, EMBED, EXPERTS, HEAD, ROUTE, Row
from moeplan.runtime_min.layers import Rope, Routing, choose_experts, expert, linear, rms_norm, sort_by_expert
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.pages import Weights
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


@dataclass(frozen=True, slots=True)
class Pass:
    """The tokens [T] of one pass, cut into micro-batches, and the row of each sequence's last token [N]."""

    tokens: Tensor
    micro_batches: tuple[MicroBatch, ...]
    last: Tensor


class Mixtral:
    """Holds the state of the pass under way; `execute` computes one row of its schedule.

    After the head row `logits` has the next-token scores of each sequence, float32 [N, vocab].
    """

    def __init__(self, plan: RuntimePlan, config: ModelConfig, pages: Weights) -> None:
        m, batch, dtype = plan.model, plan.batch, DTYPES[plan.model.compute_dtype]
        self._model, self._page_plan, self._config, self._pages = m, plan.pages, config, pages
        self._call = call_tokens(batch)
        self._head_rows = batch.micro_batch
        tokens = batch.sequences * batch.prompt_tokens
        # Written once now: the first pass would wait for the system to find the memory.
        self._hidden = torch.empty(tokens, m.hidden).zero_()  # the residual stream, always float32
        self._normed = torch.empty(tokens, m.hidden, dtype=dtype).zero_()
        self._logits = torch.empty(batch.sequences, m.vocab).zero_()
        self._rope = Rope(m.head_dim, config.rope_theta, batch.context_tokens, dtype)
        self._cache = KvCache(m.layers, batch.sequences, m.kv_heads, batch.context_tokens, m.head_dim, dtype)
        self._routing = Routing(torch.empty(0), torch.empty(0), [])

    def begin(self, step: Pass) -> None:
        """Make `step` the pass that the next rows compute."""
        self._step = step
        self.hidden = self._hidden[: len(step.tokens)]  # [T, H]
        self.normed = self._normed[: len(step.tokens)]
        self.logits = self._logits[: len(step.last)]

    def route_as(self, routing: Routing) -> None:
        """Take `routing` for the experts that come next."""
        self._routing = routing

    def execute(self, row: Row) -> None:
        op, _, layer, item, slot = row[:5]
        if op == EMBED:
            self._embed()
        elif op == ATTENTION:
            self._attention(layer, self._step.micro_batches[item], self._pages.view(layer, 0, slot))
        elif op == ROUTE:
            self._route(layer)
        elif op == EXPERTS:
            self._experts(layer, item, self._pages.view(layer, item, slot))
        elif op == HEAD:
            self._head()

    def _embed(self) -> None:
        weight = self._resident("model.embed_tokens")
        for rows in self._pieces(len(self.hidden), self._call):
            self.hidden[rows] = F.embedding(self._step.tokens[rows], weight)

    def _attention(self, layer: int, batch: MicroBatch, weights: Mapping[str, Tensor]) -> None:
        residual = self.hidden[batch.rows]
        x = rms_norm(residual, self._layer(layer, "input_layernorm"), self._config.norm_eps)
        q, k, v = (
            linear(x, weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]).view(
                len(x), -1, self._model.head_dim
            )
            for name in "qkv"
        )  # [T, Q, D], [T, V, D], [T, V, D]
        q, k = self._rope(q, batch.positions), self._rope(k, batch.positions)
        out = attend(layer, batch, self._cache, q, k, v)
        residual += linear(out, weights[f"model.layers.{layer}.self_attn.o_proj.weight"])

    def _route(self, layer: int) -> None:
        norm, gate = (
            self._layer(layer, "post_attention_layernorm"),
            self._layer(layer, "block_sparse_moe.gate"),
        )
        choices = []
        for rows in self._pieces(len(self.hidden), self._call):
            self.normed[rows] = rms_norm(self.hidden[rows], norm, self._config.norm_eps)
            choices.append(choose_experts(self.normed[rows], gate, self._model.experts_per_token))
        weights, experts = (torch.cat(parts) for parts in zip(*choices, strict=True))
        self._routing = sort_by_expert(weights, experts, self._model.experts)

    def _experts(self, layer: int, page: int, weights: Mapping[str, Tensor]) -> None:
        """Add what the page's experts say to the residual stream."""
        routing = self._routing
        for e in page_experts(self._model, self._page_plan, page):
            first, end = routing.starts[e : e + 2]
            if first == end:
                continue
            w1, w2, w3 = (weights[name] for name in expert_names(layer, e))
            for rows in self._pieces(end - first, self._call, first):
                tokens = routing.tokens[rows]
                x = self.normed.index_select(0, tokens)  # faster than indexing
                out = expert(x, w1, w2, w3).float().mul_(routing.weights[rows, None])
                self.hidden.index_add_(0, tokens, out)

    def _head(self) -> None:
        weight = self._resident("model.embed_tokens" if self._config.tied else "lm_head")
        norm = self._resident("model.norm")
        for rows in self._pieces(len(self.logits), self._head_rows):
            x = rms_norm(self.hidden[self._step.last[rows]], norm, self._config.norm_eps)
            self.logits[rows] = linear(x, weight)

    def _resident(self, name: str) -> Tensor:
        return self._pages.resident[name + ".weight"]

    def _layer(self, layer: int, name: str) -> Tensor:
        return self._resident(f"model.layers.{layer}.{name}")

    @staticmethod
    def _pieces(count: int, most: int, first: int = 0) -> Sequence[slice]:
        """Slices of at most `most` rows that cover `count` rows from `first`."""
        end = first + count
        return [slice(start, min(end, start + most)) for start in range(first, end, most)]
