"""The tensors of a checkpoint by name, and those of each page. Standard library only."""

from __future__ import annotations

from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.plan_file import ModelPlan, PagePlan


def tensor_shapes(model: ModelPlan, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint by name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab, model.hidden)}
    for layer in range(model.layers):
        shapes |= _layer_shapes(model, layer)
    shapes["model.norm.weight"] = (model.hidden,)
    if not tied:
        shapes["lm_head.weight"] = (model.vocab, model.hidden)
    return shapes


def _layer_shapes(model: ModelPlan, layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer, as they follow each other in Mixtral's files."""
    hidden, inner, kind = model.hidden, model.expert_intermediate, BY_MODEL_TYPE[model.architecture]
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    if kind.query_norm != "none":
        whole = kind.query_norm == "token"
        shapes["self_attn.q_norm"] = (queries if whole else model.head_dim,)
        shapes["self_attn.k_norm"] = (keys if whole else model.head_dim,)
    if kind.routed:
        shapes[f"{kind.mlp}.gate"] = (model.experts, hidden)
    named = {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    for e in range(model.experts):
        w1, w2, w3 = expert_names(model, layer, e)
        named |= {w1: (inner, hidden), w2: (hidden, inner), w3: (inner, hidden)}
    return named


def page_names(model: ModelPlan, pages: PagePlan, layer: int, page: int) -> list[str]:
    """The tensors of one page: the attention projections, or the matrices of its experts."""
    if page == 0:
        return [f"model.layers.{layer}.self_attn.{x}_proj.weight" for x in "qkvo"]
    return [name for e in page_experts(model, pages, page) for name in expert_names(model, layer, e)]


def page_experts(model: ModelPlan, pages: PagePlan, page: int) -> range:
    """The experts of page `page`, which is not 0."""
    first = (page - 1) * pages.experts_per_page
    return range(first, min(model.experts, first + pages.experts_per_page))


def expert_names(model: ModelPlan, layer: int, e: int) -> tuple[str, str, str]:
    """w1, w2, w3: gate, down, up. A dense model's MLP is its expert 0."""
    kind = BY_MODEL_TYPE[model.architecture]
    expert = f"experts.{e}." if kind.routed else ""
    w1, w2, w3 = (f"model.layers.{layer}.{kind.mlp}.{expert}{name}.weight" for name in kind.matrices)
    return w1, w2, w3
