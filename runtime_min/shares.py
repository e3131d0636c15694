"""What one of several ranks has of a model: its heads, its part of the experts, its part of the vocabulary.

Each matrix is cut where the ranks' results add up: queries, keys and values by head, the MLPs at their inner
width, embedding and head by token. Norms and routers are whole everywhere, as are the keys and values of a
head whose queries several ranks share. Source: Megatron-LM, arXiv 1909.08053, section 3.

Experts are cut like the MLPs, or each rank has whole ones. All have every token's hidden state, so what
experts say of it is summed either way and no token is sent to another rank. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from moeplan.runtime_min.checkpoint import ITEM_BYTES, TensorRef
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.models.tensors import expert_names, expert_shapes
from moeplan.runtime_min.plan_file import ModelPlan, OffloadPlan, RuntimePlan

_TOKENS = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
_QUERIES, _KEYS = ("q_proj.weight", "q_proj.bias", "sinks"), ("k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Share:
    """The share of rank `rank` of `ranks`."""

    rank: int = 0
    ranks: int = 1

    def part(self, count: int) -> range:
        """Its part of `count` things; no rank has more than one thing more than another."""
        return range(self.rank * count // self.ranks, (self.rank + 1) * count // self.ranks)

    def key_heads(self, count: int) -> range:
        """The heads of keys and values that its queries see: its own, or one shared with other ranks."""
        return range(self.rank * count // self.ranks, -(-(self.rank + 1) * count // self.ranks))


def whole_heads(heads: int, kv_heads: int, ranks: int) -> bool:
    """Whether so many ranks can share the heads evenly."""
    return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)


def plan_of(plan: RuntimePlan, share: Share) -> RuntimePlan:
    """The plan of one rank: the shape of its share, and its part of threads and memory. Counts of parameters
    but for those of an expert stay the model's; where it has whole experts, `ranking` has its own."""
    m, ranks = plan.model, share.ranks
    inner = m.expert_intermediate
    model = replace(
        m,
        heads=len(share.part(m.heads)),
        kv_heads=len(share.key_heads(m.kv_heads)),
        expert_intermediate=inner if has_whole_experts(plan) else len(share.part(inner)),
        dense_intermediate=len(share.part(m.dense_intermediate)),
        shared_intermediate=len(share.part(m.shared_intermediate)),
    )
    model = replace(model, expert_parameters=sum(map(math.prod, expert_shapes(model))))
    memory = {name: getattr(plan.memory, name) // ranks for name in plan.memory.__dataclass_fields__}
    return replace(
        plan,
        model=model,
        threads=max(1, plan.threads // ranks),
        memory=replace(plan.memory, **memory),
        offload=_offload_of(plan, share),
    )


def _offload_of(plan: RuntimePlan, share: Share) -> OffloadPlan:
    """A rank's part of the experts at each place, and of the devices' memory."""
    offload, ranks = plan.offload, share.ranks
    offload = replace(offload, budget_bytes=offload.budget_bytes // ranks)
    if not has_whole_experts(plan):
        return offload
    return replace(
        offload,
        resident_experts=offload.resident_experts // ranks,
        cpu_experts=offload.cpu_experts // ranks,
        disk_experts=offload.disk_experts // ranks,
        ranking=tuple(own_experts(plan, share, layer) for layer in range(plan.model.layers)),
    )


def has_whole_experts(plan: RuntimePlan) -> bool:
    """Whether each of several ranks has whole experts."""
    return plan.offload.gpus > 1 and plan.offload.expert_shares == "whole"


def own_experts(plan: RuntimePlan, share: Share, layer: int) -> tuple[int, ...]:
    """The whole experts of a rank, most popular first. They are dealt by popularity, forth and back, so that
    all ranks have about as much to compute."""
    ranking, ranks = plan.offload.ranking, share.ranks
    ranked = ranking[layer] if ranking else range(plan.model.experts)
    turns = (divmod(at, ranks) for at in range(len(ranked)))
    dealt = (ranks - 1 - place if turn % 2 else place for turn, place in turns)
    return tuple(e for e, rank in zip(ranked, dealt, strict=True) if rank == share.rank)


def parts_of(
    refs: Mapping[str, TensorRef], plan: RuntimePlan, config: ModelConfig, share: Share
) -> dict[str, TensorRef]:
    """A rank's part of every tensor of the whole model; tensors of which it has nothing are left out."""
    if share.ranks == 1:
        return dict(refs)
    model = plan.model
    whole = has_whole_experts(plan)
    experts = _whole_experts(plan, config, share) if whole else _expert_cuts(model, config, share)
    cuts = ((ref, experts.get(name) or _cut(model, config, share, ref)) for name, ref in refs.items())
    return {ref.name: _part(ref, *cut) for ref, cut in cuts if cut != _NOTHING}


Cut = tuple[int, int, range]  # a tensor seen as [outer, things, ...], and which of the things
_ALL: Cut = (1, 1, range(1))
_NOTHING: Cut = (0, 0, range(0))


def _part(ref: TensorRef, outer: int, things: int, some: range) -> TensorRef:
    """`some` of the things in each of the `outer` rows of a tensor."""
    if len(some) == things:
        return ref
    if ref.dtype not in ITEM_BYTES:
        raise RunError(f"{ref.path}: {ref.name}: {ref.dtype} is not shared by several GPUs")
    size = math.prod(ref.shape) // (outer * things) * ITEM_BYTES[ref.dtype]  # of a thing
    axis = 0 if outer == 1 else 1
    shape = list(ref.shape)
    shape[axis] = shape[axis] * len(some) // things
    run = len(some) * size
    return replace(
        ref,
        offset=ref.offset + some.start * size,
        nbytes=outer * run,
        shape=tuple(shape),
        run_bytes=run if outer > 1 else 0,
        stride_bytes=things * size if outer > 1 else 0,
    )


def _cut(model: ModelPlan, config: ModelConfig, share: Share, ref: TensorRef) -> Cut:
    """How a tensor that is no expert's is cut."""
    leaf = ref.name.split(".self_attn.")[-1]
    heads, keys = share.part(model.heads), share.key_heads(model.kv_heads)
    if ref.name in _TOKENS:
        return 1, model.vocab, share.part(model.vocab)
    if leaf in _QUERIES:
        return 1, model.heads, heads
    if leaf.startswith(_KEYS):
        return 1, model.kv_heads, keys
    if leaf == "o_proj.weight":
        return model.hidden, model.heads, heads
    if config.query_norm == "token" and leaf in ("q_norm.weight", "k_norm.weight"):
        return (1, model.heads, heads) if leaf[0] == "q" else (1, model.kv_heads, keys)
    if leaf.endswith(("gate_proj.weight", "up_proj.weight")):
        return 1, ref.shape[0], share.part(ref.shape[0])
    if leaf.endswith("down_proj.weight"):
        return model.hidden, ref.shape[1], share.part(ref.shape[1])
    return _ALL


def _expert_cuts(model: ModelPlan, config: ModelConfig, share: Share) -> dict[str, Cut]:
    """How the tensors of experts are cut, all at the inner width: see `expert_shapes`."""
    inner = model.expert_intermediate
    rows, columns = ((outer, inner, share.part(inner)) for outer in (1, model.hidden))
    cuts = {
        "apart": (rows, columns, rows),
        "rows": (rows, rows, rows),
        "pairs": (columns, rows, rows, _ALL),
        "halves": ((2 * model.hidden, inner, share.part(inner)), rows),
    }[model.kind.experts]
    names = (expert_names(model, *at) for at in _experts(model, config))
    return {name: cut for some in names for name, cut in zip(some, cuts, strict=True)}


def _whole_experts(plan: RuntimePlan, config: ModelConfig, share: Share) -> dict[str, Cut]:
    """All or nothing of the tensors of every expert."""
    own = [own_experts(plan, share, layer) for layer in range(plan.model.layers)]
    return {
        name: _ALL if expert in own[layer] else _NOTHING
        for layer, expert in _experts(plan.model, config)
        for name in expert_names(plan.model, layer, expert)
    }


def _experts(model: ModelPlan, config: ModelConfig) -> Iterator[tuple[int, int]]:
    """(layer, expert) of all."""
    return ((n, e) for n in range(model.layers) if n not in config.dense for e in range(model.experts))
