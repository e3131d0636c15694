"""Which of the dtypes that a spec allows: fewer bits where they clearly win over all that are more exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from moeplan.planner.catalog.quality import measured_quality
from moeplan.planner.ir.policy import DtypeOption

# Fewer bits must win this much: they need a checkpoint of their own or answer a little differently, and
# predictions are no surer.
WORTH_ROUNDING = 1.1

_Dtype = TypeVar("_Dtype", bound=str)


def most_exact(tokens_per_s: Mapping[_Dtype, float]) -> _Dtype:
    """The choice among dtypes given the most exact first, by what each reaches; 0 where memory holds none."""
    chosen, *others = tokens_per_s
    for other in others:
        if tokens_per_s[other] > WORTH_ROUNDING * tokens_per_s[chosen]:
            chosen = other
    return chosen


def dtype_options(found: Mapping[_Dtype, tuple[int, float]], prefix: str = "") -> tuple[DtypeOption, ...]:
    """Bytes and tokens per second by dtype, with what is known of its quality; nothing without a choice."""
    if len(found) == 1:
        return ()
    known = measured_quality()
    return tuple(
        DtypeOption(
            dtype=dtype, bytes=nbytes, generated_tokens_per_s=rate, quality=known.get(f"{prefix}{dtype}", ())
        )
        for dtype, (nbytes, rate) in found.items()
    )
