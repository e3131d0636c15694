"""The tensors of a model by name, where a checkpoint has them, and those of each page. Standard library only.

Names are those of most checkpoints; an architecture's record says what its own calls otherwise. What a
checkpoint keeps in one tensor, as all experts or queries, keys and values, is cut into parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moeplan.runtime_min.checkpoint import TensorRef, cut, find_tensors
from moeplan.runtime_min.formats import EXPONENTS, MX_VALUES, SCALED
from moeplan.runtime_min.model_config import ModelConfig
from moeplan.runtime_min.models.architecture import Architecture
from moeplan.runtime_min.plan_file import ModelPlan, PagePlan

Shape = tuple[int, ...]
CORRECTION = "e_score_correction_bias"  # of routers; float32 in any compute dtype, as it decides choices
SCALES = ".scales"  # ends the name of the scales of a matrix in fewer bits, which lie apart


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of `shape`: the values of the checkpoint's tensor `source`, itself of shape `whole`, from
    `first` on. `format` is one of `formats`, with scales for each `block` where these lie apart."""

    shape: Shape
    source: str
    whole: Shape
    first: int
    format: str = ""
    block: tuple[int, int] = (0, 0)


def find_parts(folder: Path, model: ModelPlan, config: ModelConfig) -> dict[str, TensorRef]:
    """Locate every tensor of the model in the checkpoint `folder`; raises CheckpointError."""
    parts = tensor_parts(model, config)
    formats = {part.source: part.format for part in parts.values() if part.format}
    stored = find_tensors(folder, tensor_shapes(model, config), partial(unused, model), formats)
    return {name: cut(stored[p.source], name, p.first, p.shape, p.block) for name, p in parts.items()}


def tensor_parts(model: ModelPlan, config: ModelConfig) -> dict[str, Part]:
    """Every tensor of the model by name, and the scales of those in fewer bits that lie apart."""
    plain = {name: _part(model, name, shape) for name, shape in _shapes(model, config).items()}
    if model.packing == "none":
        return plain
    parts: dict[str, Part] = {}
    for name, part in plain.items():
        parts |= _stored(model, config, name, part) if packed(model, name, part.shape) else {name: part}
    return parts


def packed(model: ModelPlan, name: str, shape: Shape) -> bool:
    """Whether a tensor is stored in fewer bits: experts' matrices; in fp8 all of a layer but routers."""
    kind = model.kind
    if model.packing == "none" or len(shape) != 2 or not name.startswith("model.layers."):
        return False
    if name.endswith(SCALES):
        return False
    if model.packing == "fp8":
        return not name.endswith((f".{kind.gate}.weight", f".{kind.shared_gate}.weight"))
    return f".{kind.mlp}.experts." in name or (not kind.routed and f".{kind.mlp}." in name)


def _stored(model: ModelPlan, config: ModelConfig, name: str, part: Part) -> dict[str, Part]:
    """A matrix in fewer bits as the checkpoint has it."""
    if model.packing not in SCALED:
        return {name: replace(part, format=model.packing)}
    outer, inner = part.shape
    if model.packing == "mxfp4":
        count, at, shape = model.experts, part.first, (outer, inner // MX_VALUES)
        whole, block = (count, *shape), (1, MX_VALUES)
        data = replace(part, source=f"{part.source}_blocks", whole=(*whole, MX_VALUES // 2))
        scales = Part(shape, f"{part.source}_scales", whole, at // MX_VALUES, EXPONENTS)
    else:
        rows, values = config.scale_block
        block = rows or outer, values or inner
        shape = (-(-outer // block[0]), -(-inner // block[1]))
        source = part.source + ("_scale_inv" if rows and values else "_scale")
        data, scales = part, Part(shape, source, shape if rows else (1,), 0)
    return {name: replace(data, format=model.packing, block=block), name + SCALES: scales}


def _part(model: ModelPlan, name: str, shape: Shape) -> Part:
    """Where the checkpoint has a plain tensor: alone, or in one with others."""
    kind, queries, keys = model.kind, model.heads * model.head_dim, model.kv_heads * model.head_dim
    before, fused, projection = name.rpartition(".self_attn.")
    first = {"q_proj.weight": 0, "k_proj.weight": queries, "v_proj.weight": queries + keys}.get(projection)
    if kind.fused_qkv and first is not None:
        source = stored_name(kind, f"{before}{fused}qkv_proj.weight")
        return Part(shape, source, (queries + 2 * keys, model.hidden), first * model.hidden)
    before, fused, numbered = name.partition(".experts.")
    if not fused or kind.experts == "apart":
        return Part(shape, stored_name(kind, name), shape, 0)
    e, _, leaf = numbered.partition(".")
    source = stored_name(kind, before + fused + leaf.removesuffix(".weight")).replace(".bias", "_bias")
    rows = (model.experts * shape[0], *shape[1:])
    whole = rows if kind.experts == "rows" else (model.experts, *shape)
    return Part(shape, source, whole, int(e) * math.prod(shape))


def _shapes(model: ModelPlan, config: ModelConfig) -> dict[str, Shape]:
    """Every tensor as if it were plain and alone."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (model.vocab, model.hidden)}
    for layer in range(model.layers):
        shapes |= _layer(model, config, layer)
    shapes["model.norm.weight"] = (model.hidden,)
    if model.kind.norm == "biased layer":
        shapes["model.norm.bias"] = (model.hidden,)
    if not config.tied:
        shapes["lm_head.weight"] = (model.vocab, model.hidden)
        if config.head_bias:
            shapes["lm_head.bias"] = (model.vocab,)
    return shapes


def tensor_shapes(model: ModelPlan, config: ModelConfig) -> dict[str, Shape]:
    """Every tensor of the checkpoint by its name there."""
    return {part.source: part.whole for part in tensor_parts(model, config).values()}


def unused(model: ModelPlan, name: str) -> bool:
    """Whether a tensor of the checkpoint is none of the decoder's: of layers beyond the last (prediction of
    several tokens), of what sees images, rotary frequencies, a head beside the embedding it is tied to, or
    scales of activations, which are not rounded here."""
    kind = model.kind
    layer = name.removeprefix(stored_name(kind, "model.layers.")).split(".")[0]
    beyond = layer.isdigit() and int(layer) >= model.layers
    head = name == stored_name(kind, "lm_head.weight")
    others = ("rotary_emb.inv_freq", ".input_scale") if model.packing == "fp8" else ("rotary_emb.inv_freq",)
    return beyond or head or name.endswith(others) or name.startswith(kind.unused or ("\0",))


def page_names(model: ModelPlan, config: ModelConfig, pages: PagePlan, layer: int, page: int) -> list[str]:
    """The tensors of one page: of attention but its norms, or of some experts, if the layer has any."""
    shapes: dict[str, Shape] = {}
    if page == 0:
        shapes = {f"model.layers.{layer}.{name}": shape for name, shape in _attention(model, config).items()}
    elif layer not in config.dense:
        for e in page_experts(model, pages, page):
            shapes |= zip(expert_names(model, layer, e), expert_shapes(model), strict=True)
    apart = [n for n, shape in shapes.items() if model.packing in SCALED and packed(model, n, shape)]
    return [*shapes, *(name + SCALES for name in apart)]


def page_experts(model: ModelPlan, pages: PagePlan, page: int) -> range:
    """The experts of page `page`, which is not 0."""
    first = (page - 1) * pages.experts_per_page
    return range(first, min(model.experts, first + pages.experts_per_page))


def expert_names(model: ModelPlan, layer: int, e: int) -> tuple[str, ...]:
    """An expert's tensors: gate, down, up, or what it has of fused ones. A dense model's MLP is expert 0."""
    kind = model.kind
    expert = f"experts.{e}." if kind.routed else ""
    start = f"model.layers.{layer}.{kind.mlp}.{expert}"
    if kind.experts != "pairs":
        return tuple(f"{start}{name}.weight" for name in kind.matrices)
    return tuple(f"{start}{name}.{what}" for name in kind.matrices for what in ("weight", "bias"))


def expert_shapes(model: ModelPlan) -> tuple[Shape, ...]:
    """The shapes of an expert's tensors."""
    kind, hidden, inner = model.kind, model.hidden, model.expert_intermediate
    match kind.experts:
        case "apart":
            return (inner, hidden), (hidden, inner), (inner, hidden)
        case "rows":
            return ((inner, hidden),) * 3
    if kind.experts == "pairs" and model.packing == "mxfp4":
        return (2 * inner, hidden), (2 * inner,), (hidden, inner), (hidden,)
    if kind.experts == "pairs":
        return (hidden, 2 * inner), (2 * inner,), (inner, hidden), (hidden,)
    return (hidden, 2 * inner), (inner, hidden)


def _layer(model: ModelPlan, config: ModelConfig, layer: int) -> dict[str, Shape]:
    """The tensors of one layer, as they follow each other in Mixtral's files."""
    inside: dict[str, Shape] = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        inside[f"{norm}.weight"] = (model.hidden,)
        if model.kind.norm == "biased layer":
            inside[f"{norm}.bias"] = (model.hidden,)
    inside |= {**_attention(model, config), **_attention_norms(model, config), **_mlp(model, config, layer)}
    shapes = {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    for e in range(model.experts if layer not in config.dense else 0):
        shapes |= zip(expert_names(model, layer, e), expert_shapes(model), strict=True)
    return shapes


def _mlp(model: ModelPlan, config: ModelConfig, layer: int) -> dict[str, Shape]:
    """The router and what takes every token, within a layer; a dense model's MLP is an expert instead."""
    kind, mlp, hidden = model.kind, model.kind.mlp, model.hidden
    if layer in config.dense:
        return _gated(f"{mlp}.", hidden, model.dense_intermediate)
    if not kind.routed:
        return {}
    shapes: dict[str, Shape] = {f"{mlp}.{kind.gate}.weight": (model.experts, hidden)}
    if kind.gate_bias:
        shapes[f"{mlp}.{kind.gate}.bias"] = (model.experts,)
    if kind.router == "sigmoid":
        shapes[f"{mlp}.{kind.gate}.{CORRECTION}"] = (model.experts,)
    if model.shared_intermediate:
        shapes |= _gated(f"{mlp}.{kind.shared}.", hidden, model.shared_intermediate)
    if kind.shared_gate:
        shapes[f"{mlp}.{kind.shared_gate}.weight"] = (1, hidden)
    return shapes


def _gated(start: str, hidden: int, inner: int) -> dict[str, Shape]:
    return {
        f"{start}gate_proj.weight": (inner, hidden),
        f"{start}down_proj.weight": (hidden, inner),
        f"{start}up_proj.weight": (inner, hidden),
    }


def _attention(model: ModelPlan, config: ModelConfig) -> dict[str, Shape]:
    """Projections, their biases and sinks, within a layer."""
    hidden, latent = model.hidden, config.latent
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if latent is None:
        sizes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        biased, attended = set(sizes), queries
    else:
        sizes = {"q_proj": (queries, hidden)}
        if latent.query:
            sizes = {"q_a_proj": (latent.query, hidden), "q_b_proj": (queries, latent.query)}
        sizes["kv_a_proj_with_mqa"] = (latent.kv + latent.rotated, hidden)
        sizes["kv_b_proj"] = (model.heads * (latent.plain + latent.value), latent.kv)
        biased, attended = {"q_a_proj", "kv_a_proj_with_mqa"}, model.heads * latent.value
    shapes: dict[str, Shape] = {}
    for name, size in {**sizes, "o_proj": (hidden, attended)}.items():
        shapes[f"self_attn.{name}.weight"] = size
        if config.output_bias if name == "o_proj" else config.input_bias and name in biased:
            shapes[f"self_attn.{name}.bias"] = size[:1]
    if model.kind.sinks:
        shapes["self_attn.sinks"] = (model.heads,)
    return shapes


def _attention_norms(model: ModelPlan, config: ModelConfig) -> dict[str, Shape]:
    if config.latent:
        norms = {"kv_a": config.latent.kv} | ({"q_a": config.latent.query} if config.latent.query else {})
        return {f"self_attn.{name}_layernorm.weight": (size,) for name, size in norms.items()}
    if config.query_norm not in ("head", "token"):
        return {}
    whole, size = config.query_norm == "token", model.head_dim
    heads = {"q": model.heads, "k": model.kv_heads}
    return {f"self_attn.{n}_norm.weight": (size * (count if whole else 1),) for n, count in heads.items()}


def stored_name(kind: Architecture, name: str) -> str:
    """A tensor's name in the checkpoint."""
    for ours, theirs in kind.names:
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        if ours.startswith("."):
            name = name.replace(ours, theirs)
    return name
