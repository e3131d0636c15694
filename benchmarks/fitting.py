"""Bounded, robust least squares on log ratios: enough for a dozen constants, without another library."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_ROBUST = 0.15  # residuals beyond this count linearly (soft L1)
_STEPS, _NUDGE, _TOLERANCE = 60, 1e-4, 1e-5


def fit(residuals: Callable[[Array], Array], start: Array, low: Array, high: Array) -> Array:
    """Constants between `low` and `high` with the least soft-L1 sum of `residuals`: Levenberg-Marquardt on a
    unit box, weights renewed at every step. Deterministic; a local minimum near `start`."""
    width = high - low
    x = np.clip((start - low) / width, 0.02, 0.98)
    damping, best = 1e-2, _loss(residuals(low + x * width))
    for _ in range(_STEPS):
        at = residuals(low + x * width)
        weight = 1.0 / np.sqrt(np.sqrt(1.0 + (at / _ROBUST) ** 2))
        slopes = np.stack([_slope(residuals, low, width, x, i, at) for i in range(len(x))], axis=1)
        a, b = slopes * weight[:, None], at * weight
        improved = False
        while damping < 1e6 and not improved:
            move = np.linalg.solve(a.T @ a + damping * np.eye(len(x)), -(a.T @ b))
            trial = np.clip(x + move, 0.0, 1.0)
            loss = _loss(residuals(low + trial * width))
            improved = loss < best
            damping = damping / 3 if improved else damping * 4
        if not improved or best - loss < _TOLERANCE * best:
            x = trial if improved else x
            break
        x, best = trial, loss
    return low + x * width


def _slope(
    residuals: Callable[[Array], Array], low: Array, width: Array, x: Array, index: int, at: Array
) -> Array:
    nudge = -_NUDGE if x[index] > 0.5 else _NUDGE
    moved = x.copy()
    moved[index] += nudge
    return (residuals(low + moved * width) - at) / nudge


def _loss(residual: Array) -> float:
    scaled = residual / _ROBUST
    return float(np.sum(np.sqrt(1.0 + scaled * scaled) - 1.0))
