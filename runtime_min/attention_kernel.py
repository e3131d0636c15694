# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The compiled side of decode_attention: what Numba and LLVM make of it. Imported only where Numba is.

Vectors are of LANES float32, as many as a register holds. A row of a bf16 cache is read two vectors at a
time, the even values and the odd ones, which takes one operation each; queries and sums are kept in that
order. Those of an int8 cache are read four at a time, and a row's scale multiplies its score, or its weight.
G query heads of D values share keys.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import carray, cfunc, njit, types  # type: ignore[attr-defined]
from numba.core import cgutils

from moeplan.runtime_min.kernel_parts import (
    F32,
    I32,
    I64,
    draw,
    emits,
    fetch,
    fma,
    pointer_at,
    splat,
    transposed_sum,
    widened_pairs,
)

# AVX-512 has 32 registers of 16 floats, other CPUs 16 of eight. LANES of them hold scores of SCORING heads
# under way, or sums of WEIGHING heads: enough for one addition not to wait for another.
_WIDE = bool(binding.get_host_cpu_features().get("avx512f"))
LANES, SCORING, WEIGHING = (16, 1, 4) if _WIDE else (8, 2, 4)
LINE, ROW = 4 * LANES, 64  # bytes that a step takes of a row, and that rows are multiples of
WHOLE = ROW // LINE
KEYS = LANES  # whose scores are one vector
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)

# The table of a call. SCRATCH: of each part G * (2 D + block_tokens + 2) + 2 * G * (D + 2) floats.
NEXT, DONE, PARTS, Q, K, V, TABLES, TABLE_STRIDE, LENGTHS, B = range(10)
VALUE_HEADS, G, D, BLOCK_TOKENS, WIDTH, OUT, SCRATCH, OPEN = range(10, 18)  # WIDTH: a line's vectors
STARTS, SINKS, K_SCALES, V_SCALES, TABLE_SIZE = range(18, 23)  # addresses, 0 where there are none
FLOAT, BF16, INT8 = 1, 2, 4


def _line(builder: Any, pointer: Any, width: int) -> list[Any]:
    """LINE bytes of a row as `width` vectors of float32."""
    if width == FLOAT:
        return [builder.load(pointer, typ=FLOATS, align=4)]
    if width == INT8:
        start = builder.ptrtoint(pointer, I64)
        parts = [
            builder.load(pointer_at(builder, start, I64(at)), typ=_BYTES, align=1)
            for at in range(0, LINE, LANES)
        ]
        return [builder.sitofp(builder.sext(part, INTS), FLOATS) for part in parts]
    return widened_pairs(builder, builder.load(pointer, typ=INTS, align=2))


def _each_width(builder: Any, width: Any, emit: Any) -> None:
    """What `emit` emits for the width of the cache at hand."""
    for known in (FLOAT, BF16, INT8):
        with builder.if_then(builder.icmp_signed("==", width, I64(known))):
            emit(known)


def _products(
    builder: Any, width: int, q: Any, q_stride: Any, k: Any, lines: Any, ahead: Any, sums: Any
) -> None:
    """Of each head and as many rows at k: vectors whose elements' sum is the product, to `sums`."""
    for total in itertools.chain(*sums):
        builder.store(ir.Constant(FLOATS, [0.0] * LANES), total)
    row_bytes = builder.mul(lines, I64(LINE))
    with cgutils.for_range(builder, builder.udiv(lines, I64(WHOLE))) as loop:
        first = builder.add(k, builder.mul(loop.index, I64(ROW)))
        rows = [builder.add(first, builder.mul(row_bytes, I64(i))) for i in range(len(sums[0]))]
        for row in rows:
            fetch(builder, builder.add(row, ahead))
        start = builder.add(q, builder.mul(loop.index, I64(ROW * width)))
        heads = [builder.add(start, builder.mul(q_stride, I64(g))) for g in range(len(sums))]
        for line in range(0, ROW, LINE):
            queries = [_vectors(builder, head, line * width, width) for head in heads]
            for i, row in enumerate(rows):
                parts = _line(builder, pointer_at(builder, row, I64(line)), width)
                for query, totals in zip(queries, sums, strict=True):
                    value = builder.load(totals[i])
                    for a, b in zip(parts, query, strict=True):
                        value = fma(builder, a, b, value)
                    builder.store(value, totals[i])


def _vectors(builder: Any, base: Any, offset: int, count: int) -> list[Any]:
    """`count` vectors of float32 from `offset` bytes behind `base` on."""
    places = [pointer_at(builder, base, I64(offset + LINE * part)) for part in range(count)]
    return [builder.load(place, typ=FLOATS, align=4) for place in places]


def _scores(heads: int) -> Any:
    at_once = LANES // heads  # keys

    @emits(scale=types.float32)
    def scores(builder, width, q, q_stride, k, lines, scale, out, stride, ahead):
        """out[g, i] = scale * (q[g] · k[i]) for the KEYS rows at k; q[g] lie `q_stride` bytes apart, out[g]
        `stride`. Fetches the rows `ahead` bytes further on."""
        sums = [[cgutils.alloca_once(builder, FLOATS) for _ in range(KEYS)] for _ in range(heads)]
        row_bytes = builder.mul(lines, I64(LINE))

        def products(known):
            for first in range(0, KEYS, at_once):
                rows = builder.add(k, builder.mul(row_bytes, I64(first)))
                some = [totals[first : first + at_once] for totals in sums]
                _products(builder, known, q, q_stride, rows, lines, ahead, some)

        _each_width(builder, width, products)
        for g, totals in enumerate(sums):
            found = transposed_sum(builder, [builder.load(total) for total in totals])
            place = pointer_at(builder, out, builder.mul(stride, I64(g)))
            builder.store(builder.fmul(found, splat(builder, scale, LANES)), place, align=4)

    return scores


def _weighed(builder, width, heads, p, stride, v, count, lines, sums, ahead):
    """What `_weigh` makes, for one width: a few vectors of each head at once, from key to key."""
    vectors = width * (WHOLE if width * heads * WHOLE <= LANES else 1)  # of each head
    row_bytes = builder.mul(lines, I64(LINE))
    head_bytes = builder.mul(lines, I64(LINE * width))
    with cgutils.for_range(builder, builder.udiv(lines, I64(vectors // width))) as step:
        places = []
        for g in range(heads):
            start = builder.add(sums, builder.mul(head_bytes, I64(g)))
            start = builder.add(start, builder.mul(step.index, I64(LINE * vectors)))
            places += [pointer_at(builder, start, I64(LINE * part)) for part in range(vectors)]
        totals = [cgutils.alloca_once(builder, FLOATS) for _ in places]
        for place, total in zip(places, totals, strict=True):
            builder.store(builder.load(place, typ=FLOATS, align=4), total)
        first = builder.add(v, builder.mul(step.index, I64(LINE * vectors // width)))
        with cgutils.for_range(builder, count) as key:
            row = builder.add(first, builder.mul(key.index, row_bytes))
            fetch(builder, builder.add(row, ahead))
            parts = []
            for at in range(0, vectors // width * LINE, LINE):
                parts += _line(builder, pointer_at(builder, row, I64(at)), width)
            for g in range(heads):
                index = builder.add(builder.mul(stride, I64(g)), key.index)
                weight = builder.load(pointer_at(builder, p, builder.mul(index, I64(4))), typ=F32, align=4)
                weights = splat(builder, weight, LANES)
                for total, part in zip(totals[g * vectors : (g + 1) * vectors], parts, strict=True):
                    builder.store(fma(builder, weights, part, builder.load(total)), total)
        for place, total in zip(places, totals, strict=True):
            builder.store(builder.load(total), place, align=4)


def _weigh(heads: int) -> Any:
    @emits()
    def weigh(builder, width, p, stride, v, count, lines, sums, ahead):
        """sums[g] += p[g, i] * v[i] over `count` rows at v; p[g] lie `stride` floats apart.

        Fetches the rows `ahead` bytes further on.
        """

        def weighed(known):
            _weighed(builder, known, heads, p, stride, v, count, lines, sums, ahead)

        _each_width(builder, width, weighed)

    return weigh


def _exp(builder: Any, x: Any) -> Any:
    """e^x for x <= 0, to about 2e-7: 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor series."""
    unary = ir.FunctionType(FLOATS, [FLOATS])
    rint = cgutils.get_or_insert_function(builder.module, unary, f"llvm.rint.v{LANES}f32")
    binary = ir.FunctionType(FLOATS, [FLOATS, FLOATS])
    maximum = cgutils.get_or_insert_function(builder.module, binary, f"llvm.maxnum.v{LANES}f32")

    def constant(value: float) -> Any:
        return ir.Constant(FLOATS, [value] * LANES)

    x = builder.call(maximum, [x, constant(-87.0)])
    n = builder.call(rint, [builder.fmul(x, constant(1.4426950408889634))])
    r = fma(builder, n, constant(-0.693145751953125), x)  # ln 2 in two parts
    r = fma(builder, n, constant(-1.428606820309417e-06), r)
    y = constant(1 / 720)
    for factor in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0):
        y = fma(builder, y, r, constant(factor))
    exponent = builder.shl(builder.fptosi(n, INTS), ir.Constant(INTS, [23] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(y, INTS), exponent), FLOATS)


@emits(types.float32, top=types.float32)
def exponentials(builder, scores, top):
    """The KEYS floats at scores become e^(score - top); returns their sum."""
    place = pointer_at(builder, scores)
    x = builder.fsub(builder.load(place, typ=FLOATS, align=4), splat(builder, top, LANES))
    y = _exp(builder, x)
    builder.store(y, place, align=4)
    kind = ir.FunctionType(F32, [F32, FLOATS])
    add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(add, [ir.Constant(F32, 0.0), y], fastmath=("reassoc",))


@emits(types.float32)
def maximum(builder, scores):
    """The greatest of the KEYS floats at scores."""
    kind = ir.FunctionType(F32, [FLOATS])
    top = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fmax.v{LANES}f32")
    return builder.call(top, [builder.load(pointer_at(builder, scores), typ=FLOATS, align=4)])


def _pointer(kind: Any, held: Any) -> Any:
    @emits(types.CPointer(kind))
    def pointer(builder, address):
        return builder.inttoptr(address, held.as_pointer())

    return pointer


floats_at, ints_at = _pointer(types.float32, F32), _pointer(types.int32, I32)
longs_at = _pointer(types.int64, I64)
score_one, score_some, weigh_one, weigh_some = _scores(1), _scores(SCORING), _weigh(1), _weigh(WEIGHING)


@njit(error_model="numpy")
def _place(d, width):
    """Where value d of a head stands in a query or a sum."""
    pair = 2 * LANES
    return d // pair * pair + d % 2 * LANES + d % pair // 2 if width == BF16 else d


@njit(error_model="numpy")
def _score_block(a, q, keys, count, scores, ahead):
    """The scores of a block's `count` keys for all heads, the rest of a vector -inf."""
    g_count, size, tokens, width = a[G], a[D], a[BLOCK_TOKENS], a[WIDTH]
    lines = size // (LANES * width)
    scale = types.float32(1.0) / types.float32(size) ** types.float32(0.5)
    vectors = (count + KEYS - 1) // KEYS
    values = carray(floats_at(scores), (g_count * tokens,))
    for i in range(vectors):
        rows = keys + i * KEYS * lines * LINE
        g = 0
        while g < g_count:
            out, query = scores + 4 * (g * tokens + i * KEYS), q + 4 * g * size
            further = 0 if g else ahead
            if g + SCORING <= g_count:
                score_some(width, query, 4 * size, rows, lines, scale, out, 4 * tokens, further)
                g += SCORING
            else:
                score_one(width, query, 4 * size, rows, lines, scale, out, 4 * tokens, further)
                g += 1
    for g in range(g_count):
        for t in range(count, vectors * KEYS):
            values[g * tokens + t] = -3.0e38


@njit(error_model="numpy")
def _multiply(a, scales, count, scores):
    """The scores, or the weights, of a block's keys times the scales of their rows."""
    values = carray(floats_at(scores), (a[G] * a[BLOCK_TOKENS],))
    factors = carray(floats_at(scales), (a[BLOCK_TOKENS],))
    for g in range(a[G]):
        for t in range(count):
            values[g * a[BLOCK_TOKENS] + t] *= factors[t]


@njit(error_model="numpy")
def _hide(a, begin, scores):
    """Keys before `begin` of a block get no weight."""
    values = carray(floats_at(scores), (a[G] * a[BLOCK_TOKENS],))
    for g in range(a[G]):
        for t in range(begin):
            values[g * a[BLOCK_TOKENS] + t] = -3.0e38


@njit(error_model="numpy")
def _soften(a, count, scores, tops, totals, sums):
    """Scores become weights against the greatest so far; what was summed before is scaled to it."""
    size, tokens = a[D], a[BLOCK_TOKENS]
    vectors = (count + KEYS - 1) // KEYS
    for g in range(a[G]):
        row = scores + 4 * g * tokens
        top = tops[g]
        for i in range(vectors):
            top = max(top, maximum(row + 4 * KEYS * i))
        if top > tops[g]:
            shrink = _shrink(tops[g] - top)
            totals[g] *= shrink
            for d in range(g * size, (g + 1) * size):
                sums[d] *= shrink
            tops[g] = top
        for i in range(vectors):
            totals[g] += exponentials(row + 4 * KEYS * i, top)


@njit(error_model="numpy")
def _shrink(x):
    """e^x for x <= 0."""
    return types.float32(0.0) if x < -87.0 else types.float32(math.exp(x))


@njit(error_model="numpy")
def _weigh_block(a, values, count, scores, sums, ahead):
    """Add the block's `count` values, weighted, to the sums of all heads."""
    size, tokens, width = a[D], a[BLOCK_TOKENS], a[WIDTH]
    lines = size // (LANES * width)
    g = 0
    while g < a[G]:
        p, to = scores + 4 * g * tokens, sums + 4 * g * size
        further = 0 if g else ahead
        if g + WEIGHING <= a[G]:
            weigh_some(width, p, tokens, values, count, lines, to, further)
            g += WEIGHING
        else:
            weigh_one(width, p, tokens, values, count, lines, to, further)
            g += 1


@njit(error_model="numpy")
def _first_after(a, sequence, head):
    """The run of the first block that comes after those of a sequence and key head."""
    if head + 1 == a[VALUE_HEADS] and sequence + 1 < a[B]:
        sequence, head = sequence + 1, -1
    first = carray(ints_at(a[TABLES] + 4 * sequence * a[TABLE_STRIDE]), (1,))[0]
    return first * a[VALUE_HEADS] + min(head + 1, a[VALUE_HEADS] - 1)


@njit(error_model="numpy")
def _piece(a, sequence, head, first, last, space):
    """Blocks first..last of one sequence and key head; leaves tops, totals and sums in `space`."""
    g_count, size, tokens = a[G], a[D], a[BLOCK_TOKENS]
    tops = carray(floats_at(space), (g_count,))
    totals = carray(floats_at(space + 4 * g_count), (g_count,))
    sums_at = space + 8 * g_count
    q_at = sums_at + 4 * g_count * size
    scores_at = q_at + 4 * g_count * size
    sums = carray(floats_at(sums_at), (g_count * size,))
    q = carray(floats_at(q_at), (g_count * size,))
    given = carray(
        floats_at(a[Q] + 4 * (sequence * a[VALUE_HEADS] + head) * g_count * size), (g_count * size,)
    )
    table = carray(ints_at(a[TABLES] + 4 * sequence * a[TABLE_STRIDE]), (last,))
    length = carray(longs_at(a[LENGTHS]), (a[B],))[sequence]
    for g in range(g_count):
        tops[g], totals[g] = -3.0e38, 0.0
        for d in range(size):
            q[g * size + _place(d, a[WIDTH])] = given[g * size + d]
    sums[:] = 0.0
    begin = carray(longs_at(a[STARTS]), (a[B],))[sequence] if a[STARTS] else 0
    after = _first_after(a, sequence, head)
    bytes_ = tokens * size * 4 // a[WIDTH]
    for block in range(first, last):
        count = min(tokens, length - block * tokens)
        run = table[block] * a[VALUE_HEADS] + head
        offset = run * bytes_
        following = table[block + 1] * a[VALUE_HEADS] + head if block + 1 < last else after
        ahead = following * bytes_ - offset
        _score_block(a, q_at, a[K] + offset, count, scores_at, ahead)
        if a[K_SCALES]:
            _multiply(a, a[K_SCALES] + 4 * run * tokens, count, scores_at)
        if block == 0 and begin > 0:
            _hide(a, begin, scores_at)
        _soften(a, count, scores_at, tops, totals, sums)
        if a[V_SCALES]:
            _multiply(a, a[V_SCALES] + 4 * run * tokens, count, scores_at)
        _weigh_block(a, a[V] + offset, count, scores_at, sums_at, ahead)


@njit(error_model="numpy")
def _finish(a, sequence, head, tops, totals, sums):
    g_count, size = a[G], a[D]
    out = carray(
        floats_at(a[OUT] + 4 * (sequence * a[VALUE_HEADS] + head) * g_count * size), (g_count * size,)
    )
    for g in range(g_count):
        total = totals[g] + _sink(a, head * g_count + g, tops[g])
        for d in range(size):
            out[g * size + d] = sums[g * size + _place(d, a[WIDTH])] / total


@njit(error_model="numpy")
def _sink(a, query, top):
    """The weight of a query head's sink against the greatest score."""
    if not a[SINKS]:
        return types.float32(0.0)
    sinks = carray(floats_at(a[SINKS]), (a[VALUE_HEADS] * a[G],))
    return types.float32(math.exp(min(sinks[query] - top, types.float32(87.0))))


@njit(error_model="numpy")
def _join(a):
    """Complete the heads of which several parts hold a share. Shares lie in order of the parts."""
    g_count, size = a[G], a[D]
    share = 2 * g_count + g_count * size
    opened = carray(longs_at(a[OPEN]), (2 * a[PARTS],))
    base = a[SCRATCH] + 4 * a[PARTS] * _space(a)
    before = -1
    for i in range(2 * a[PARTS]):
        item = opened[i]
        if item < 0:
            continue
        tops = carray(floats_at(base + 4 * i * share), (g_count,))
        totals = carray(floats_at(base + 4 * (i * share + g_count)), (g_count,))
        sums = carray(floats_at(base + 4 * (i * share + 2 * g_count)), (g_count * size,))
        if before >= 0 and opened[before] == item:
            tops0 = carray(floats_at(base + 4 * before * share), (g_count,))
            totals0 = carray(floats_at(base + 4 * (before * share + g_count)), (g_count,))
            sums0 = carray(floats_at(base + 4 * (before * share + 2 * g_count)), (g_count * size,))
            for g in range(g_count):
                top = max(tops[g], tops0[g])
                mine, theirs = _shrink(tops[g] - top), _shrink(tops0[g] - top)
                tops[g], totals[g] = top, totals[g] * mine + totals0[g] * theirs
                for d in range(g * size, (g + 1) * size):
                    sums[d] = sums[d] * mine + sums0[d] * theirs
        before = i
        _finish(a, item // a[VALUE_HEADS], item % a[VALUE_HEADS], tops, totals, sums)


@njit(error_model="numpy")
def _space(a):
    """Floats of scratch that a part works in."""
    return a[G] * (2 * a[D] + a[BLOCK_TOKENS] + 2)


@njit(error_model="numpy")
def _blocks(a, length):
    """How many hold so many tokens."""
    return (length + a[BLOCK_TOKENS] - 1) // a[BLOCK_TOKENS]


@njit(error_model="numpy")
def _part(a, part):
    """The blocks of one part: an equal share of all, counted sequence by sequence and head by head."""
    lengths = carray(longs_at(a[LENGTHS]), (a[B],))
    total = 0
    for sequence in range(a[B]):
        total += _blocks(a, lengths[sequence]) * a[VALUE_HEADS]
    begin, end = part * total // a[PARTS], (part + 1) * total // a[PARTS]
    opened = carray(longs_at(a[OPEN]), (2 * a[PARTS],))
    opened[2 * part] = opened[2 * part + 1] = -1
    space = a[SCRATCH] + 4 * part * _space(a)
    share = 2 * a[G] + a[G] * a[D]
    kept = 0
    start = 0
    for sequence in range(a[B]):
        blocks = _blocks(a, lengths[sequence])
        if start + blocks * a[VALUE_HEADS] <= begin:
            start += blocks * a[VALUE_HEADS]
            continue
        if start >= end:
            break
        for head in range(a[VALUE_HEADS]):
            first, last = max(begin - start, 0), min(end - start, blocks)
            start += blocks
            if first >= last:
                continue
            _piece(a, sequence, head, first, last, space)
            whole = carray(floats_at(space), (share,))
            if first == 0 and last == blocks:
                _finish(a, sequence, head, whole[: a[G]], whole[a[G] : 2 * a[G]], whole[2 * a[G] :])
                continue
            i = 2 * part + kept
            kept += 1
            opened[i] = sequence * a[VALUE_HEADS] + head
            to = carray(floats_at(a[SCRATCH] + 4 * (a[PARTS] * _space(a) + i * share)), (share,))
            to[:] = whole


@cfunc(types.void(types.CPointer(types.int64)), cache=True, error_model="numpy")
def attend(table):
    """Every thread's way through a call: parts as long as there are any; the last to finish joins."""
    a = carray(table, (TABLE_SIZE,))
    address = a.ctypes.data
    while True:
        part = draw(address + 8 * NEXT)
        if part >= a[PARTS]:
            break
        _part(a, part)
        if draw(address + 8 * DONE) == a[PARTS] - 1:
            _join(a)
