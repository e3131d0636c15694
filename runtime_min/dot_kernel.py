# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Products of a few tokens with rows of a bf16 weight as it lies, in registers of eight float32.

16 values of a row are read at a time and widened by one operation each for the even and the odd ones; tokens
are float32 in that order. Sums of all pairs of a token and a row stay in registers. Imported only where Numba
is.
"""

from __future__ import annotations

import itertools
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

from moeplan.runtime_min.kernel_parts import (
    F32,
    I32,
    I64,
    emits,
    fetch,
    fma,
    pointer_at,
    transposed_sum,
    widened_pairs,
)

LANES = 8
STEP = 2 * LANES  # values of a row at a time
LINE = 64  # bytes that are fetched at once
_FLOATS, _INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


def _widened(builder: Any, row: Any) -> list[Any]:
    """The even and the odd ones of STEP bf16 at `row`."""
    return widened_pairs(builder, builder.load(pointer_at(builder, row), typ=_INTS, align=2))


@emits()
def in_order(builder, source, out):
    """STEP bf16 at `source` become float32 at `out`: the even ones, then the odd ones."""
    for half, values in enumerate(_widened(builder, source)):
        builder.store(values, pointer_at(builder, out, I64(4 * LANES * half)), align=4)


def _addresses(builder: Any, base: Any, stride: Any, count: int) -> list[Any]:
    return [builder.add(base, builder.mul(stride, I64(i))) for i in range(count)]


def dots(tokens: int, rows: int) -> Any:
    """The products of `tokens` with `rows`, of which there are at most twelve pairs."""

    @emits()
    def products(builder, weight, x, inner, ahead, out, stride):
        """out[r, t] = weight[r] · x[t] for rows of `inner` bf16 at weight and of float32 at x, `in_order`;
        out[r] lie `stride` bytes apart. Fetches as many bytes of weights from `ahead` on."""
        zero = ir.Constant(_FLOATS, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(tokens)] for _ in range(rows)]
        with cgutils.for_range(builder, builder.udiv(inner, I64(STEP))) as loop:
            start = builder.add(weight, builder.mul(loop.index, I64(2 * STEP)))
            widened = [
                _widened(builder, place)
                for place in _addresses(builder, start, builder.mul(inner, I64(2)), rows)
            ]
            later = builder.add(ahead, builder.mul(loop.index, I64(2 * STEP * rows)))
            for line in range(0, 2 * STEP * rows, LINE):
                fetch(builder, builder.add(later, I64(line)))
            start = builder.add(x, builder.mul(loop.index, I64(4 * STEP)))
            values = _addresses(builder, start, builder.mul(inner, I64(4)), tokens)
            for half, t in itertools.product((0, 1), range(tokens)):
                place = pointer_at(builder, values[t], I64(4 * LANES * half))
                token = builder.load(place, typ=_FLOATS, align=4)
                for row, totals in zip(widened, sums, strict=True):
                    builder.store(fma(builder, row[half], token, builder.load(totals[t])), totals[t])
        _store(builder, [total for row in sums for total in row], tokens, out, stride)

    return products


def _store(builder: Any, sums: list[Any], tokens: int, out: Any, stride: Any) -> None:
    """The sum of each vector, a row after the other."""
    padding = [ir.Constant(_FLOATS, [0.0] * LANES)] * (-len(sums) % LANES)
    vectors = [builder.load(total) for total in sums] + padding
    for first in range(0, len(sums), LANES):
        totals = transposed_sum(builder, vectors[first : first + LANES])
        for i in range(min(LANES, len(sums) - first)):
            row, token = divmod(first + i, tokens)
            at = builder.add(builder.mul(stride, I64(row)), I64(4 * token))
            builder.store(builder.extract_element(totals, I32(i)), pointer_at(builder, out, at), align=4)
