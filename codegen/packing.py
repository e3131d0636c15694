"""Policy -> the packed checkpoint that it asks for, how it is made, and what it was chosen from."""

from __future__ import annotations

from moeplan.planner.ir.model import PACKED_BYTES, Model
from moeplan.planner.ir.policy import DtypeOption, Policy
from moeplan.planner.units import format_bytes, format_figure


def packing_of(policy: Policy) -> str:
    """The format in which `runtime_min quantize` writes the checkpoint first; empty where it does not."""
    return policy.weights_dtype if policy.weights_dtype in PACKED_BYTES else ""


def as_packed(model: Model, policy: Policy) -> Model:
    """The model as the policy's checkpoint has it."""
    return model.packed(policy.weights_dtype) if policy.weights_dtype in PACKED_BYTES else model


def packed_path(checkpoint: str, policy: Policy) -> str:
    """Where the checkpoint that the policy runs lies: packed, beside the one that the spec names."""
    packing = packing_of(policy)
    return f"{_folder(checkpoint)}-{packing}" if packing and checkpoint else checkpoint


def quantize_command(checkpoint: str, policy: Policy) -> str:
    """The command that writes it; empty where none is needed."""
    packing = packing_of(policy)
    if not packing:
        return ""
    return f"runtime_min quantize {_folder(checkpoint)} {packed_path(checkpoint, policy)} --to {packing}"


def _folder(checkpoint: str) -> str:
    return checkpoint.removesuffix("config.json").rstrip("/")


def option_rows(policy: Policy) -> list[tuple[str, str, str, str]]:
    """Each dtype that was considered: name, bytes, tokens per second, perplexity."""
    weights = [_row("weights", policy.weights_dtype, option) for option in policy.weights_options]
    return weights + [_row("KV cache", policy.kv_dtype, option) for option in policy.kv_options]


def quality_sources(policy: Policy) -> list[str]:
    """The commands that measure perplexity, of what was considered."""
    options = (*policy.weights_options, *policy.kv_options)
    return list(dict.fromkeys(quality.source for option in options for quality in option.quality))


def _row(what: str, dtype: str, option: DtypeOption) -> tuple[str, str, str, str]:
    plain = {"checkpoint": "as stored", "same": "as computed with"}
    name = f"{what}, {plain.get(option.dtype, option.dtype)}" + (", chosen" if option.dtype == dtype else "")
    size = format_bytes(option.bytes) + (" a token" if what == "KV cache" else "")
    rate = option.generated_tokens_per_s
    return name, size, f"{format_figure(rate)} tokens/s" if rate else "does not fit", _quality(option)


def _quality(option: DtypeOption) -> str:
    """What rounding was measured to do to perplexity, by model."""
    if option.dtype in ("checkpoint", "same", "bf12"):
        return "as it is"
    return ", ".join(f"{q.change:+.2%} ({q.model})" for q in option.quality) or "not measured"
