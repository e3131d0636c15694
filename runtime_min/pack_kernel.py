# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The compiled side of packing rows, to formats.py. Imported only where Numba is.

Sums and extremes of a block are taken by halving it. int4 has 16 half blocks side by side, each in a lane of
vectors; what lies in the memory it works in, in vectors of 16 float32: 32 of values, then LOW to NUMBERS.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.core import cgutils

from moeplan.runtime_min.formats import CUTS, SMALLEST_STEP
from moeplan.runtime_min.kernel_parts import (
    FLOATS,
    I64,
    INTS,
    POINTER,
    emits,
    rounded,
    row_pointers,
    splat,
    transposed,
)

_F = np.float32
LANES = 16
_CUTS = np.array(CUTS, dtype=np.float32)
LOW, HIGH, ERROR, BEST_STEP, BEST_LEAST, NUMBERS = range(32, 38)
VECTORS = NUMBERS + 8  # the numbers are bytes


def _constant(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * LANES)


def _place(builder: Any, memory: Any, vector: int) -> Any:
    return builder.inttoptr(builder.add(memory, I64(64 * vector)), POINTER)


def _load(builder: Any, memory: Any, vector: int) -> Any:
    return builder.load(_place(builder, memory, vector), typ=FLOATS, align=4)


def _store(builder: Any, value: Any, memory: Any, vector: int) -> None:
    builder.store(value, _place(builder, memory, vector), align=4)


def _less(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


def _more(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _as_bf16(builder: Any, value: Any) -> Any:
    """Rounded to bf16, as float32."""
    short = rounded(builder, builder.bitcast(value, INTS))
    bits = builder.shl(builder.zext(short, INTS), ir.Constant(INTS, [16] * LANES))
    return builder.bitcast(bits, FLOATS)


def _inverse(builder: Any, step: Any) -> Any:
    some = builder.fcmp_ordered(">", step, _constant(float(_F(SMALLEST_STEP))))
    return builder.select(some, builder.fdiv(_constant(1.0), step), _constant(0.0))


def _number(builder: Any, value: Any, least: Any, inverse: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS])
    rint = cgutils.get_or_insert_function(builder.module, kind, "llvm.rint.v16f32")
    number = builder.call(rint, [builder.fmul(builder.fsub(value, least), inverse)])
    return _more(builder, _less(builder, number, _constant(15.0)), _constant(0.0))


def _halved(builder: Any, vectors: list[Any], join: Any) -> Any:
    while len(vectors) > 1:
        half = len(vectors) // 2
        vectors = [join(a, b) for a, b in zip(vectors[:half], vectors[half:], strict=True)]
    return vectors[0]


@emits()
def take_columns(builder, source, count, memory):
    """`count` half blocks at `source` become columns; their extremes, and no grid yet."""
    values = []
    for part in (0, 64):
        rows = row_pointers(builder, builder.add(source, I64(part)), I64(128), count)
        lines = transposed(builder, [builder.load(row, typ=INTS, align=4) for row in rows])
        values += [builder.bitcast(line, FLOATS) for line in lines]
    for i, value in enumerate(values):
        _store(builder, value, memory, i)
    low = _halved(builder, values, lambda a, b: _less(builder, a, b))
    for place, value in (
        (LOW, low),
        (HIGH, _halved(builder, values, lambda a, b: _more(builder, a, b))),
        (ERROR, _constant(float("inf"))),
        (BEST_STEP, _constant(0.0)),
        (BEST_LEAST, low),
    ):
        _store(builder, value, memory, place)


@emits(cut=types.float32)
def try_cut(builder, memory, cut):
    """Each column keeps the grid of its range less `cut` of it at both ends, if its squared error is less."""
    low, high = _load(builder, memory, LOW), _load(builder, memory, HIGH)
    cuts = splat(builder, cut)
    width = builder.fsub(high, low)
    shift = builder.fmul(width, cuts)
    inner = builder.fsub(width, builder.fmul(_constant(2.0), shift))
    step = _as_bf16(builder, builder.fdiv(inner, _constant(15.0)))
    least = _as_bf16(builder, builder.fadd(low, shift))
    inverse = _inverse(builder, step)
    squares = []
    for i in range(32):
        value = _load(builder, memory, i)
        number = _number(builder, value, least, inverse)
        off = builder.fsub(builder.fadd(builder.fmul(number, step), least), value)
        squares.append(builder.fmul(off, off))
    found = _halved(builder, squares, builder.fadd)
    better = builder.fcmp_ordered("<", found, _load(builder, memory, ERROR))
    for place, value in ((ERROR, found), (BEST_STEP, step), (BEST_LEAST, least)):
        kept = builder.select(better, value, _load(builder, memory, place))
        _store(builder, kept, memory, place)


@emits()
def number_columns(builder, memory):
    """A byte for each value at NUMBERS [32, LANES]: its number in the best grid of its column."""
    least = _load(builder, memory, BEST_LEAST)
    inverse = _inverse(builder, _load(builder, memory, BEST_STEP))
    for i in range(32):
        number = _number(builder, _load(builder, memory, i), least, inverse)
        whole = builder.trunc(builder.fptosi(number, INTS), ir.VectorType(ir.IntType(8), LANES))
        place = builder.add(memory, I64(64 * NUMBERS + LANES * i))
        builder.store(whole, builder.inttoptr(place, POINTER), align=1)


# Compiled as the module is imported.
_ROWS = types.uint8[:, ::1]
_PACKS = types.void(types.float32[:, ::1], _ROWS)
_COUNTS = types.int64(types.uint16[:, ::1], _ROWS, types.boolean[:, ::1])


@njit(nogil=True, cache=True, error_model="numpy")
def _bf16(value):
    """The bits of the nearest bf16, ties to even."""
    bits = np.uint32(_F(value).view(np.uint32))
    return np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True, error_model="numpy")
def _widened(bits):
    return np.uint32(bits << np.uint32(16)).view(np.float32)


@njit(_PACKS, nogil=True, cache=True, error_model="numpy")
def pack_int8(values, out):
    """Rows of float32 [rows, inner] become bytes [rows, row bytes]."""
    rows, inner = values.shape
    blocks = inner // 64
    most = np.empty(64, dtype=np.float32)
    for row in range(rows):
        for b in range(blocks):
            block, data = values[row, 64 * b : 64 * b + 64], out[row, 64 * b : 64 * b + 64]
            for i in range(64):
                most[i] = abs(block[i])
            for half in (32, 16, 8, 4, 2, 1):
                for i in range(half):
                    most[i] = most[i] if most[i] > most[i + half] else most[i + half]
            scale = _bf16(most[0] / _F(127))
            divisor = _widened(scale) if scale else _F(1)
            for i in range(64):
                whole = np.rint(block[i] / divisor)
                whole = whole if whole < _F(127) else _F(127)
                whole = whole if whole > _F(-127) else _F(-127)
                data[i] = np.uint8(np.int32(whole))
            place = 64 * blocks + 2 * b
            out[row, place], out[row, place + 1] = scale & 0xFF, scale >> 8


@njit(_PACKS, nogil=True, cache=True, error_model="numpy")
def pack_int4(values, out):
    """Rows of float32 [rows, inner] become bytes [rows, row bytes]."""
    rows, inner = values.shape
    blocks, halves = inner // 64, inner // 32
    memory = np.zeros(VECTORS * LANES, dtype=np.float32)
    numbers = memory.view(np.uint8)
    for row in range(rows):
        for first in range(0, halves, LANES):
            count = min(LANES, halves - first)
            take_columns(values.ctypes.data + 4 * (row * inner + 32 * first), count, memory.ctypes.data)
            for cut in _CUTS:
                try_cut(memory.ctypes.data, cut)
            number_columns(memory.ctypes.data)
            for lane in range(0, count, 2):
                for i in range(32):
                    place = 64 * NUMBERS + LANES * i + lane
                    out[row, 16 * (first + lane) + i] = numbers[place] | numbers[place + 1] << 4
            for lane in range(count):
                place = 32 * blocks + 4 * (first + lane)
                for i, of in enumerate((BEST_STEP, BEST_LEAST)):
                    bits = _bf16(memory[LANES * of + lane])
                    out[row, place + 2 * i], out[row, place + 2 * i + 1] = bits & 0xFF, bits >> 8


@njit(_COUNTS, nogil=True, cache=True, error_model="numpy")
def pack_bf12(bits, out, far):
    """Rows of the bits of bf16 [rows, inner], uint16, become bytes; `far` [rows, inner] marks exceptions.

    Returns how many there are.
    """
    rows, inner = bits.shape
    blocks = inner // 64
    exponents, nibbles = np.empty(64, dtype=np.uint8), np.empty(64, dtype=np.uint8)
    found = 0
    for row in range(rows):
        for b in range(blocks):
            block, data = bits[row, 64 * b : 64 * b + 64], out[row, 96 * b : 96 * b + 96]
            for i in range(64):
                exponents[i] = (block[i] >> 7) & 0xFF
                nibbles[i] = exponents[i]
                data[i] = (block[i] >> 8) & 0x80 | block[i] & 0x7F
            for half in (32, 16, 8, 4, 2, 1):
                for i in range(half):
                    nibbles[i] = nibbles[i] if nibbles[i] > nibbles[i + half] else nibbles[i + half]
            base = np.uint8(nibbles[0] - 14 if nibbles[0] > 14 else 0)
            count = 0
            for i in range(64):
                below = exponents[i] < base
                far[row, 64 * b + i] = below
                count += below
                nibbles[i] = 15 if below else exponents[i] - base
            found += count
            for i in range(32):
                data[64 + i] = nibbles[i] | nibbles[i + 32] << 4
            out[row, 96 * blocks + b] = base
    return found
