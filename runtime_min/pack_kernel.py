# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The compiled side of packing rows: as packing.py has it in torch, to the bit. Imported only where Numba is.

Loops have constant lengths and no order among their steps, so that LLVM makes vectors of them. Sums and
extremes of a block are taken by halving it.
"""

from __future__ import annotations

import numpy as np
from numba import njit  # type: ignore[attr-defined]

from moeplan.runtime_min import formats

_F = np.float32
LANES = 16
CUTS = np.array(formats.CUTS, dtype=np.float32)
SMALLEST = np.float32(formats.SMALLEST_STEP)


@njit(nogil=True, cache=True, error_model="numpy")
def _bf16(value):
    """The bits of the nearest bf16, ties to even."""
    bits = np.uint32(_F(value).view(np.uint32))
    return np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(nogil=True, cache=True, error_model="numpy")
def _widened(bits):
    return np.uint32(bits << np.uint32(16)).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
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


@njit(nogil=True, cache=True, error_model="numpy")
def _numbers(values, inverse, least, whole):
    """The number of each value in its column's grid."""
    for i in range(32):
        some, to = values[i], whole[i]
        for lane in range(LANES):
            number = np.rint((some[lane] - least[lane]) * inverse[lane])
            number = number if number < _F(15) else _F(15)
            to[lane] = number if number > _F(0) else _F(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _inverses(step, inverse):
    for lane in range(LANES):
        quotient = _F(1) / step[lane]
        inverse[lane] = quotient if step[lane] > SMALLEST else _F(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _squared(values, step, least, whole):
    """The squared errors of each column take the place of its numbers, their sum that of the first."""
    for i in range(32):
        some, to = values[i], whole[i]
        for lane in range(LANES):
            off = to[lane] * step[lane] + least[lane] - some[lane]
            to[lane] = off * off
    for half in (16, 8, 4, 2, 1):
        for i in range(half):
            to, other = whole[i], whole[i + half]
            for lane in range(LANES):
                to[lane] += other[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _extremes(values, low, high):
    low[:] = values[0]
    high[:] = values[0]
    for i in range(1, 32):
        some = values[i]
        for lane in range(LANES):
            low[lane] = low[lane] if low[lane] < some[lane] else some[lane]
            high[lane] = high[lane] if high[lane] > some[lane] else some[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def _cut(low, high, cut, step, least):
    """A grid for each column."""
    for lane in range(LANES):
        shift = (high[lane] - low[lane]) * cut
        step[lane] = _widened(_bf16((high[lane] - low[lane] - _F(2) * shift) / _F(15)))
        least[lane] = _widened(_bf16(low[lane] + shift))


@njit(nogil=True, cache=True, error_model="numpy")
def _keep_better(found, step, least, error, best_step, best_least):
    for lane in range(LANES):
        better = found[lane] < error[lane]
        best_step[lane] = step[lane] if better else best_step[lane]
        best_least[lane] = least[lane] if better else best_least[lane]
        error[lane] = found[lane] if better else error[lane]


@njit(nogil=True, cache=True, error_model="numpy")
def pack_int4(values, out):
    """Rows of float32 [rows, inner] become bytes [rows, row bytes]: LANES half blocks at once, in columns."""
    rows, inner = values.shape
    blocks, halves = inner // 64, inner // 32
    columns, whole = np.zeros((32, LANES), dtype=np.float32), np.empty((32, LANES), dtype=np.float32)
    low, high, error = np.empty((3, LANES), dtype=np.float32)
    step, least, inverse = np.empty((3, LANES), dtype=np.float32)
    best_step, best_least = np.empty((2, LANES), dtype=np.float32)
    for row in range(rows):
        for first in range(0, halves, LANES):
            count = min(LANES, halves - first)
            for lane in range(count):
                half = values[row, 32 * (first + lane) : 32 * (first + lane) + 32]
                for i in range(32):
                    columns[i, lane] = half[i]
            _extremes(columns, low, high)
            best_step[:], best_least[:], error[:] = _F(0), low, _F(np.inf)
            for cut in CUTS:
                _cut(low, high, cut, step, least)
                _inverses(step, inverse)
                _numbers(columns, inverse, least, whole)
                _squared(columns, step, least, whole)
                _keep_better(whole[0], step, least, error, best_step, best_least)
            _inverses(best_step, inverse)
            _numbers(columns, inverse, best_least, whole)
            for lane in range(0, count, 2):
                to = out[row, 16 * (first + lane) : 16 * (first + lane) + 32]
                for i in range(32):
                    to[i] = np.uint8(np.int32(whole[i, lane]) | np.int32(whole[i, lane + 1]) << 4)
            for lane in range(count):
                place = 32 * blocks + 4 * (first + lane)
                lower, upper = _bf16(best_step[lane]), _bf16(best_least[lane])
                out[row, place], out[row, place + 1] = lower & 0xFF, lower >> 8
                out[row, place + 2], out[row, place + 3] = upper & 0xFF, upper >> 8


@njit(nogil=True, cache=True, error_model="numpy")
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
