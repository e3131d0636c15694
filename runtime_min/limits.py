"""What the plan asks of this runtime, checked before anything is allocated. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moeplan.runtime_min.formats import PACKINGS, SCALED
from moeplan.runtime_min.models.tensors import CORRECTION, SCALES, packed
from moeplan.runtime_min.plan_file import (
    ALIGNMENT_BYTES,
    ARCHITECTURES,
    ITEM_BYTES,
    PlanFileError,
    RuntimePlan,
    kv_bytes,
    most_places,
    workspace_bytes,
)
from moeplan.runtime_min.shares import has_whole_experts, whole_heads


def check_supported(path: Path, plan: RuntimePlan) -> None:
    """Raise PlanFileError where this version of the runtime has no way to execute the plan."""
    kind, device, offload = plan.schedule.kind, plan.device, plan.offload
    if (kind, device) not in (("stream", "cpu"), ("offload", "accelerator")):
        raise PlanFileError(f"{path}: this version executes no {kind!r} plan for device {device!r}")
    m, gpus = plan.model, offload.gpus
    if gpus > 1 and (m.latent_dim or not whole_heads(m.heads, m.kv_heads, gpus)):
        kept = "a latent cache" if m.latent_dim else f"{m.kv_heads} of keys and values"
        raise PlanFileError(
            f"{path}: {gpus} GPUs cannot share {m.heads} heads and {kept} evenly",
            "compile the spec again",
        )
    if plan.model.packing != "none" and kind == "offload":
        raise PlanFileError(
            f"{path}: weights in {plan.model.packing} are executed by stream plans only",
            "compile the spec for a machine without a GPU, or for a checkpoint in bf16",
        )
    if plan.batch.kv_cache == "int8" and (kind == "offload" or plan.model.latent_dim):
        raise PlanFileError(f"{path}: a cache of int8 is kept by stream plans only, and not of latents")
    if plan.model.architecture not in ARCHITECTURES:
        raise PlanFileError(
            f"{path}: architecture {plan.model.architecture!r} is not supported",
            f"this version runs {', '.join(ARCHITECTURES)}",
        )


def check_numbers(path: Path, plan: RuntimePlan) -> None:
    """Raise PlanFileError where a figure of the stream plan cannot be executed."""
    m, p = plan.model, plan.pages
    rules = {
        **_least(p, "experts_per_page", "readers", "block_bytes"),
        "pages_per_layer does not hold the experts": p.pages_per_layer
        == 1 + -(-m.experts // max(1, p.experts_per_page)),
        "resident_pages is not within pages_per_layer": 0 <= p.resident_pages <= p.pages_per_layer,
        "no slots for pages that move": p.slots > 0 or p.resident_pages == p.pages_per_layer,
        "places do not hold the pages that a batch can hit": p.places in (0, most_places(m, plan.batch, p)),
        "guesses are more than places or slots": 0 <= p.guesses <= p.places
        and (p.guesses == 0 or p.guesses + (p.resident_pages == 0) <= p.slots),
        "block_bytes is not a multiple of 4096": p.block_bytes % ALIGNMENT_BYTES == 0,
    }
    _check_rules(path, plan, rules)


def check_offload(path: Path, plan: RuntimePlan) -> None:
    """Raise PlanFileError where a figure of the offload plan cannot be executed."""
    o, experts, pages = plan.offload, plan.model.experts, plan.pages.pages_per_layer
    streamed = experts - o.resident_experts - o.cpu_experts
    whole = list(range(experts))
    ranked = len(o.ranking) == plan.model.layers and all(sorted(row) == whole for row in o.ranking)
    rules = {
        "experts are not all somewhere, once": min(o.resident_experts, o.cpu_experts, streamed) >= 0,
        "no pages for experts that are streamed": pages > 0 or streamed == 0,
        "disk_experts are not among those streamed": 0 <= o.disk_experts <= streamed,
        "no slots for pages from disk": plan.pages.slots > 0 or o.disk_experts == 0,
        "ranking does not rank the experts of each layer": ranked or not o.ranking,
        "an expert is narrower than there are GPUs": has_whole_experts(plan)
        or plan.model.expert_intermediate >= o.gpus,
        **_dealt(plan),
    }
    _check_rules(path, plan, rules)


def _dealt(plan: RuntimePlan) -> dict[str, bool]:
    """That all GPUs have as many whole experts at each place."""
    if not has_whole_experts(plan):
        return {}
    o = plan.offload
    counts = {
        "": plan.model.experts,
        "resident ": o.resident_experts,
        "CPU ": o.cpu_experts,
        "disk ": o.disk_experts,
    }
    return {
        f"{count} {kind}experts are not shared whole and evenly by {o.gpus} GPUs": count % o.gpus == 0
        for kind, count in counts.items()
    }


def _least(record: Any, *names: str) -> dict[str, bool]:
    """That these figures of a record are positive."""
    values = {name: getattr(record, name) for name in names}
    return {f"{name} is {value}, expected at least 1": value >= 1 for name, value in values.items()}


def _check_rules(path: Path, plan: RuntimePlan, more: Mapping[str, bool]) -> None:
    """Raise PlanFileError with the first rule, of all plans or of `more`, that does not hold."""
    m, b = plan.model, plan.batch
    rules = {
        **_least(plan, "threads"),
        **_least(m, "layers", "head_dim", "kv_heads"),
        **_least(b, "sequences", "micro_batch", "prefill_tokens", "prompt_tokens"),
        "context_tokens is not above prompt_tokens": b.context_tokens > b.prompt_tokens,
        "heads are not a multiple of kv_heads": m.heads % max(1, m.kv_heads) == 0,
        "head_dim is odd": m.head_dim % 2 == 0,
        "experts_per_token is not within experts": 1 <= m.experts_per_token <= m.experts,
        **more,
    }
    for problem, holds in rules.items():
        if not holds:
            raise PlanFileError(f"{path}: {problem}")


def check_memory(
    path: Path,
    plan: RuntimePlan,
    shapes: Mapping[str, tuple[int, ...]],
    moving: Collection[str],
) -> None:
    """Raise PlanFileError where a need exceeds its item of the plan, or all together the budget."""
    memory, pages = plan.memory, plan.pages
    check_parameters(path, plan, shapes)
    stay = sum(stay_bytes(plan, name, shape) for name, shape in shapes.items() if name not in moving)
    items = {
        "weights": (stay, memory.weights_bytes),
        "slots": (pages.slots * pages.slot_bytes if moving else 0, memory.slots_bytes),
        "kv": (kv_bytes(plan.model, plan.batch), memory.kv_bytes),
        "workspace": (workspace_bytes(plan.model, plan.batch, pages), memory.workspace_bytes),
    }
    total = sum(need for need, _ in items.values()) + memory.process_bytes
    check_items(path, {**items, "all": (total, memory.budget_bytes)})


def check_parameters(path: Path, plan: RuntimePlan, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PlanFileError where the checkpoint has not as many parameters as the plan counts."""
    found = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith((CORRECTION, SCALES)))
    if found != plan.model.parameters:
        raise PlanFileError(
            f"{path}: the checkpoint has {found:,} parameters, the plan counts {plan.model.parameters:,}",
            "compile the spec again with this checkpoint",
        )


def stay_bytes(plan: RuntimePlan, name: str, shape: tuple[int, ...]) -> int:
    """What a tensor takes that stays in memory."""
    packing = plan.model.packing
    if packed(plan.model, name, shape):
        kind = SCALED.get(packing)
        return kind.data_bytes(shape) if kind else PACKINGS[packing].most_bytes(shape)
    if name.endswith(SCALES) and packing == "mxfp4":
        return math.prod(shape)
    item = 4 if name.endswith((CORRECTION, SCALES)) else ITEM_BYTES[plan.model.compute_dtype]
    return math.prod(shape) * item


def check_items(path: Path, items: Mapping[str, tuple[int, int]]) -> None:
    """Raise PlanFileError where an item needs more bytes than the plan has for it."""
    problems = [f"{name} {need:,} of {has:,} bytes" for name, (need, has) in items.items() if need > has]
    if problems:
        raise PlanFileError(
            f"{path}: the run needs more memory than the plan allows: {', '.join(problems)}",
            "compile the spec again: the plan was made for another runtime or checkpoint",
        )
