# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The compiled side of vectors: products of bf16 in float32 vectors. Imported only where Numba is.

Many tokens are packed once: of each 16, value k of all of them side by side, as float32. Rows of the weight
are widened to float32 a few at a time, into memory that stays in a core's cache, and each of their values is
multiplied by the 16 tokens'. Vectors are of 16, in any machine's terms. Few tokens: see `dot_kernel`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils

from moeplan.runtime_min.dot_kernel import STEP, dots, in_order
from moeplan.runtime_min.kernel_parts import (
    F32,
    FLOATS,
    I16,
    I64,
    INTS,
    POINTER,
    draw,
    emits,
    fma,
    line_pointers,
    rounded,
    row_pointers,
    splat,
    transposed,
)
from moeplan.runtime_min.packed_kernel import unpack_rows

ROWS = 6  # of the weight, multiplied at once: their sums for 16 tokens fill the registers of AVX2
LINE = 64  # bytes of 16 float32
FEW, REST = (
    24,
    8,
)  # so many tokens are not packed, nor so many after full lines of 16: `dots` has no empty lanes

# The table of a call. CODE and FAR: of a packed weight, as packed_kernel has them; CODE is -1 for a plain
# one. THREADS counts threads: each has ROOM_BYTES from ROOM on.
NEXT, PARTS, X, PACKED, WEIGHT, OUT, T, LAST, INNER, OUTER, CHUNK = range(11)
CODE, FAR, THREADS, ROOM, ROOM_BYTES, TABLE_SIZE = range(11, 17)


def last_tokens(count: int) -> int:
    """How many of the tokens are not packed; those before them fill lines, but for the last."""
    return count if count <= FEW else count % 16 if count % 16 <= REST else 0


def room_bytes(last: int, inner: int) -> int:
    """That a thread needs: ROWS rows of bf16 and float32, as many lines, and the last tokens in order."""
    return ROWS * (6 * inner + LINE) + 4 * last * inner


_SHORTS = ir.VectorType(I16, 16)


def _widened(builder: Any, pointer: Any) -> Any:
    """16 bf16 as the bits of float32."""
    bits = builder.zext(builder.load(pointer, typ=_SHORTS, align=2), INTS)
    return builder.shl(bits, ir.Constant(INTS, [16] * 16))


@emits()
def widen(builder, source, out):
    """16 bf16 at `source` become float32 at `out`."""
    values = _widened(builder, builder.inttoptr(source, POINTER))
    builder.store(values, builder.inttoptr(out, POINTER), align=4)


@emits()
def pack_block(builder, x, stride, valid, packed):
    """16 values of each of up to 16 tokens' rows at `x` become 16 lines at `packed`."""
    rows = [_widened(builder, p) for p in row_pointers(builder, x, stride, valid)]
    for pointer, line in zip(line_pointers(builder, packed), transposed(builder, rows), strict=True):
        builder.store(line, pointer, align=4)


@emits()
def multiply(builder, weight, tokens, inner, out):
    """ROWS lines at `out`: the products of as many rows of `inner` float32 at `weight` with 16 tokens."""
    zero = ir.Constant(FLOATS, [0.0] * 16)
    sums = [cgutils.alloca_once_value(builder, zero) for _ in range(ROWS)]
    with cgutils.for_range(builder, inner) as loop:
        line = builder.add(tokens, builder.mul(loop.index, I64(LINE)))
        values = builder.load(builder.inttoptr(line, POINTER), typ=FLOATS, align=4)
        place = builder.add(weight, builder.mul(loop.index, I64(4)))
        for total in sums:
            one = builder.load(builder.inttoptr(place, POINTER), typ=F32, align=4)
            builder.store(fma(builder, splat(builder, one), values, builder.load(total)), total)
            place = builder.add(place, builder.mul(inner, I64(4)))
    for i, total in enumerate(sums):
        to = builder.inttoptr(builder.add(out, I64(LINE * i)), POINTER)
        builder.store(builder.load(total), to, align=4)


@emits()
def round_lines(builder, lines):
    """The 16 float32 of each of ROWS lines become bf16, in the first half of the line."""
    for i in range(ROWS):
        pointer = builder.inttoptr(builder.add(lines, I64(LINE * i)), POINTER)
        builder.store(rounded(builder, builder.load(pointer, typ=INTS, align=4)), pointer, align=2)


@emits(types.CPointer(types.int16))
def shorts_at(builder, address):
    """The address as a pointer to int16."""
    return builder.inttoptr(address, I16.as_pointer())


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def pack(table):
    """Every thread's way through the packing: a part is 16 tokens."""
    a = carray(table, (TABLE_SIZE,))
    while True:
        part = draw(a.ctypes.data + 8 * NEXT)
        if part >= a[PARTS]:
            break
        source, packed = a[X] + 32 * part * a[INNER], a[PACKED] + LINE * part * a[INNER]
        count = min(16, a[T] - a[LAST] - 16 * part)
        for k in range(0, a[INNER], 16):
            pack_block(source + 2 * k, 2 * a[INNER], count, packed + LINE * k)


@njit(error_model="numpy")
def _write(a, lines, row, token, count):
    """The lines are of `row` and the rows that follow, of `count` tokens from `token` on."""
    round_lines(lines)
    values = carray(shorts_at(lines), (ROWS, LINE // 2))
    out = carray(shorts_at(a[OUT] + 2 * token * a[OUTER]), (count, a[OUTER]))
    for i in range(count):
        for r in range(ROWS):
            out[i, row + r] = values[r, i]


one, two, three, four = dots(1, ROWS), dots(2, ROWS // 2), dots(3, ROWS // 2), dots(4, ROWS // 2)


@njit(error_model="numpy")
def _few_product(inner, source, tokens, count, lines):
    """`lines` of ROWS rows of `inner` values at `source` with `count` tokens, up to 16, at `tokens`."""
    rows_bytes = 2 * ROWS * inner
    for first in range(0, count, 4):
        x, out, left = tokens + 4 * first * inner, lines + 4 * first, count - first
        if left == 1:
            one(source, x, inner, source + rows_bytes, out, LINE)
            return
        for row in range(0, ROWS, ROWS // 2):
            weight, to = source + 2 * row * inner, out + LINE * row
            ahead = weight + rows_bytes
            if left == 2:
                two(weight, x, inner, ahead, to, LINE)
            elif left == 3:
                three(weight, x, inner, ahead, to, LINE)
            else:
                four(weight, x, inner, ahead, to, LINE)


@njit(error_model="numpy")
def _rows_product(a, row, last, room):
    """Rows `row` to `row` + ROWS of the weight with all tokens, of which the last lie at `last`."""
    inner, packed = a[INNER], a[T] - a[LAST]
    wide = room + 2 * ROWS * inner
    lines = wide + 4 * ROWS * inner
    source = room
    if a[CODE] < 0:
        source = a[WEIGHT] + 2 * row * inner
    else:
        unpack_rows(a[WEIGHT], a[CODE], a[OUTER], inner, a[FAR], row, row + ROWS, room)
    if packed:
        for k in range(0, ROWS * inner, 16):
            widen(source + 2 * k, wide + 4 * k)
    for token in range(0, packed, 16):
        multiply(wide, a[PACKED] + 4 * token * inner, inner, lines)
        _write(a, lines, row, token, min(16, packed - token))
    for token in range(0, a[LAST], 16):
        count = min(16, a[LAST] - token)
        _few_product(inner, source, last + 4 * token * inner, count, lines)
        _write(a, lines, row, packed + token, count)


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def product(table):
    """Every thread's way through a product: a part is CHUNK rows of the weight, ROWS at a time."""
    a = carray(table, (TABLE_SIZE,))
    last = a[ROOM] + draw(a.ctypes.data + 8 * THREADS) * a[ROOM_BYTES]
    first, values = a[X] + 2 * (a[T] - a[LAST]) * a[INNER], a[LAST] * a[INNER]
    for k in range(0, values, STEP):
        in_order(first + 2 * k, last + 4 * k)
    while True:
        part = draw(a.ctypes.data + 8 * NEXT)
        if part >= a[PARTS]:
            break
        end = min(a[OUTER], (part + 1) * a[CHUNK])
        for row in range(part * a[CHUNK], end, ROWS):
            _rows_product(a, min(row, end - ROWS), last, last + 4 * values)
