"""Whole experts dealt to GPUs: how much more than an even part the busiest of them has to do.

All GPUs wait for the busiest before what they say is summed, once for every call of a layer. Each token of a
call goes to k of E experts; it goes to expert e with probability p, its share of the tokens where popularity
is known, else k/E. What falls to a GPU is taken as normal: the busiest of R exceeds the largest mean by no
more than (expected maximum of R standard normals) x (what is left of the standard deviation once the common
part is gone). Exact in mean and variance where all experts are alike, where a token's choices are drawn
without replacement; tests hold it against drawn routings.
Source: order statistics (David and Nagaraja, Order Statistics, 3rd edition, section 2.3) on that model of
routing.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def busiest_part(shares: Array, gpus: int, tokens: Array) -> tuple[Array, Array]:
    """What the busiest of `gpus` has of calls of `tokens` tokens, as multiples of an even part: of the
    choices of experts, and of the experts that are hit. Means over layers.

    `shares` [layers, experts] of the tokens go to each expert, most popular first. Experts are dealt in that
    order, forth and back: see `runtime_min.shares.own_experts`.
    """
    experts = shares.shape[1]
    dealt = _dealt(shares, gpus)
    count, place = np.unique(tokens, return_inverse=True)
    spread = largest_of_normals(gpus) * np.sqrt(experts / max(1, experts - 1) / gpus)
    called = count[:, None, None, None]
    choices = _multiple(called * dealt, called * (dealt * (1 - dealt)), spread)
    hit = 1 - (1 - dealt) ** called
    hits = _multiple(hit, hit * (1 - hit), spread)
    return np.minimum(choices, gpus)[place], np.minimum(hits, gpus)[place]


def _dealt(each: Array, gpus: int) -> Array:
    """[layers, turns, gpus] of [layers, experts], most popular first."""
    turns = each.reshape(len(each), -1, gpus).copy()
    turns[:, 1::2] = turns[:, 1::2, ::-1]
    return turns


def _multiple(mean: Array, variance: Array, spread: float) -> Array:
    """Of [counts, layers, turns, gpus], what the busiest GPU has over what each has on average: [counts], the
    mean of layers."""
    each = mean.sum(axis=2)
    most = each.max(axis=2) + spread * np.sqrt(variance.sum(axis=(2, 3)))
    return np.asarray((most / each.mean(axis=2)).mean(axis=1))


@lru_cache
def largest_of_normals(count: int) -> float:
    """The expected largest of so many standard normals."""
    below = NormalDist().cdf
    at = np.linspace(-9.0, 9.0, 3601)
    none_above = np.array([below(x) for x in at]) ** count
    # E max = integral of (1 - F) above 0 minus integral of F below.
    return float(np.trapezoid(np.heaviside(at, 0.5) - none_above, at))
