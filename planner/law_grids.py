"""At which batches and sizes a serving law is tabulated."""

from __future__ import annotations

_STEPS = (1, 1.5)  # of each power of two


def batch_grid(most: int) -> tuple[int, ...]:
    """1 to `most`: powers of two and the numbers half-way between."""
    powers = (2**n for n in range(most.bit_length()))
    return tuple(sorted({round(p * s) for p in powers for s in _STEPS if p * s < most} | {1, most}))


def tokens_grid(most: int) -> tuple[float, ...]:
    """0 to `most` tokens, closer together where there are few: laws bend where a window or a roof ends."""
    return tuple(float(n) for n in sorted({0, most, *(2**n for n in range(6, 40) if 2**n < most)}))
