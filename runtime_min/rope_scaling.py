"""How config.json stretches rotary positions to longer contexts. Standard library only.

Source of the formulas: transformers 5.23.0, `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeplan.runtime_min.config_keys import Keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's way to longer contexts than the `original_context_tokens`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): waves of fewer than `slow` turns in the original context get `factor` times
    longer, those of more than `fast` stay; between them a ramp, whose ends may be rounded outwards."""

    factor: float
    fast: float
    slow: float
    rounded: bool
    original_context_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LongScaling:
    """LongRoPE (arXiv 2402.13753) within the original context: a factor for the wave of each pair."""

    factors: tuple[float, ...]


Scaling = Llama3Scaling | YarnScaling | LongScaling


def read_scaling(keys: Keys, rope: Keys, context_tokens: int) -> tuple[Scaling | None, float, float]:
    """The scaling that the group `rope` of `keys` asks for, the factor of what is rotated and that of scores.

    Notes in `keys` what is not supported.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    match kind:
        case "default":
            return None, 1.0, 1.0
        case "llama3":
            return _llama3(rope), 1.0, 1.0
        case "yarn":
            return _yarn(rope)
        case "longrope":
            return _long(keys, rope, context_tokens)
    keys.problems.append(f"rope type {kind!r} is not supported, only default, llama3, yarn and longrope")
    return None, 1.0, 1.0


def _llama3(rope: Keys) -> Llama3Scaling:
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_context_tokens=rope.number("original_max_position_embeddings"),
    )
    if not rope.problems and scaling.high_freq_factor <= scaling.low_freq_factor:
        rope.problems.append(f"high_freq_factor is {scaling.high_freq_factor}, not above low_freq_factor")
    return scaling


def _yarn(rope: Keys) -> tuple[YarnScaling, float, float]:
    scaling = YarnScaling(
        factor=rope.number("factor"),
        fast=rope.number("beta_fast", 32.0),
        slow=rope.number("beta_slow", 1.0),
        rounded=bool(rope.get("truncate", True)),
        original_context_tokens=rope.number("original_max_position_embeddings"),
    )
    given, one, all_ = (
        rope.number(key) if rope.get(key) else 0.0 for key in ("attention_factor", "mscale", "mscale_all_dim")
    )

    def stretched(by: float) -> float:
        return 0.1 * by * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    rotated = given or (stretched(one) / stretched(all_) if one and all_ else stretched(1.0))
    return scaling, rotated, stretched(all_) ** 2 if all_ else 1.0


def _long(keys: Keys, rope: Keys, context_tokens: int) -> tuple[Scaling | None, float, float]:
    """Beyond the original context the factors are others, for the keys in the cache too: refused."""
    factors, key = rope.get("short_factor"), "original_max_position_embeddings"
    original = rope.number(key, keys.get(key, 0))
    if context_tokens > original:
        keys.problems.append(
            f"{key} is {original:.0f}, the plan has {context_tokens} tokens of "
            "context, and longrope is supported within the original context only"
        )
    if not isinstance(factors, list) or not factors or not all(isinstance(f, (int, float)) for f in factors):
        keys.problems.append(f"short_factor is {factors!r}, expected a list of numbers")
        return None, 1.0, 1.0
    return LongScaling(factors=tuple(float(f) for f in factors)), rope.number("short_mscale"), 1.0
