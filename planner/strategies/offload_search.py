"""The search: for every way to spread a model over a machine, the fastest placement of attention and experts.

A shape is a number of GPUs that share the model, how they share its experts, μ and n_ub. For each the
search decides how many micro-batches attend on the GPU, out of GPU memory or of a cache copied up, and how
many on the CPU; how many experts of each layer are resident, streamed, computed by the CPU, or read from
disk; and whether weights are pinned or staged. Shapes are ranked by a lower bound of their run time; the best
are searched exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.ir.model import Model
from moeplan.planner.strategies.common import PLATEAU, run_seconds, smallest_of_best
from moeplan.planner.strategies.offload_lanes import (
    Array,
    Costs,
    Layout,
    Mask,
    Point,
    Shapes,
    Units,
    take,
    total,
)

Index = NDArray[np.intp]
Seconds = Callable[[Point], Array]
_T = TypeVar("_T")

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 23, 26, 30, 34, 39, 45, 52, 64)
_MOST_LAYOUTS = 3000  # attention splits searched exactly, all shapes together
_FIRST = 100  # of them, by their bound, before the others are pruned by the best


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


def shapes(ways: Sequence[Sharing], requests: int) -> Shapes:
    """Every way to share, μ and n_ub that `requests` can fill; one at least."""
    found = grid(ways, MICRO_BATCHES)
    return take(found, found.micro_batch * found.micro_batches <= max(requests, 1))


def grid(ways: Sequence[Sharing], counts: Sequence[int]) -> Shapes:
    """Every way to share with every μ and each n_ub of `counts`."""
    grids = np.meshgrid(range(len(ways)), MICRO_BATCH_SIZES, counts, indexing="ij")
    way, micro, count = (grid.ravel() for grid in grids)
    gpus, whole = (np.array([getattr(w, name) for w in ways])[way] for name in ("gpus", "whole"))
    return Shapes(gpus.astype(float), whole, micro.astype(float), count.astype(float))


def fastest(problem: Costs, units: Units) -> Point | None:
    """The fastest point of all shapes for a batch class, on a plateau the one with the fewest sequences;
    None where nothing fits."""

    def seconds(point: Point) -> Array:
        return batch_seconds(problem, point)

    layout = _promising(problem, units)
    bounds = bound(problem, layout)
    layout, bounds = take(layout, order := np.argsort(bounds, kind="stable")), bounds[order]
    first = best_cpu_experts(problem, take(layout, slice(0, _FIRST)), seconds)
    slowest = seconds(first).min(initial=np.inf) * (1.0 + PLATEAU)
    open_ones = np.flatnonzero(bounds[_FIRST:] <= slowest) + _FIRST
    both = joined(first, best_cpu_experts(problem, take(layout, open_ones), seconds))
    times = seconds(both)
    if not np.isfinite(times).any():
        return None
    best = smallest_of_best(1.0 / times, both.sequences)
    return take(both, slice(best, best + 1))


def _promising(problem: Costs, units: Units) -> Layout:
    """All attention splits of the shapes with the lowest bounds, as many as can be searched."""
    ends, shape = extremes(problem, units)
    least = np.full(len(units.gpus), np.inf)
    np.minimum.at(least, shape, bound(problem, ends))
    size = units.micro_batch * units.micro_batches
    on_plateau = np.where(least <= least.min() * (1.0 + PLATEAU), size, np.inf)
    order = np.lexsort((least, on_plateau))
    order = order[np.isfinite(least[order])]
    count = units.micro_batches[order]
    room = np.cumsum((count + 1) * (count + 2)) <= _MOST_LAYOUTS
    room[:1] = True
    return every_split(problem, take(units, order[room]))


def extremes(problem: Costs, units: Units) -> tuple[Layout, Index]:
    """Attention on the GPU as far as memory goes or not at all, the rest on the CPU or copied up, experts
    streamed or not; and the shape of each. What comes to the same is there once."""
    shape = np.tile(np.arange(len(units.gpus)), 8)
    way = np.repeat(np.arange(8), len(units.gpus))
    on_gpu = np.where(way & 1, most_on_gpu(problem, units)[shape], 0.0)
    cache_up = np.where(way & 2, units.micro_batches[shape] - on_gpu, 0.0)
    new = ((way & 1 == 0) | (on_gpu > 0)) & ((way & 2 == 0) | (cache_up > 0))
    own = take(units, shape[new])
    return problem.layout(own, on_gpu[new], cache_up[new], (way[new] & 4) == 0), shape[new]


def most_on_gpu(problem: Costs, units: Units) -> Array:
    """The most micro-batches whose cache GPU memory holds, experts aside."""
    none = np.zeros_like(units.gpus)
    empty = problem.layout(units, none, none, none > 0)
    free = problem.gpu_limit_bytes(units.gpus) - total(problem.gpu_items(empty))
    return np.clip(np.floor(free / units.longest_cache_bytes), 0.0, units.micro_batches)


def every_split(problem: Costs, units: Units) -> Layout:
    """Every split of every shape's micro-batches, with experts streamed and not."""
    splits = [_splits(int(count)) for count in units.micro_batches]
    shape = np.repeat(np.arange(len(splits)), [len(split) for split in splits])
    on_gpu, cache_up, streams = np.concatenate([*splits, np.zeros((0, 3))]).T
    fits = on_gpu <= most_on_gpu(problem, units)[shape]
    return problem.layout(take(units, shape[fits]), on_gpu[fits], cache_up[fits], streams[fits] > 0)


@lru_cache
def _splits(count: int) -> Array:
    """[(on GPU, copied up, streams)] of `count` micro-batches."""
    on_gpu, cache_up, streams = np.indices((count + 1, count + 1, 2)).reshape(3, -1)
    whole = on_gpu + cache_up <= count
    return np.stack([on_gpu[whole], cache_up[whole], streams[whole]], axis=1).astype(float)


def batch_seconds(problem: Costs, point: Point) -> Array:
    """Seconds for all requests of a batch class; infinite where a point does not fit."""
    return _requests_s(problem, point, problem.pass_s(point, problem.decode_lanes(point)))


def _requests_s(problem: Costs, point: Point, decode_s: Array) -> Array:
    prefill_s = problem.pass_s(point, problem.prefill_lanes(point, point.units.prompts))
    seconds = run_seconds(problem.requests, point.sequences, prefill_s, decode_s)
    return np.where(point.feasible, seconds, np.inf)


def bound(problem: Costs, layout: Layout) -> Array:
    """A lower bound of `batch_seconds` over every share of experts on the CPU.

    An expert outside the GPU takes time of the CPU or of the link, and any expert of the CPU or of the GPU.
    Both end no earlier than they would together if experts could be divided.
    """
    none = problem.point(layout, np.zeros_like(layout.on_gpu))
    lanes = problem.decode_lanes(none)
    on_cpu, u = lanes["cpu"], layout.units
    linked = _balanced(lanes["h2d"], problem.outside_link_s(none), on_cpu, problem.outside_cpu_s(none))
    computed = _balanced(lanes["gpu"], u.gpu_experts_s, on_cpu, u.cpu_experts_s)
    least = np.maximum.reduce([linked, computed, lanes["d2h"], lanes["disk"]])
    decode_s = np.where(layout.streams, least, problem.pass_s(none, lanes))
    return _requests_s(problem, none, decode_s)


def _balanced(one: Array, movable: Array, other: Array, moved: Array) -> Array:
    """The least that the longer of two lanes takes where any part of `movable` seconds of the one may become
    that part of `moved` seconds of the other."""
    share = np.clip((one - other) / np.maximum(movable + moved, 1e-12), 0.0, 1.0)
    return np.maximum(other + share * moved, one - share * movable)


def best_cpu_experts(problem: Costs, layout: Layout, seconds: Seconds) -> Point:
    """Each candidate with the number of experts on the CPU that takes least time, counted as they are dealt.

    Time is convex in that number from 1 on (each lane is a line or bends upwards), so its slope is bisected;
    at 0 the routed hidden states' way to the CPU falls away.
    """
    count = len(layout.on_gpu)
    twice = take(layout, np.tile(np.arange(count), 2))

    dealt = np.tile(layout.units.dealt, 2)

    def faster(one: Array, other: Array) -> Mask:
        both = seconds(problem.point(twice, dealt * np.concatenate([one, other])))
        return np.asarray(both[:count] < both[count:])

    low = np.ones(count)
    high = problem.workload.model.experts / layout.units.dealt
    while (low < high).any():
        middle = np.floor((low + high) / 2)
        falls = faster(middle + 1, middle)
        low, high = np.where(falls, middle + 1, low), np.where(falls, high, middle)
    some = faster(low, np.zeros_like(low))
    return problem.point(layout, np.where(some, layout.units.dealt * low, 0.0))


def joined(first: _T, second: _T) -> _T:
    """One record of arrays with the elements of both."""

    def stack(a: object, b: object) -> object:
        return np.concatenate([a, b]) if isinstance(a, np.ndarray) else joined(a, b)

    values = {f.name: stack(getattr(first, f.name), getattr(second, f.name)) for f in fields(first)}  # type: ignore[arg-type]
    return type(first)(**values)
