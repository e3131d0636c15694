"""The contract between the compiler and the runtime: runtime.json, versioned. Standard library only.

The compiler fills the records below and writes `to_json`; the runtime reads it back with `load`, which
refuses an unknown version, a missing or ill-typed field, and a schedule.py whose bytes are not the ones
the plan was made with.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.models.architecture import Architecture

FORMAT = 6
SCHEDULE_FORMAT = 2
ITEM_BYTES = {"bf16": 2, "fp16": 2, "float32": 4}
ARCHITECTURES = tuple(BY_MODEL_TYPE)  # model types that this version of the runtime executes, on CPU
PASS_TOKENS = 32768  # that a pass of a stream plan takes at most, where its prompts are shorter
KV_BLOCK_TOKENS = 32  # tokens of one block of the KV cache of a stream plan
ALIGNMENT_BYTES = 4096  # of direct reads: their file offset, length and place in memory
# Bytes of a value of a packed matrix, scales included; in bf12 with room for exceptions: see formats.py.
STORED_BYTES = {"bf12": (97 / 64) * (1 + 1 / 256), "int8": 66 / 64, "int4": 40 / 64}


class PlanFileError(RunError):
    """The runtime folder cannot be executed; the message says which file and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledPlan:
    """Matrices in fewer bits whose scales lie apart, as in fp8 and MXFP4: how many values, and how many bytes
    they take with their scales, which in fp8 are held in float32. Of a layer's attention, of an expert, and
    of all shared experts and MLPs without experts."""

    attention_values: int
    attention_bytes: int
    expert_values: int
    expert_bytes: int
    mlp_values: int
    mlp_bytes: int


NOT_SCALED = ScaledPlan(
    attention_values=0, attention_bytes=0, expert_values=0, expert_bytes=0, mlp_values=0, mlp_bytes=0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """The shape the plan was made for; a checkpoint that differs is refused.

    `checkpoint` is the path as the spec has it, relative to the folder that holds the plan folder;
    empty where the spec named a catalog model, and then the user says where the checkpoint is.
    `compute_dtype` is what matrix products run in; pages keep the checkpoint's own dtype.

    Of the `layers`, `moe_layers` have experts; the others an MLP of `dense_intermediate`. An MLP of
    `shared_intermediate` takes all tokens beside the experts. `attention_parameters` are those of a layer but
    for its norms, `expert_parameters` those of an expert, biases with both; `parameters` those of the model,
    to which come `router_corrections` numbers in float32. `packing` says how experts' matrices are stored
    and held in memory, in fp8 all of a layer but its router; `scaled` has the sizes of those whose scales lie
    apart. The other tensors are plain. Of a token the cache holds keys and values of
    `kv_heads` in each layer, or, where `latent_dim` is not 0, a latent of so many values.
    """

    architecture: str
    checkpoint: str
    compute_dtype: Literal["bf16", "fp16", "float32"]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    experts_per_token: int
    expert_intermediate: int
    moe_layers: int
    dense_intermediate: int
    shared_intermediate: int
    latent_dim: int
    attention_parameters: int
    expert_parameters: int
    router_corrections: int
    parameters: int
    packing: Literal["none", "bf12", "int8", "int4", "fp8", "mxfp4"]
    scaled: ScaledPlan

    @property
    def kind(self) -> Architecture:
        """What tells its architecture, one of ARCHITECTURES, from others."""
        return BY_MODEL_TYPE[self.architecture]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """How requests are grouped.

    `sequences` (N) run through the model together; attention takes `micro_batch` (μ) of them per call in
    decode and about `prefill_tokens` prompt tokens per call in prefill (one sequence at least).
    `prompt_tokens` is the longest prompt and `context_tokens` the longest prompt plus output that a sequence
    may have; a request beyond them is answered with an error record. A pass takes at most `pass_tokens`
    tokens, the rest of longer prompts comes in later ones. The KV cache holds `kv_tokens`: a sequence enters
    when there is room for all that it may become. `kv_cache` is what it holds values in: the compute dtype,
    or int8 with a float32 scale for each token, head and layer, of keys and of values.
    """

    sequences: int
    micro_batch: int
    prefill_tokens: int
    prompt_tokens: int
    context_tokens: int
    pass_tokens: int
    kv_tokens: int
    kv_cache: Literal["same", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlan:
    """How weights move.

    Each layer has `pages_per_layer` pages: page 0 is the attention projections, page p > 0 holds the
    experts [(p-1)·experts_per_page, p·experts_per_page). The first `resident_pages` pages of every layer
    stay in memory; the others are read into `slots` slots of `slot_bytes` each by `readers` threads in
    blocks of `block_bytes`. Where `places` is not 0, a pass of decode alone reads of each layer's expert
    pages only those that routing hits: `places` is the most that it can hit; `guesses` likely pages
    of a layer are read before it is routed. In an offload plan pages are equal parts of a
    layer's bytes, as `OffloadPlan` says; only their number and that of the pinned slots they pass through
    (0: none) is given.
    """

    pages_per_layer: int
    experts_per_page: int
    resident_pages: int
    slots: int
    slot_bytes: int
    readers: int
    block_bytes: int
    places: int
    guesses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPlan:
    """What lies where beside an accelerator; all zero and empty in a stream plan.

    The model spans `gpus` of them (tensor parallelism): each has a part of the heads, of the vocabulary and
    of what takes every token. Of the experts each has, as `expert_shares` says, a part of the width of every
    one, or whole ones dealt to it by rank; all counts of experts are multiples of `gpus` then. Sizes, counts
    and limits are those of all together. Each layer's experts are ranked:
    `ranking` has a row per layer, most popular first; empty, they rank by number. The first
    `resident_experts` stay on the device. The last `cpu_experts` are computed by the CPU in decode, and in
    prefill where no page moves. Those between are streamed, the last `disk_experts` of them from disk.
    Pages are equal parts of the bytes of all that are not resident: those of the CPU first, the disk's last.
    `budget_bytes` is what the run may hold in the devices' memory.
    """

    gpus: int
    expert_shares: Literal["width", "whole"]
    resident_experts: int
    cpu_experts: int
    disk_experts: int
    ranking: tuple[tuple[int, ...], ...]
    budget_bytes: int


NO_OFFLOAD = OffloadPlan(
    gpus=0,
    expert_shares="width",
    resident_experts=0,
    cpu_experts=0,
    disk_experts=0,
    ranking=(),
    budget_bytes=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the run may hold in host memory, item by item; the items sum to at most `budget_bytes`."""

    budget_bytes: int
    weights_bytes: int
    slots_bytes: int
    kv_bytes: int
    workspace_bytes: int
    process_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A predicted figure with its 90 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What the plan expects, in tokens per second: prompt tokens read, tokens generated in decode steps,
    and generated tokens over the whole run (prefill included)."""

    prefill_tokens_per_s: Range
    decode_tokens_per_s: Range
    generated_tokens_per_s: Range


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulePlan:
    """Which schedule.py belongs to this plan. `kind` names the program, "stream" or "offload"."""

    kind: str
    format: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimePlan:
    """Everything the runtime executes. `device` is "cpu" or "accelerator"; `threads` are compute threads."""

    format: int
    name: str
    device: Literal["cpu", "accelerator"]
    threads: int
    model: ModelPlan
    batch: BatchPlan
    pages: PagePlan
    offload: OffloadPlan
    memory: MemoryPlan
    schedule: SchedulePlan
    predicted: Predicted


def page_parameters(model: ModelPlan, pages: PagePlan, page: int) -> int:
    """How many parameters page `page` of a layer with experts holds."""
    if page == 0:
        return model.attention_parameters
    first = (page - 1) * pages.experts_per_page
    experts = min(model.experts, first + pages.experts_per_page) - first
    return experts * model.expert_parameters


def page_tensors(model: ModelPlan, pages: PagePlan, page: int) -> int:
    """The most tensors that page `page` of a layer holds; each may lie in a place of its own in the file.

    Attention with a bias to each of its four projections and sinks; experts of four tensors; and scales.
    """
    attention, expert = (14, 6) if model.packing in ("fp8", "mxfp4") else (9, 4)
    return attention if page == 0 else expert * min(pages.experts_per_page, model.experts)


def most_places(model: ModelPlan, batch: BatchPlan, pages: PagePlan) -> int:
    """The most pages of experts that a decode pass can hit in a layer, resident ones aside."""
    moving = pages.pages_per_layer - max(1, pages.resident_pages)
    return max(0, min(moving, batch.sequences * model.experts_per_token))


def packed_bytes(model: ModelPlan, parameters: int, item_bytes: float) -> int:
    """Bytes of `parameters` of experts, which take `item_bytes` each where they are not packed."""
    return math.ceil(parameters * STORED_BYTES.get(model.packing, item_bytes))


def page_bytes(model: ModelPlan, pages: PagePlan, page: int, item_bytes: float) -> int:
    """Bytes of a page whose plain values take `item_bytes` each."""
    parameters, scaled = page_parameters(model, pages, page), model.scaled
    if page == 0:
        return math.ceil((parameters - scaled.attention_values) * item_bytes) + scaled.attention_bytes
    if not scaled.expert_values:
        return packed_bytes(model, parameters, item_bytes)
    experts = parameters // model.expert_parameters
    plain = math.ceil((model.expert_parameters - scaled.expert_values) * item_bytes)
    return experts * (plain + scaled.expert_bytes)


def slot_bytes(model: ModelPlan, pages: PagePlan, stored_item_bytes: int) -> int:
    """What a slot must hold so that every streamed page fits: its tensors as stored, each in whole blocks."""

    def needed(page: int) -> int:
        padding = 2 * ALIGNMENT_BYTES * page_tensors(model, pages, page)
        return padding + page_bytes(model, pages, page, stored_item_bytes)

    streamed = range(pages.resident_pages, pages.pages_per_layer)
    largest = max(map(needed, streamed), default=0)
    return -(-largest // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def weights_bytes(model: ModelPlan, pages: PagePlan) -> int:
    """What stays in memory: resident pages, embeddings, head, norms, routers, and the MLPs that take every
    token, in the compute dtype, experts as packed; routers' corrections in float32."""
    item = ITEM_BYTES[model.compute_dtype]
    sizes = [page_parameters(model, pages, page) for page in range(pages.pages_per_layer)]
    all_pages = model.layers * sizes[0] + model.moe_layers * sum(sizes[1:])
    held = [page_bytes(model, pages, page, item) for page in range(pages.resident_pages)]
    resident = model.layers * sum(held[:1]) + model.moe_layers * sum(held[1:])
    always = (model.parameters - all_pages - model.scaled.mlp_values) * item + model.scaled.mlp_bytes
    return always + resident + 4 * model.router_corrections


def pass_tokens(sequences: int, prompt_tokens: int) -> int:
    """What a pass of a stream plan has to take: all prompts, or as many tokens as keep the cores busy."""
    return min(sequences * prompt_tokens, max(PASS_TOKENS, prompt_tokens, sequences))


def kv_blocks(tokens: int) -> int:
    """The blocks that hold `tokens` of one sequence."""
    return -(-tokens // KV_BLOCK_TOKENS)


def kv_shape(model: ModelPlan) -> tuple[int, int, int]:
    """What the cache holds of a token in a layer: kinds (keys and values, or latents), heads, their width."""
    return (1, 1, model.latent_dim) if model.latent_dim else (2, model.kv_heads, model.head_dim)


def kv_bytes(model: ModelPlan, batch: BatchPlan) -> int:
    """Keys and values [layers, blocks, kv heads, block tokens, head dim], twice, in the compute dtype or
    int8; or once, of latents. A layer that sees only a window or chunk keeps as much as the others."""
    tokens = model.layers * kv_blocks(batch.kv_tokens) * KV_BLOCK_TOKENS
    if batch.kv_cache == "int8":
        return tokens * 2 * model.kv_heads * (model.head_dim + 4)
    return tokens * math.prod(kv_shape(model)) * ITEM_BYTES[model.compute_dtype]


def call_tokens(batch: BatchPlan) -> int:
    """The most tokens that one call of attention, router or expert takes; larger inputs go in pieces.

    Never more than the largest pass has; otherwise at least 1,024, below which products lose speed.
    """
    return min(batch.pass_tokens, max(batch.prefill_tokens, batch.micro_batch, 1024))


def workspace_bytes(model: ModelPlan, batch: BatchPlan, pages: PagePlan) -> int:
    """What a run needs beside weights, slots and the KV cache. T = `pass_tokens`, C = `call_tokens`.

    pass      T tokens: hidden (float32) and normed (at most float32), `hidden` wide; per token 24 bytes of
              identifiers and per expert choice 64 bytes of routing
    call      C tokens in float32: attention 3 · hidden + 8 · (heads + kv_heads) · head_dim, or the widest
              MLP 3 · hidden + 3 · its width, or latent decode 3 · hidden + 6 · heads · latent_dim, or a
              router 4 · experts, whichever is largest
    latents   expanded to keys and values of one sequence: 2 · context_tokens · heads · head_dim in float32
    mask      micro_batch · context_tokens · 8 bytes
    logits    (N + micro_batch) · vocab in float32
    rope      2 · context_tokens · head_dim in float32, and as much again while it is made
    weights   the largest page that moves, or one expert where none does, in float32: converted from the
              stored dtype, or packed by the kernels
    loading   a block per reader, and 32 MiB for what the kernels and the allocator hold
    """
    moves = pages.resident_pages < pages.pages_per_layer
    expert = page_parameters(model, pages, 1) if moves else model.expert_parameters
    page = 4 * max(page_parameters(model, pages, 0), expert)
    loading = pages.readers * (pages.block_bytes + 2 * ALIGNMENT_BYTES) + (32 << 20)
    logits = 4 * batch.sequences * model.vocab
    return scratch_bytes(model, batch, batch.pass_tokens, 4) + logits + page + loading


def scratch_bytes(model: ModelPlan, batch: BatchPlan, tokens: int, value_bytes: int) -> int:
    """Pass, call, mask and rope of `workspace_bytes`, and a micro-batch's logits, for `tokens` tokens.

    Products are of values of `value_bytes`.
    """
    per_token = 8 * model.hidden + 24 + 64 * model.experts_per_token
    attention = 8 * (model.heads + model.kv_heads) * model.head_dim
    width = max(model.expert_intermediate, model.dense_intermediate, model.shared_intermediate)
    widest = 3 * model.hidden + max(attention, 3 * width, 6 * model.heads * model.latent_dim)
    call = value_bytes * call_tokens(batch) * max(widest, 4 * model.experts)
    latents = 2 * batch.context_tokens * model.heads * model.head_dim if model.latent_dim else 0
    mask = 8 * batch.micro_batch * batch.context_tokens
    logits = 4 * batch.micro_batch * model.vocab
    rope = 4 * 4 * batch.context_tokens * model.head_dim
    return tokens * per_token + call + value_bytes * latents + mask + logits + rope


def to_json(plan: RuntimePlan) -> str:
    """The text of runtime.json: sorted keys, two spaces, one trailing newline."""
    return json.dumps(asdict(plan), indent=2, sort_keys=True) + "\n"


def load(folder: Path) -> RuntimePlan:
    """Read and check `folder`/runtime.json and the digest of `folder`/schedule.py.

    Raises PlanFileError; never runs anything from the folder.
    """
    path = folder / "runtime.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanFileError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else None
        raise PlanFileError(
            f"{path}: has format {found!r}, this runtime reads {FORMAT}: compile the spec again"
        )
    plan = _record(RuntimePlan, data, str(path))
    _check_schedule(folder / "schedule.py", plan.schedule)
    return plan


def _check_schedule(path: Path, expected: SchedulePlan) -> None:
    if expected.format != SCHEDULE_FORMAT:
        raise PlanFileError(f"{path}: has format {expected.format}, this runtime runs {SCHEDULE_FORMAT}")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise PlanFileError(f"{path}: cannot be read: {error}") from None
    if digest != expected.sha256:
        raise PlanFileError(f"{path}: is not the schedule this plan was made with: compile the spec again")


_T = TypeVar("_T")


def _record(cls: type[_T], data: object, where: str) -> _T:
    if not isinstance(data, dict):
        raise PlanFileError(f"{where}: expected an object")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for name in names:
        if name not in data:
            raise PlanFileError(f"{where}: {name} is missing")
    for name in sorted(data):
        if name not in names:
            raise PlanFileError(f"{where}: {name} is unknown")
    return cls(**{name: _value(hints[name], data[name], f"{where}: {name}") for name in names})


def _value(hint: Any, value: object, where: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise PlanFileError(f"{where} is {value!r}, expected a list")
        return tuple(_value(typing.get_args(hint)[0], item, where) for item in value)
    if isinstance(hint, type) and hint not in (int, float, str):
        return _record(hint, value, where)
    if typing.get_origin(hint) in (Literal, types.UnionType):
        if value not in typing.get_args(hint):
            raise PlanFileError(f"{where} is {value!r}, expected one of {', '.join(typing.get_args(hint))}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float) if hint is float else hint):
        raise PlanFileError(f"{where} is {value!r}, expected {hint.__name__}")
    return value
