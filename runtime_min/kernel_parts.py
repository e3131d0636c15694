# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""What compiled kernels share. Imported only where Numba is."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import extending, types
from numba.core import cgutils

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, POINTER = ir.FloatType(), ir.PointerType()
INTS, FLOATS = ir.VectorType(I32, 16), ir.VectorType(F32, 16)

intrinsic: Any = extending.intrinsic  # its calls lack the first parameter of its definitions


def emits(result: Any = types.void, **kinds: Any) -> Any:
    """Make an intrinsic of a function that builds its instructions; it takes int64, or what `kinds` says of a
    parameter, and returns a `result`."""

    def intrinsic_of(build: Any) -> Any:
        _, *names = inspect.signature(build).parameters
        signature = result(*[kinds.get(name, types.int64) for name in names])

        @intrinsic
        @functools.wraps(build)
        def definition(typingctx, *given):
            def codegen(context, builder, signature, args):
                built = build(builder, *args)
                return context.get_dummy_value() if result is types.void else built

            return signature, codegen

        return definition

    return intrinsic_of


@emits(types.int64)
def draw(builder, address):
    """The count at `address`, then raised by one; atomic."""
    return builder.atomic_rmw("add", builder.inttoptr(address, POINTER), I64(1), "seq_cst")


def pointer_at(builder: Any, base: Any, offset: Any = None) -> Any:
    """The pointer `offset` bytes behind the address `base`."""
    address = base if offset is None else builder.add(base, offset)
    return builder.inttoptr(address, POINTER)


def widened_pairs(builder: Any, pairs: Any) -> list[Any]:
    """The even and the odd ones of bf16 neighbours, of which a vector of int32 holds pairs, as float32."""
    lanes = pairs.type.count
    even = builder.shl(pairs, ir.Constant(pairs.type, [16] * lanes))
    odd = builder.and_(pairs, ir.Constant(pairs.type, [-65536] * lanes))
    return [builder.bitcast(half, ir.VectorType(F32, lanes)) for half in (even, odd)]


def fetch(builder: Any, address: Any) -> None:
    """Ask for the line at `address`, for what lies where no hardware foresees it."""
    kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer_at(builder, address), I32(0), I32(3), I32(1)])


def splat(builder: Any, value: Any, count: int = 16) -> Any:
    """A vector of `count` times the value."""
    kind = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, count), [0] * count))


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c of vectors of float32, rounded once."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{a.type.count}f32")
    return builder.call(function, [a, b, c])


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16: element i of vector j becomes element j of vector i."""
    for distance in (8, 4, 2, 1):
        low = [k if not k & distance else 16 + k - distance for k in range(16)]
        high = [k + distance if not k & distance else 16 + k for k in range(16)]
        swapped = list(rows)
        for i in range(16):
            if not i & distance:
                pair = rows[i], rows[i + distance]
                swapped[i] = builder.shuffle_vector(*pair, ir.Constant(INTS, low))
                swapped[i + distance] = builder.shuffle_vector(*pair, ir.Constant(INTS, high))
        rows = swapped
    return rows


def transposed_sum(builder: Any, vectors: list[Any]) -> Any:
    """One vector whose element i is the sum of the elements of vectors[i], of as many as there are lanes."""
    lanes = len(vectors)
    half = lanes // 2
    indices = ir.VectorType(I32, lanes)
    while len(vectors) > 1:
        count, merged = len(vectors) // 2, []
        for i in range(count):
            a, b = vectors[i], vectors[i + count]
            # Lanes with the bit `half` unset keep a's sums, those with it b's.
            low = [lane if not lane & half else lanes + lane - half for lane in range(lanes)]
            high = [lane + half if not lane & half else lanes + lane for lane in range(lanes)]
            merged.append(
                builder.fadd(
                    builder.shuffle_vector(a, b, ir.Constant(indices, low)),
                    builder.shuffle_vector(a, b, ir.Constant(indices, high)),
                )
            )
        vectors, half = merged, half // 2
    return vectors[0]


def row_pointers(builder: Any, base: Any, stride: Any, valid: Any) -> list[Any]:
    """Pointers to 16 rows `stride` bytes apart; those beyond `valid` are the last valid one again."""
    last = builder.sub(valid, I64(1))
    numbers = [builder.select(builder.icmp_signed("<", I64(i), last), I64(i), last) for i in range(16)]
    return [builder.inttoptr(builder.add(base, builder.mul(n, stride)), POINTER) for n in numbers]


def line_pointers(builder: Any, base: Any) -> list[Any]:
    """Pointers to 16 lines of 64 bytes."""
    return [builder.inttoptr(builder.add(base, I64(64 * i)), POINTER) for i in range(16)]


def rounded(builder: Any, bits: Any) -> Any:
    """Float32 rounded to the nearest bf16, ties to even."""
    odd = builder.and_(builder.lshr(bits, ir.Constant(INTS, [16] * 16)), ir.Constant(INTS, [1] * 16))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(INTS, [0x7FFF] * 16)))
    return builder.trunc(builder.lshr(rounded, ir.Constant(INTS, [16] * 16)), ir.VectorType(I16, 16))
