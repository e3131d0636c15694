"""The search: for every way to spread a model over a machine, the fastest placement of attention and experts.

A shape is a number of GPUs that share the model, how they share its experts, μ and n_ub. For each the
search decides how many micro-batches attend on the GPU, out of GPU memory or of a cache copied up, and how
many on the CPU; how many experts of each layer are resident, streamed, computed by the CPU, or read from
disk; and whether weights are pinned or staged. Shapes are ranked by a lower bound of their run time; the best
are searched exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.ir.model import Model
from moeplan.planner.strategies.common import PLATEAU, run_seconds, smallest_of_best
from moeplan.planner.strategies.offload_lanes import (
    Array,
    Costs,
    Lanes,
    Layout,
    Point,
    Shapes,
    Units,
    flat,
    take,
    unfilled,
)

Index = NDArray[np.intp]
Seconds = Callable[[Point], Array]

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 23, 26, 30, 34, 39, 45, 52, 64)
_MOST_LAYOUTS = 3000  # attention splits searched exactly, all shapes together
_FIRST = 100  # of them, by their bound, before the others are pruned by the best
_TRIES = np.linspace(0.0, 1.0, 9)  # of an interval, at once: 128 experts take three rounds
_KEPT_BYTES = 8 << 20


@dataclass(frozen=True)
class Sharing:
    """So many GPUs share a model, each with `whole` experts or a part of every one's width."""

    gpus: int
    whole: bool


def sharings(problem: Costs, most: int = 0) -> list[Sharing]:
    """How the machine's GPUs can share the model: by divisors of their number, or up to `most` GPUs."""
    gpus = problem.roofline.machine.gpus
    counts = range(1, most + 1) if most else (d for d in range(1, gpus + 1) if gpus % d == 0)
    ways = (Sharing(count, whole) for count in counts for whole in (False, True)[: 1 + (count > 1)])
    return [way for way in ways if can_share(problem.workload.model, way)]


def can_share(model: Model, way: Sharing) -> bool:
    """Whether each of the GPUs gets as many heads, and as much of every width or as many experts, as the
    others.

    Heads of keys and values may be fewer, and are copied then. A latent cache has no heads to share.
    """
    heads, kv_heads, gpus = model.attention.heads, model.attention.kv_heads, way.gpus
    if model.attention.kind == "mla":
        return gpus == 1
    experts = model.experts if way.whole else model.expert_intermediate
    parts = (heads, experts, model.dense_intermediate, model.shared_intermediate)
    return not any(part % gpus for part in parts) and 0 in (kv_heads % gpus, gpus % kv_heads)


def every_shape(
    problem: Costs,
    ways: Sequence[Sharing],
    counts: Sequence[int] = MICRO_BATCHES,
    most_sequences: float = np.inf,
) -> Units:
    """Every way to share with every μ and each n_ub of `counts`, of no more than so many sequences."""
    gpus, whole = (np.array([getattr(w, name) for w in ways])[:, None, None] for name in ("gpus", "whole"))
    micro, count = np.array(MICRO_BATCH_SIZES, dtype=float)[:, None], np.array(counts, dtype=float)
    units = problem.units(Shapes(gpus.astype(float), whole, micro, count))
    return flat(units, (micro * count <= most_sequences) & np.ones_like(whole))


def fastest(problem: Costs, units: Units) -> Point | None:
    """The fastest point of all shapes for a batch class, on a plateau the one with the fewest sequences;
    None where nothing fits."""

    def seconds(point: Point) -> Array:
        return batch_seconds(problem, point)

    _keep_freed_memory()
    layout = _promising(problem, units)
    bounds, times = bound(problem, layout)
    order = np.argsort(bounds, kind="stable")[: np.isfinite(bounds).sum()]
    if not order.size:
        return None
    counts, open_ones = np.zeros_like(times), order[:0]
    for some in np.split(order, [_FIRST]):
        near = some[bounds[some] <= times.min() / (1.0 - PLATEAU)]
        counts[near], times[near] = best_cpu_experts(
            problem, take(layout, near), problem.decode_lanes, seconds, times[near]
        )
        open_ones = np.concatenate([open_ones, near])
    sequences = layout.units.micro_batch * layout.units.micro_batches
    best = open_ones[[smallest_of_best(1.0 / times[open_ones], sequences[open_ones])]]
    return problem.point(take(layout, best), counts[best])


def _keep_freed_memory() -> None:
    """Have the C library keep what arrays free, or a fifth of a search over eight GPUs goes to page faults.

    glibc maps blocks of 128 KiB or more and gives them back once freed. To free one raises that limit to its
    size, and what is kept of other blocks to twice that (mallopt(3), M_MMAP_THRESHOLD).
    """
    np.empty(_KEPT_BYTES, dtype=np.uint8)


def _promising(problem: Costs, units: Units) -> Layout:
    """All attention splits of the shapes with the lowest bounds, as many as can be searched."""
    on_gpu = most_on_gpu(problem, units)
    least = bound(problem, extremes(problem, units, on_gpu))[0].min(axis=(0, 1, 2))
    size = units.micro_batch * units.micro_batches
    on_plateau = np.where(least <= least.min() * (1.0 + PLATEAU), size, np.inf)
    order = np.lexsort((least, on_plateau))
    order = order[np.isfinite(least[order])]
    count = units.micro_batches[order]
    room = np.cumsum((count + 1) * (count + 2)) <= _MOST_LAYOUTS
    room[:1] = True
    return every_split(problem, take(units, order[room]), on_gpu[order[room]])


def extremes(problem: Costs, units: Units, most: Array) -> Layout:
    """Attention on the GPU for the `most` micro-batches that memory holds or for none, the rest on the CPU or
    copied up, experts streamed or not. Its arrays broadcast to [not streamed, copied up, on the GPU, shapes].
    """
    yes = np.array([0.0, 1.0])[:, None]
    on_gpu = yes * most
    cache_up = yes[:, None] * (units.micro_batches - on_gpu)
    return problem.layout(units, on_gpu, cache_up, yes[:, None, None] == 0)


def most_on_gpu(problem: Costs, units: Units) -> Array:
    """The most micro-batches whose cache GPU memory holds, experts aside."""
    none = np.zeros_like(units.gpus)
    free = problem.free_gpu_bytes(unfilled(units, none, none, none > 0))
    return np.clip(np.floor(free / units.longest_cache_bytes), 0.0, units.micro_batches)


def every_split(problem: Costs, units: Units, most: Array) -> Layout:
    """Every split of every shape's micro-batches, `most` on the GPU, with experts streamed and not."""
    splits = [_splits(int(count)) for count in units.micro_batches]
    shape = np.repeat(np.arange(len(splits)), [len(split) for split in splits])
    on_gpu, cache_up, streams = np.concatenate([*splits, np.zeros((0, 3))]).T
    fits = on_gpu <= most[shape]
    return problem.layout(take(units, shape[fits]), on_gpu[fits], cache_up[fits], streams[fits] > 0)


@lru_cache
def _splits(count: int) -> Array:
    """[(on GPU, copied up, streams)] of `count` micro-batches."""
    on_gpu, cache_up, streams = np.indices((count + 1, count + 1, 2)).reshape(3, -1)
    whole = on_gpu + cache_up <= count
    return np.stack([on_gpu[whole], cache_up[whole], streams[whole]], axis=1).astype(float)


def batch_seconds(problem: Costs, point: Point) -> Array:
    """Seconds for all requests of a batch class; infinite where a point does not fit."""
    prefill_s = problem.pass_s(point, problem.prefill_lanes(point, point.units.prompts))
    return _requests_s(problem, point, prefill_s, problem.pass_s(point, problem.decode_lanes(point)))


def _requests_s(problem: Costs, point: Point, prefill_s: Array, decode_s: Array) -> Array:
    seconds = run_seconds(problem.requests, point.sequences, prefill_s, decode_s)
    return np.where(point.feasible, seconds, np.inf)


def bound(problem: Costs, layout: Layout) -> tuple[Array, Array]:
    """A lower bound of `batch_seconds` over every share of experts on the CPU, and those of none there.

    An expert outside the GPU takes time of the CPU or of the link, and any expert of the CPU or of the GPU.
    Both end no earlier than they would together if experts could be divided.
    """
    none = problem.point(layout, np.zeros_like(layout.on_gpu))
    lanes = problem.decode_lanes(none)
    on_cpu, u = lanes["cpu"], layout.units
    linked = _balanced(lanes["h2d"], problem.outside_link_s(none), on_cpu, problem.outside_cpu_s(none))
    computed = _balanced(lanes["gpu"], u.gpu_experts_s, on_cpu, u.cpu_experts_s)
    least = reduce(np.maximum, [linked, computed, lanes["d2h"], lanes["disk"]])
    decode_s = problem.pass_s(none, lanes)
    least_s = np.where(layout.streams, least, decode_s)
    prefill_s = problem.pass_s(none, problem.prefill_lanes(none, u.prompts))
    bounds, times = (_requests_s(problem, none, prefill_s, s) for s in (least_s, decode_s))
    return bounds, times


def _balanced(one: Array, movable: Array, other: Array, moved: Array) -> Array:
    """The least that the longer of two lanes takes where any part of `movable` seconds of the one may become
    that part of `moved` seconds of the other."""
    share = np.clip((one - other) / np.maximum(movable + moved, 1e-12), 0.0, 1.0)
    return np.maximum(other + share * moved, one - share * movable)


def best_cpu_experts(
    problem: Costs, layout: Layout, lanes: Callable[[Point], Lanes], seconds: Seconds, none_s: Array
) -> tuple[Array, Array]:
    """For each candidate the number of experts on the CPU that takes least time, and its seconds.

    Where nothing streams there is no choice. Else time is convex in that number, counted as they are dealt,
    from 1 on (each lane is a line or bends upwards); at 0, which takes `none_s`, the routed hidden states'
    way to the CPU falls away. Numbers at which `lanes` balance are tried first.
    """
    free = np.flatnonzero(layout.streams)
    if not free.size:
        return np.zeros_like(none_s), none_s
    streaming, dealt = take(layout, free), layout.units.dealt[free]

    def seconds_of(which: Index, counts: Array) -> Array:
        return seconds(problem.point(take(streaming, which), dealt[which] * counts))

    most, expected = problem.workload.model.experts / dealt, _where_lanes_balance(problem, streaming, lanes)
    some, some_s = lowest_point(seconds_of, np.ones_like(dealt), most, expected)
    counts, times = np.zeros_like(none_s), none_s.copy()
    counts[free] = np.where(some_s < none_s[free], dealt * some, 0.0)
    times[free] = np.minimum(some_s, none_s[free])
    return counts, times


def _where_lanes_balance(problem: Costs, layout: Layout, lanes: Callable[[Point], Lanes]) -> Array:
    """About how many experts on the CPU, as they are dealt, make the sum of squares of the lanes least.

    Each lane is taken as a line until all that is not resident is on the CPU, and as another one from there.
    """
    dealt, experts = layout.units.dealt, problem.workload.model.experts
    one, most = np.ones_like(dealt), experts / dealt
    ends = np.stack([one, np.clip((experts - layout.most_resident) / dealt, 1.0, most), most])
    found = lanes(problem.point(layout, dealt * ends)).values()
    at = np.stack([np.broadcast_to(lane, ends.shape) for lane in found])
    start, rise = at[:, :-1], np.diff(at, axis=1)
    steepness = np.maximum((rise**2).sum(axis=0), 1e-300)
    part = np.clip(-(start * rise).sum(axis=0) / steepness, 0.0, 1.0)
    least = ((start + part * rise) ** 2).sum(axis=0)
    first, second = np.ceil(ends[:-1] + part * np.diff(ends, axis=0) - 0.5)
    return np.asarray(np.where(least[0] <= least[1], first, second))


def lowest_point(
    values: Callable[[Index, Array], Array], low: Array, high: Array, expected: Array
) -> tuple[Array, Array]:
    """Per element, the first whole number from `low` to `high` at which a convex function is least, and its
    value there.

    `values` maps some elements and [tries, these] numbers to values there. The neighbours of `expected` are
    tried first, then numbers at equal distances: the least is between the neighbours of the best.
    """
    low, high, least, which = low.copy(), high.copy(), np.zeros_like(low), np.arange(len(low))
    tried = np.clip(np.clip(expected, low, high) + np.array([[-1.0], [0.0], [1.0]]), low, high)
    while which.size:
        found = values(which, tried)
        least[which], best = found.min(axis=0), found.argmin(axis=0)
        ends = np.concatenate([[low[which] - 1], tried, [high[which] + 1]])
        before, at, after = np.take_along_axis(ends, best + np.array([[0], [1], [2]]), axis=0)
        low[which], high[which] = np.minimum(before + 1, at), np.maximum(after - 1, at)
        which = np.flatnonzero(low < high)
        tried = np.floor(low[which] + (high - low)[which] * _TRIES[:, None])
    return low, least
