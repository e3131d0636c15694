"""The tensors of a model by name, where a checkpoint has them, and those of each page. Standard library only.

Names are those of most checkpoints; an architecture's record says what its own calls otherwise. What a
checkpoint keeps in one tensor, as all experts or queries, keys and values, is cut into parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moeplan.runtime_min.checkpoint import TensorRef, cut, find_tensors
from moeplan.runtime_min.formats import EXPONENTS, MX_VALUES, SCALED
from moeplan.runtime_min.model_config import Latent, ModelConfig
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
    plain = _plain_parts(model, config)
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


def _plain_parts(model: ModelPlan, config: ModelConfig) -> dict[str, Part]:
    kind = model.kind
    biased = {"model.norm.bias": (model.hidden,)} if kind.norm == "biased layer" else {}
    parts = _wholes(kind, {"model.embed_tokens.weight": (model.vocab, model.hidden)})
    for layer in range(model.layers):
        parts |= _layer(model, config, layer)
    parts |= _wholes(kind, {"model.norm.weight": (model.hidden,), **biased})
    if not config.tied:
        parts |= _wholes(kind, {"lm_head.weight": (model.vocab, model.hidden)})
        if config.head_bias:
            parts |= _wholes(kind, {"lm_head.bias": (model.vocab,)})
    return parts


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
        shapes = {name: part.shape for name, part in _attention(model, config, layer).items()}
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


def _layer(model: ModelPlan, config: ModelConfig, layer: int) -> dict[str, Part]:
    """The tensors of one layer, as they follow each other in Mixtral's files."""
    kind, hidden = model.kind, model.hidden
    shapes: dict[str, Shape] = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{norm}.weight"] = (hidden,)
        if kind.norm == "biased layer":
            shapes[f"{norm}.bias"] = (hidden,)
    start = f"model.layers.{layer}."
    parts = _wholes(kind, {start + name: shape for name, shape in shapes.items()})
    parts |= _attention(model, config, layer)
    others = {**_attention_norms(model, config), **_mlp(model, config, layer)}
    parts |= _wholes(kind, {start + name: shape for name, shape in others.items()})
    if layer not in config.dense:
        for e in range(model.experts):
            parts |= _expert(model, layer, e)
    return parts


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


def _expert(model: ModelPlan, layer: int, e: int) -> dict[str, Part]:
    kind = model.kind
    shapes = dict(zip(expert_names(model, layer, e), expert_shapes(model), strict=True))
    if kind.experts == "apart":
        return _wholes(kind, shapes)
    parts = {}
    for name, shape in shapes.items():
        source = stored_name(kind, name.replace(f".experts.{e}.", ".experts.").removesuffix(".weight"))
        source = source.replace(".bias", "_bias")
        rows = (model.experts * shape[0], *shape[1:])
        whole = rows if kind.experts == "rows" else (model.experts, *shape)
        parts[name] = Part(shape, source, whole, e * math.prod(shape))
    return parts


def _attention(model: ModelPlan, config: ModelConfig, layer: int) -> dict[str, Part]:
    """Projections, their biases and sinks of a layer."""
    kind, start = model.kind, f"model.layers.{layer}.self_attn."
    if config.latent:
        projections = _latent_projections(model, config.latent, config)
        return _wholes(kind, {start + name: shape for name, shape in projections})
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    heights = {"q": queries, "k": keys, "v": keys}
    wide: dict[str, Shape] = {name: (rows, model.hidden) for name, rows in heights.items()}
    parts: dict[str, Part] = {}
    if kind.fused_qkv:
        whole, first = (queries + 2 * keys, model.hidden), 0
        for name, shape in wide.items():
            source = stored_name(kind, start + "qkv_proj.weight")
            parts[f"{start}{name}_proj.weight"] = Part(shape, source, whole, first)
            first += math.prod(shape)
    else:
        parts = _wholes(kind, {f"{start}{name}_proj.weight": shape for name, shape in wide.items()})
    shapes: dict[str, Shape] = {"o_proj.weight": (model.hidden, queries)}
    if config.input_bias:
        shapes |= {f"{name}_proj.bias": (rows,) for name, rows in heights.items()}
    if config.output_bias:
        shapes["o_proj.bias"] = (model.hidden,)
    if kind.sinks:
        shapes["sinks"] = (model.heads,)
    return parts | _wholes(kind, {start + name: shape for name, shape in shapes.items()})


def _latent_projections(model: ModelPlan, latent: Latent, config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    queries = model.heads * model.head_dim
    if latent.query:
        yield "q_a_proj.weight", (latent.query, model.hidden)
        yield "q_b_proj.weight", (queries, latent.query)
        if config.input_bias:
            yield "q_a_proj.bias", (latent.query,)
    else:
        yield "q_proj.weight", (queries, model.hidden)
    yield "kv_a_proj_with_mqa.weight", (latent.kv + latent.rotated, model.hidden)
    if config.input_bias:
        yield "kv_a_proj_with_mqa.bias", (latent.kv + latent.rotated,)
    yield "kv_b_proj.weight", (model.heads * (latent.plain + latent.value), latent.kv)
    yield "o_proj.weight", (model.hidden, model.heads * latent.value)
    if config.output_bias:
        yield "o_proj.bias", (model.hidden,)


def _attention_norms(model: ModelPlan, config: ModelConfig) -> dict[str, Shape]:
    if config.latent:
        norms = {"kv_a": config.latent.kv} | ({"q_a": config.latent.query} if config.latent.query else {})
        return {f"self_attn.{name}_layernorm.weight": (size,) for name, size in norms.items()}
    if config.query_norm not in ("head", "token"):
        return {}
    whole, size = config.query_norm == "token", model.head_dim
    heads = {"q": model.heads, "k": model.kv_heads}
    return {f"self_attn.{n}_norm.weight": (size * (count if whole else 1),) for n, count in heads.items()}


def _wholes(kind: Architecture, shapes: dict[str, Shape]) -> dict[str, Part]:
    """Tensors that the checkpoint has as they are."""
    return {name: Part(shape, stored_name(kind, name), shape, 0) for name, shape in shapes.items()}


def stored_name(kind: Architecture, name: str) -> str:
    """A tensor's name in the checkpoint."""
    for ours, theirs in kind.names:
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        if ours.startswith("."):
            name = name.replace(ours, theirs)
    return name
