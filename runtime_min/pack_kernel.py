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
# Places in the memory that int4 works in: values and their numbers [32, LANES], the rest [LANES]. It is one
# array, so that LLVM knows what does not overlap.
NUMBERS, LOW, HIGH, STEP, LEAST, INVERSE, BEST_STEP, BEST_LEAST, ERROR, SIZE = (
    512,
    *range(1024, 1024 + 9 * LANES, LANES),
)
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
def _numbers(a, step, least):
    """The number of each value in the grid of its column; `step` and `least` are places in `a`."""
    for lane in range(LANES):
        quotient = _F(1) / a[step + lane]
        a[INVERSE + lane] = quotient if a[step + lane] > SMALLEST else _F(0)
    for i in range(0, 32 * LANES, LANES):
        for lane in range(LANES):
            number = np.rint((a[i + lane] - a[least + lane]) * a[INVERSE + lane])
            number = number if number < _F(15) else _F(15)
            a[NUMBERS + i + lane] = number if number > _F(0) else _F(0)


@njit(nogil=True, cache=True, error_model="numpy")
def _squared(a):
    """Squared errors take the place of the numbers, their sum that of the first of each column."""
    for i in range(0, 32 * LANES, LANES):
        for lane in range(LANES):
            off = a[NUMBERS + i + lane] * a[STEP + lane] + a[LEAST + lane] - a[i + lane]
            a[NUMBERS + i + lane] = off * off
    for half in (16, 8, 4, 2, 1):
        for i in range(half * LANES):
            a[NUMBERS + i] += a[NUMBERS + half * LANES + i]


@njit(nogil=True, cache=True, error_model="numpy")
def _extremes(a):
    for lane in range(LANES):
        a[LOW + lane] = a[HIGH + lane] = a[lane]
    for i in range(LANES, 32 * LANES, LANES):
        for lane in range(LANES):
            value = a[i + lane]
            a[LOW + lane] = a[LOW + lane] if a[LOW + lane] < value else value
            a[HIGH + lane] = a[HIGH + lane] if a[HIGH + lane] > value else value


@njit(nogil=True, cache=True, error_model="numpy")
def _best_grids(a):
    """BEST_STEP and BEST_LEAST of each column: those of CUTS with the least squared error."""
    _extremes(a)
    for lane in range(LANES):
        a[ERROR + lane], a[BEST_STEP + lane], a[BEST_LEAST + lane] = _F(np.inf), _F(0), a[LOW + lane]
    for cut in CUTS:
        for lane in range(LANES):
            width = a[HIGH + lane] - a[LOW + lane]
            shift = width * cut
            a[STEP + lane] = _widened(_bf16((width - _F(2) * shift) / _F(15)))
            a[LEAST + lane] = _widened(_bf16(a[LOW + lane] + shift))
        _numbers(a, STEP, LEAST)
        _squared(a)
        for lane in range(LANES):
            better = a[NUMBERS + lane] < a[ERROR + lane]
            a[BEST_STEP + lane] = a[STEP + lane] if better else a[BEST_STEP + lane]
            a[BEST_LEAST + lane] = a[LEAST + lane] if better else a[BEST_LEAST + lane]
            a[ERROR + lane] = a[NUMBERS + lane] if better else a[ERROR + lane]


@njit(nogil=True, cache=True, error_model="numpy")
def pack_int4(values, out):
    """Rows of float32 [rows, inner] become bytes [rows, row bytes]: LANES half blocks at once, in columns."""
    rows, inner = values.shape
    blocks, halves = inner // 64, inner // 32
    a = np.zeros(SIZE, dtype=np.float32)
    for row in range(rows):
        for first in range(0, halves, LANES):
            count = min(LANES, halves - first)
            for lane in range(count):
                for i in range(32):
                    a[LANES * i + lane] = values[row, 32 * (first + lane) + i]
            _best_grids(a)
            _numbers(a, BEST_STEP, BEST_LEAST)
            for lane in range(0, count, 2):
                for i in range(32):
                    place = NUMBERS + LANES * i + lane
                    pair = np.int32(a[place]) | np.int32(a[place + 1]) << 4
                    out[row, 16 * (first + lane) + i] = np.uint8(pair)
            for lane in range(count):
                place = 32 * blocks + 4 * (first + lane)
                step, least = _bf16(a[BEST_STEP + lane]), _bf16(a[BEST_LEAST + lane])
                out[row, place], out[row, place + 1] = step & 0xFF, step >> 8
                out[row, place + 2], out[row, place + 3] = least & 0xFF, least >> 8


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
