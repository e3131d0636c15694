"""Measured figures of a configuration, and what they did to its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

FigureName = Literal["prefill_tokens_per_s", "decode_tokens_per_s", "requests_per_s", "ttft_s", "itl_s"]
FIGURES: tuple[FigureName, ...] = get_args(FigureName)
Method = Literal["exact", "nearby", "fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one copy of the model does with requests of one size, a given number of them in flight.

    Prompt tokens over the seconds of prefill; generated tokens over the seconds of decode; finished requests
    over all seconds; mean time to the first token and between tokens, as many in flight all the while.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    requests_per_s: float
    ttft_s: float
    itl_s: float

    def get(self, figure: FigureName) -> float:
        """The figure of that name."""
        return float(getattr(self, figure))


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How measured rows changed one predicted figure of one size and batch.

    `lines` are the rows' lines in the profile, `factor` is corrected over predicted, `residual` the rms
    relative error that a fit leaves on its own rows (0 for a single row), `sigma` the standard error.
    """

    figure: FigureName
    prompt_tokens: float
    output_tokens: float
    batch: int
    method: Method
    lines: tuple[int, ...]
    factor: float
    residual: float
    sigma: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusedRow:
    """A row of the profile that changed no prediction, and why."""

    line: int
    reason: str
