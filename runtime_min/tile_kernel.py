# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The compiled side of tiles.py: a product on the processor's AMX tiles. Imported only where they are usable.

A block of the result is 32 rows of the weights times 32 tokens: four tiles of 16 x 16 sums. Weights are read
where they lie, activations packed: for 16 tokens, pair after pair of their values, as the units want them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import carray, cfunc, extending, types  # type: ignore[attr-defined]
from numba.core import cgutils

from moeplan.runtime_min.attention_kernel import draw

intrinsic: Any = extending.intrinsic  # its calls lack the first parameter of its definitions

I8, I64, POINTER, VOID = ir.IntType(8), ir.IntType(64), ir.PointerType(), ir.VoidType()
SUMS, WEIGHTS, TOKENS = (0, 1, 2, 3), (4, 5), (6, 7)  # the eight tiles
ROWS, TILE_BYTES = 16, 1024  # of a tile: so many rows of 64 bytes
STEP = 32  # values of a row that a tile holds

# The table of a call. A part is a band of 32 rows of the weights. SCRATCH: four tiles of sums a thread.
NEXT, SLOT, PARTS, WEIGHT, PACKED, OUT, SCRATCH, CONFIG, OUT_ROWS, IN, TOKEN_TILES, T, TABLE_SIZE = range(13)


def _call(builder: Any, name: str, kinds: list[Any], arguments: list[Any]) -> None:
    kind = ir.FunctionType(VOID, kinds)
    builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86." + name), arguments)


def _load(builder: Any, tile: int, address: Any, stride: Any) -> None:
    pointer = builder.inttoptr(address, POINTER)
    _call(builder, "tileloadd64", [I8, POINTER, I64], [I8(tile), pointer, stride])


@intrinsic
def configure(typingctx, address):
    """Shape this thread's tiles as the 64 bytes at `address` say."""

    def codegen(context, builder, signature, args):
        _call(builder, "ldtilecfg", [POINTER], [builder.inttoptr(args[0], POINTER)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release(typingctx):
    """Let this thread's tiles go."""

    def codegen(context, builder, signature, args):
        _call(builder, "tilerelease", [], [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def multiply(typingctx, weights, stride, packed, more, steps, sums):
    """Sums of 32 rows at `weights`, `stride` bytes apart, times two groups of tokens, `more` bytes apart."""

    def codegen(context, builder, signature, args):
        weights, stride, packed, more, steps, sums = args
        lower = builder.add(weights, builder.mul(stride, I64(ROWS)))
        for tile in SUMS:
            _call(builder, "tilezero", [I8], [I8(tile)])
        with cgutils.for_range(builder, steps) as loop:
            along, down = builder.mul(loop.index, I64(64)), builder.mul(loop.index, I64(TILE_BYTES))
            for tile, rows in zip(WEIGHTS, (weights, lower), strict=True):
                _load(builder, tile, builder.add(rows, along), stride)
            for tile, first in zip(TOKENS, (packed, builder.add(packed, more)), strict=True):
                _load(builder, tile, builder.add(first, down), I64(64))
            for tile in SUMS:
                operands = [I8(tile), I8(WEIGHTS[tile // 2]), I8(TOKENS[tile % 2])]
                _call(builder, "tdpbf16ps", [I8] * 3, operands)
        for tile in SUMS:
            pointer = builder.inttoptr(builder.add(sums, I64(TILE_BYTES * tile)), POINTER)
            _call(builder, "tilestored64", [I8, POINTER, I64], [I8(tile), pointer, I64(64)])
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, i64, i64, i64), codegen


@intrinsic
def floats_at(typingctx, address):
    """The address as a pointer to float32."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.float32)))

    return types.CPointer(types.float32)(types.int64), codegen


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def product(table):
    """Every thread's way through a call: bands of rows as long as there are any."""
    a = carray(table, (TABLE_SIZE,))
    address = a.ctypes.data
    scratch = a[SCRATCH] + 4 * TILE_BYTES * draw(address + 8 * SLOT)
    sums = carray(floats_at(scratch), (4, ROWS, ROWS))
    out = carray(floats_at(a[OUT]), (a[T], a[OUT_ROWS]))
    stride, steps = 2 * a[IN], a[IN] // STEP
    group = TILE_BYTES * steps
    configure(a[CONFIG])
    while True:
        band = draw(address + 8 * NEXT)
        if band >= a[PARTS]:
            break
        row = min(2 * ROWS * band, a[OUT_ROWS] - 2 * ROWS)
        for tile in range(0, a[TOKEN_TILES], 2):
            first = a[PACKED] + group * tile
            more = group if tile + 1 < a[TOKEN_TILES] else 0
            multiply(a[WEIGHT] + stride * row, stride, first, more, steps, scratch)
            for half in range(2):
                token = ROWS * (tile + half)
                for t in range(min(ROWS, a[T] - token)):
                    for i in range(ROWS):
                        out[token + t, row + i] = sums[half, i, t]
                        out[token + t, row + ROWS + i] = sums[2 + half, i, t]
    release()
