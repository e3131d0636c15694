# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The compiled side of packing: rows of packed bytes become bf16. Imported only where Numba is.

Vectors are of 64 values, in any machine's terms: LLVM splits them where registers are shorter.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]

from moeplan.runtime_min.kernel_parts import (
    F32,
    FLOATS,
    I16,
    I32,
    I64,
    INTS,
    POINTER,
    draw,
    emits,
    rounded,
    splat,
)

I8 = ir.IntType(8)
BYTES, HALF_BYTES = ir.VectorType(I8, 64), ir.VectorType(I8, 32)
SHORTS = ir.VectorType(I16, 64)
BF12, INT8, INT4, FP8, MXFP4 = range(5)  # formats: code of Packing and Scaled
ROWS = 32  # unpacked at once

# The table of a call. FAR: exceptions, which follow the rows; or where Packed.grid lies.
NEXT, PARTS, DATA, CODE, OUTER, INNER, FAR, OUT, TABLE_SIZE = range(9)


def _constant(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, POINTER), typ=kind, align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, POINTER), align=2)


def _halves(builder: Any, address: Any) -> tuple[Any, Any]:
    """32 bytes as their lower and their upper four bits."""
    pairs = _load(builder, address, HALF_BYTES)
    low = builder.and_(pairs, _constant(HALF_BYTES, 15))
    return low, builder.lshr(pairs, _constant(HALF_BYTES, 4))


def _scale(builder: Any, address: Any) -> Any:
    """The bf16 at `address` as float32."""
    bits = builder.zext(_load(builder, address, I16), I32)
    return builder.bitcast(builder.shl(bits, I32(16)), F32)


def _scaled(builder: Any, whole: Any, scale: Any, least: Any = None) -> Any:
    """16 whole numbers (int32) times `scale`, plus `least`, as the nearest bf16."""
    value = builder.fmul(builder.sitofp(whole, FLOATS), splat(builder, scale, 16))
    if least is not None:
        value = builder.fadd(value, splat(builder, least, 16))
    return rounded(builder, builder.bitcast(value, INTS))


@emits()
def bf12_block(builder, data, base, out):
    """64 values: signs and mantissas at `data`, then the exponents' distances to the byte at `base`."""
    signs = builder.zext(_load(builder, data, BYTES), SHORTS)
    low, high = _halves(builder, builder.add(data, I64(64)))
    order = ir.Constant(ir.VectorType(I32, 64), list(range(64)))
    distance = builder.zext(builder.shuffle_vector(low, high, order), SHORTS)
    above = splat(builder, builder.zext(_load(builder, base, I8), I16), 64)
    exponent = builder.shl(builder.add(distance, above), _constant(SHORTS, 7))
    sign = builder.shl(builder.and_(signs, _constant(SHORTS, 0x80)), _constant(SHORTS, 8))
    mantissa = builder.and_(signs, _constant(SHORTS, 0x7F))
    _store(builder, builder.or_(builder.or_(sign, exponent), mantissa), out)


@emits()
def int8_block(builder, data, scale, out):
    """64 signed bytes at `data` times the bf16 at `scale`."""
    factor = _scale(builder, scale)
    for i in range(0, 64, 16):
        some = _load(builder, builder.add(data, I64(i)), ir.VectorType(I8, 16))
        whole = builder.sext(some, INTS)
        _store(builder, _scaled(builder, whole, factor), builder.add(out, I64(2 * i)))


@emits()
def int4_block(builder, data, scales, out):
    """64 values of four bits at `data`; `scales`: the bf16 step and least value of each 32."""
    for half, bits in enumerate(_halves(builder, data)):
        step = _scale(builder, builder.add(scales, I64(4 * half)))
        least = _scale(builder, builder.add(scales, I64(4 * half + 2)))
        for i in range(0, 32, 16):
            order = ir.Constant(INTS, list(range(i, i + 16)))
            whole = builder.zext(builder.shuffle_vector(bits, bits, order), INTS)
            place = builder.add(out, I64(2 * (32 * half + i)))
            _store(builder, _scaled(builder, whole, step, least), place)


def _small_float(builder: Any, bits: Any, sign: int, mantissa_bits: int, bias: int) -> Any:
    """16 floats of few bits (int32), their highest one `sign`, as float32."""
    magnitude = builder.and_(bits, _constant(INTS, sign - 1))
    exponent = _constant(INTS, (127 - bias) << 23)
    normal = builder.add(builder.shl(magnitude, _constant(INTS, 23 - mantissa_bits)), exponent)
    step = ir.Constant(FLOATS, [2.0 ** (1 - bias - mantissa_bits)] * 16)
    tiny = builder.bitcast(builder.fmul(builder.sitofp(magnitude, FLOATS), step), INTS)
    below = builder.icmp_signed("<", magnitude, _constant(INTS, 1 << mantissa_bits))
    signs = builder.shl(builder.and_(bits, _constant(INTS, sign)), _constant(INTS, 32 - sign.bit_length()))
    return builder.bitcast(builder.or_(builder.select(below, tiny, normal), signs), FLOATS)


@emits()
def fp8_block(builder, data, scale, out):
    """64 values e4m3 at `data` times the float32 at `scale`; no NaN among them."""
    factor = splat(builder, _load(builder, scale, F32), 16)
    for i in range(0, 64, 16):
        some = _load(builder, builder.add(data, I64(i)), ir.VectorType(I8, 16))
        value = _small_float(builder, builder.zext(some, INTS), 0x80, 3, 7)
        bits = builder.bitcast(builder.fmul(value, factor), INTS)
        _store(builder, rounded(builder, bits), builder.add(out, I64(2 * i)))


@emits()
def mxfp4_block(builder, data, scales, out):
    """64 values e2m1 at `data` times the powers of two that the two bytes at `scales` stand for."""
    low, high = _halves(builder, data)
    for i in range(0, 64, 16):
        order = [i // 2 + j // 2 + 32 * (j % 2) for j in range(16)]  # lower and upper bits by turns
        some = builder.shuffle_vector(low, high, ir.Constant(INTS, order))
        value = _small_float(builder, builder.zext(some, INTS), 8, 1, 1)
        power = builder.zext(_load(builder, builder.add(scales, I64(i // 32)), I8), I32)
        factor = builder.bitcast(builder.shl(power, I32(23)), F32)
        bits = builder.bitcast(builder.fmul(value, splat(builder, factor, 16)), INTS)
        _store(builder, rounded(builder, bits), builder.add(out, I64(2 * i)))


@emits()
def copy_bits(builder, source, out):
    """Two bytes at `source` go to `out`."""
    builder.store(_load(builder, source, I16), builder.inttoptr(out, POINTER), align=2)


def _number_at(kind: Any) -> Any:
    @emits(types.int64)
    def number_at(builder, address):
        found = _load(builder, address, kind)
        return found if kind == I64 else builder.zext(found, I64)

    return number_at


row_at, column_at, number_at = _number_at(I32), _number_at(I16), _number_at(I64)


@njit(error_model="numpy")
def row_bytes(code, inner):
    blocks = inner // 64
    if code == BF12:
        return blocks * 97
    return blocks * 66 if code == INT8 else blocks * 40


@njit(error_model="numpy")
def unpack_rows(data, code, outer, inner, far, first, end, out):
    """Rows first..end of the packed matrix at `data` become bf16 at `out`, row after row."""
    if code >= FP8:
        _unpack_scaled(data, code, inner, far, first, end, out)
        return
    blocks, stride = inner // 64, row_bytes(code, inner)
    for row in range(first, end):
        source, to = data + row * stride, out + (row - first) * 2 * inner
        if code == BF12:
            for i in range(blocks):
                bf12_block(source + 96 * i, source + 96 * blocks + i, to + 128 * i)
        elif code == INT8:
            for i in range(blocks):
                int8_block(source + 64 * i, source + 64 * blocks + 2 * i, to + 128 * i)
        else:
            for i in range(blocks):
                int4_block(source + 32 * i, source + 32 * blocks + 8 * i, to + 128 * i)
    if far:
        _place_exceptions(data + outer * stride, inner, far, first, end, out)


@njit(error_model="numpy")
def _unpack_scaled(data, code, inner, grid, first, end, out):
    """The same where scales lie apart: see packing.Packed."""
    scales, height, width = number_at(grid), number_at(grid + 8), number_at(grid + 16)
    count = number_at(grid + 24)
    for row in range(first, end):
        line, to = scales, out + (row - first) * 2 * inner
        if code == FP8:
            line += row // height * count * 4
            for i in range(inner // 64):
                fp8_block(data + row * inner + 64 * i, line + 64 * i // width * 4, to + 128 * i)
        else:
            line += row * count
            for i in range(inner // 64):
                mxfp4_block(data + row * inner // 2 + 32 * i, line + 2 * i, to + 128 * i)


@njit(error_model="numpy")
def _place_exceptions(tail, inner, far, first, end, out):
    low, high = 0, far
    while low < high:  # the first of row `first` or behind it
        middle = (low + high) // 2
        if row_at(tail + 8 * middle) < first:
            low = middle + 1
        else:
            high = middle
    while low < far and row_at(tail + 8 * low) < end:
        entry = tail + 8 * low
        copy_bits(entry + 6, out + 2 * ((row_at(entry) - first) * inner + column_at(entry + 4)))
        low += 1


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def unpack(table):
    """Every thread's way through a matrix: a part is ROWS rows."""
    a = carray(table, (TABLE_SIZE,))
    while True:
        part = draw(a.ctypes.data + 8 * NEXT)
        if part >= a[PARTS]:
            break
        first = part * ROWS
        end = min(a[OUTER], first + ROWS)
        out = a[OUT] + 2 * first * a[INNER]
        unpack_rows(a[DATA], a[CODE], a[OUTER], a[INNER], a[FAR], first, end, out)
