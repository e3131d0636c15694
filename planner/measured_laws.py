"""Measured rows of one configuration -> for each figure a law from predicted to corrected.

What a law carries over is the ratio between measured and predicted, never a rate: rates bend where memory
ends and batches shrink, in ways that only the model knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeplan.planner.ir.machine import Provenance
from moeplan.planner.ir.profile import FIGURES, FigureName, Figures, Method
from moeplan.planner.ir.workload import Bucket
from moeplan.planner.profile_file import ProfileRow

# Repeats of one configuration in AIConfigurator's published measurements scatter by 3.9 % in time per output
# token (pooled standard deviation of 91 configurations that were measured again); shared boxes by more.
MEASURED_SIGMA = 0.05
# One measured cell carried over to others: 5.1 % mean error over 35 cells of Mélange's Fig. 3b (4 to 18 % by
# choice of the cell), 4 to 22 % over AIConfigurator's groups. Also the expected scatter around a fit.
CALIBRATED_SIGMA = 0.10
_SAME = math.log(1.01)  # means of the same requests, rounded or counted by another tokenizer
_NEARBY = math.log(2.0)
_FEWEST_TO_FIT = 3
# The slope of a fit is 1 before there is evidence, give or take 0.25, and never leaves 0.5 to 1.5: beyond,
# the rows contradict the model rather than calibrate it, and extrapolation would be absurd.
_SLOPE_SIGMA, _MOST_SLOPE_CHANGE = 0.25, 0.5
_PRIOR_ROWS = 2.0  # how many rows' worth of residuals the expected scatter counts for


@dataclass(frozen=True, slots=True)
class Known:
    """A measured row and what the model predicts at its point."""

    row: ProfileRow
    predicted: Figures

    def distance(self, bucket: Bucket, batch: int) -> float:
        """The farthest of prompt, output and batch, as a log ratio."""
        row = self.row
        ratios = (row.prompt_tokens / bucket.prompt_tokens, row.output_tokens / bucket.output_tokens)
        return max(abs(math.log(ratio)) for ratio in (*ratios, row.batch / batch))

    def ratio(self, figure: FigureName) -> float:
        """Measured over predicted."""
        return self.row.figures[figure] / self.predicted.get(figure)


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """corrected = factor · predicted^slope, from some rows."""

    method: Method
    lines: tuple[int, ...]
    factor: float
    slope: float = 1.0
    residual: float = 0.0
    sigma: float

    def at(self, predicted: float) -> float:
        return self.factor * float(predicted**self.slope)

    @property
    def provenance(self) -> Provenance:
        return "measured" if self.method == "exact" else "calibrated"


Laws = Mapping[FigureName, Law]


def find_laws(known: Sequence[Known], bucket: Bucket, batch: int, predicted: Figures) -> Laws:
    """The law of each figure that some row measured, for the point at which `predicted` holds."""
    laws: dict[FigureName, Law] = {}
    for figure in FIGURES:
        rows = [k for k in known if figure in k.row.figures]
        if law := _law(rows, figure, bucket, batch, predicted.get(figure)):
            laws[figure] = law
    return laws


def _law(
    known: Sequence[Known], figure: FigureName, bucket: Bucket, batch: int, predicted: float
) -> Law | None:
    """Same point, then a fit, then the nearest row; None where no row is near and there are few."""
    if not known:
        return None
    nearest = min(known, key=lambda k: (k.distance(bucket, batch), k.row.line))
    distance, lines, factor = nearest.distance(bucket, batch), (nearest.row.line,), nearest.ratio(figure)
    if distance <= _SAME:
        return Law(method="exact", lines=lines, factor=factor, sigma=MEASURED_SIGMA)
    if len(known) >= _FEWEST_TO_FIT:
        return _fit(known, figure, predicted)
    if distance <= _NEARBY:
        return Law(method="nearby", lines=lines, factor=factor, sigma=CALIBRATED_SIGMA)
    return None


def _fit(known: Sequence[Known], figure: FigureName, predicted: float) -> Law:
    """log measured = a + b·log predicted, b near 1: a ridge regression of the log ratio.

    In logs the law stays positive however far it is carried, and errors are relative as the intervals are; a
    straight line through rates has an intercept that takes over, or turns negative, beyond the rows.
    The interval is that of a new point: it widens away from the rows, and with the residuals they leave.
    """
    x = [math.log(k.predicted.get(figure)) for k in known]
    y = [math.log(k.ratio(figure)) for k in known]
    count, x_mean, y_mean = len(known), sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - x_mean) ** 2 for a in x) + (CALIBRATED_SIGMA / _SLOPE_SIGMA) ** 2
    change = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / spread
    change = min(max(change, -_MOST_SLOPE_CHANGE), _MOST_SLOPE_CHANGE)
    squares = sum((b - y_mean - change * (a - x_mean)) ** 2 for a, b in zip(x, y, strict=True))
    variance = (squares + _PRIOR_ROWS * CALIBRATED_SIGMA**2) / (count - 2 + _PRIOR_ROWS)
    away = (math.log(predicted) - x_mean) ** 2 / spread
    return Law(
        method="fit",
        lines=tuple(sorted(k.row.line for k in known)),
        factor=math.exp(y_mean - change * x_mean),
        slope=1.0 + change,
        residual=math.sqrt(squares / count),
        sigma=max(MEASURED_SIGMA, math.sqrt(variance * (1.0 + 1.0 / count + away))),
    )
