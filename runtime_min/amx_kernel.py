# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The compiled side of amx: bf16 products on the tile units. Imported only where Numba is.

A tile is 16 rows of 64 bytes. A tile of the weight is 16 of its rows by 32 of `in`, as it lies in memory. A
tile of the packed tokens is 16 pairs of `in` by 16 tokens, the two values of a pair together. Their product
is 16 of `out` by 16 tokens, float32. The tile instructions are given as assembly: no compiler needs to know
that the machine has them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]

from moeplan.runtime_min.kernel_parts import (
    I64,
    INTS,
    draw,
    emits,
    line_pointers,
    rounded,
    row_pointers,
    transposed,
)
from moeplan.runtime_min.packed_kernel import unpack_rows

binding.initialize_native_asmparser()  # which Numba leaves out

TILE = 1024  # bytes of a tile
ROWS = 32  # rows of the weight that are multiplied at once

# The table of a call. SCRATCH: 4 tiles for each chunk. CHUNK: rows of `out` that a thread takes at once.
# Of a packed weight, which lies at WEIGHT: CODE and FAR as packed_kernel has them; THREADS counts threads,
# and each has room for ROWS rows of bf16 from ROOM on.
NEXT, PARTS, X, PACKED, WEIGHT, OUT, T, INNER, OUTER, CHUNK, FLOAT, SCRATCH, CONFIG = range(13)
CODE, FAR, THREADS, ROOM, TABLE_SIZE = range(13, 18)

_CLOBBERS = ",~{memory},~{dirflag},~{fpsr},~{flags}"


def _loop(loads: str, products: str, bases: int) -> str:
    """Zero four tiles, then add products along `in`; $0... are registers that the loop advances."""
    steps = "".join(f"add $$64, ${i}\n" for i in range(2)) + "".join(
        f"add $$1024, ${i}\n" for i in range(2, bases)
    )
    zero = "".join(f"tilezero %tmm{i}\n" for i in range(4))
    return f"{zero}1:\n{loads}{products}{steps}dec ${bases}\njnz 1b\n"


# $0 and $1: two tiles of the weight, $2 and $3: two of the tokens, $4: steps, $5: bytes of a row, $6: 64
_TWO = _loop(
    "tileloadd ($2,$6), %tmm6\ntileloadd ($0,$5), %tmm4\n"
    "tileloadd ($3,$6), %tmm7\ntileloadd ($1,$5), %tmm5\n",
    "tdpbf16ps %tmm6, %tmm4, %tmm0\ntdpbf16ps %tmm7, %tmm4, %tmm1\n"
    "tdpbf16ps %tmm6, %tmm5, %tmm2\ntdpbf16ps %tmm7, %tmm5, %tmm3\n",
    4,
)
# $0 and $1: two tiles of the weight, $2: one of the tokens, $3: steps, $4: bytes of a row, $5: 64
_ONE = _loop(
    "tileloadd ($2,$5), %tmm6\ntileloadd ($0,$4), %tmm4\ntileloadd ($1,$4), %tmm5\n",
    "tdpbf16ps %tmm6, %tmm4, %tmm0\ntdpbf16ps %tmm6, %tmm5, %tmm2\n",
    3,
)


def _assemble(builder: Any, text: str, constraints: str, results: Any, arguments: list[Any]) -> Any:
    function = ir.FunctionType(results, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(function, text, (constraints + _CLOBBERS).lstrip(","), True), arguments)


@emits()
def configure(builder, config):
    """Shape this thread's tiles by the 64 bytes at `config`."""
    _assemble(builder, "ldtilecfg ($0)", "r", ir.VoidType(), [config])


@emits()
def release(builder):
    """Give the thread's tiles back: their state is no longer saved."""
    _assemble(builder, "tilerelease", "", ir.VoidType(), [])


@emits()
def multiply(builder, weight, stride, tokens, block, two, steps, out):
    """32 rows of the weight, `stride` bytes apart, times one block of 16 tokens, or two `block` bytes apart.

    The four tiles at `out`: rows 0 to 15 of the first block and of the second, rows 16 to 31 likewise.
    """
    below = builder.add(weight, builder.mul(stride, I64(16)))
    both = builder.icmp_signed("!=", two, I64(0))
    with builder.if_else(both) as (then, otherwise):
        with then:
            bases = [weight, below, tokens, builder.add(tokens, block)]
            _advance(builder, _TWO, [*bases, steps], [stride, I64(64)])
            _keep(builder, out, range(4))
        with otherwise:
            _advance(builder, _ONE, [weight, below, tokens, steps], [stride, I64(64)])
            _keep(builder, out, (0, 2))


def _advance(builder: Any, text: str, changed: list[Any], fixed: list[Any]) -> None:
    results = ir.LiteralStructType([I64] * len(changed))
    ties = [str(i) for i in range(len(changed))]
    constraints = ",".join([*["=&r"] * len(changed), *["r"] * len(fixed), *ties])
    # Operands are numbered results first: the fixed ones follow them.
    _assemble(builder, text, constraints, results, [*fixed, *changed])


def _keep(builder: Any, out: Any, tiles: Any) -> None:
    for i in tiles:
        place = builder.add(out, I64(TILE * i))
        _assemble(builder, f"tilestored %tmm{i}, ($0,$1)", "r,r", ir.VoidType(), [place, I64(64)])


@emits()
def pack_tile(builder, x, stride, valid, packed):
    """64 bytes of each of 16 tokens' rows at `x` become a tile at `packed`."""
    rows = [builder.load(p, typ=INTS, align=2) for p in row_pointers(builder, x, stride, valid)]
    for pointer, line in zip(line_pointers(builder, packed), transposed(builder, rows), strict=True):
        builder.store(line, pointer, align=4)


def _unpack(exact: bool) -> Any:
    @emits()
    def unpack(builder, tile, out, stride, valid):
        """Write a tile, `out` by token, to the rows of up to 16 tokens at `out`."""
        rows = [builder.load(p, typ=INTS, align=4) for p in line_pointers(builder, tile)]
        values = transposed(builder, rows)
        # From the last: what the tokens that are none have is overwritten.
        for pointer, value in reversed(
            list(zip(row_pointers(builder, out, stride, valid), values, strict=True))
        ):
            builder.store(value if exact else rounded(builder, value), pointer, align=2)

    return unpack


unpack_float = _unpack(True)
unpack_bf16 = _unpack(False)


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def pack(table):
    """Every thread's way through the packing: a part is 16 tokens."""
    a = carray(table, (TABLE_SIZE,))
    stride = 2 * a[INNER]
    while True:
        part = draw(a.ctypes.data + 8 * NEXT)
        if part >= a[PARTS]:
            break
        valid = min(16, a[T] - 16 * part)
        source, packed = a[X] + 16 * part * stride, a[PACKED] + 16 * part * stride
        for step in range(a[INNER] // 32):
            pack_tile(source + 64 * step, stride, valid, packed + TILE * step)


@njit(error_model="numpy")
def _write(a, tiles, row, token):
    """Write two tiles below each other: 32 values of up to 16 tokens."""
    valid = min(16, a[T] - token)
    size = 4 if a[FLOAT] else 2
    stride = size * a[OUTER]
    out = a[OUT] + token * stride + size * row
    if a[FLOAT]:
        unpack_float(tiles, out, stride, valid)
        unpack_float(tiles + 2 * TILE, out + 64, stride, valid)
    else:
        unpack_bf16(tiles, out, stride, valid)
        unpack_bf16(tiles + 2 * TILE, out + 32, stride, valid)


@njit(error_model="numpy")
def _rows_product(a, weight, row, token, scratch):
    """ROWS rows of the weight at `weight` times up to 32 tokens."""
    stride = 2 * a[INNER]
    two = int(a[T] - token > 16)
    tokens = a[PACKED] + token * stride
    multiply(weight, stride, tokens, 16 * stride, two, a[INNER] // 32, scratch)
    _write(a, scratch, row, token)
    if two:
        _write(a, scratch + TILE, row, token + 16)


@njit(error_model="numpy")
def _chunk(a, part):
    scratch = a[SCRATCH] + 4 * TILE * part
    end = min(a[OUTER], (part + 1) * a[CHUNK])
    for token in range(0, a[T], 32):
        for row in range(part * a[CHUNK], end, ROWS):
            _rows_product(a, a[WEIGHT] + 2 * row * a[INNER], row, token, scratch)


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def product(table):
    """Every thread's way through a product: a part is CHUNK rows of the weight."""
    a = carray(table, (TABLE_SIZE,))
    configure(a[CONFIG])
    while True:
        part = draw(a.ctypes.data + 8 * NEXT)
        if part >= a[PARTS]:
            break
        _chunk(a, part)
    release()


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def packed_product(table):
    """The same with a packed weight: rows are unpacked once, for all tokens."""
    a = carray(table, (TABLE_SIZE,))
    configure(a[CONFIG])
    room = a[ROOM] + draw(a.ctypes.data + 8 * THREADS) * 2 * ROWS * a[INNER]
    while True:
        part = draw(a.ctypes.data + 8 * NEXT)
        if part >= a[PARTS]:
            break
        scratch = a[SCRATCH] + 4 * TILE * part
        for row in range(part * a[CHUNK], min(a[OUTER], (part + 1) * a[CHUNK]), ROWS):
            unpack_rows(a[WEIGHT], a[CODE], a[OUTER], a[INNER], a[FAR], row, row + ROWS, room)
            for token in range(0, a[T], 32):
                _rows_product(a, room, row, token, scratch)
    release()
