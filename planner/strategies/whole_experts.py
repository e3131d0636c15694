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

from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def busiest_choices(shares: Array, gpus: int, tokens: Array) -> Array:
    """What the busiest of `gpus` has of the choices of experts in calls of `tokens` tokens, as a multiple of
    an even part: mean over layers.

    `shares` [layers, experts] of the tokens go to each expert, most popular first. Experts are dealt in that
    order, forth and back: see `runtime_min.shares.own_experts`.
    """
    dealt = _dealt(shares, gpus)
    return _of_each(tokens, lambda called: _multiple(called * dealt, called * (dealt * (1 - dealt))))


def busiest_hits(shares: Array, gpus: int, tokens: Array) -> Array:
    """The same of the experts that are hit."""
    missed = 1 - _dealt(shares, gpus)

    def multiple(called: Array) -> Array:
        hit = 1 - missed**called
        return _multiple(hit, hit * (1 - hit))

    return _of_each(tokens, multiple)


def _of_each(tokens: Array, multiple: Callable[[Array], Array]) -> Array:
    """`multiple` of each number of tokens, asked once for those that are alike."""
    count, place = np.unique(tokens, return_inverse=True)
    return multiple(count[:, None, None, None])[place]


def _dealt(each: Array, gpus: int) -> Array:
    """[layers, turns, gpus] of [layers, experts], most popular first."""
    turns = each.reshape(len(each), -1, gpus).copy()
    turns[:, 1::2] = turns[:, 1::2, ::-1]
    return turns


def _multiple(mean: Array, variance: Array) -> Array:
    """Of [counts, layers, turns, gpus], what the busiest GPU has over what each has on average: [counts], the
    mean of layers."""
    turns, gpus = mean.shape[2:]
    spread = largest_of_normals(gpus) * np.sqrt(turns * gpus / max(1, turns * gpus - 1) / gpus)
    each = mean.sum(axis=2)
    most = each.max(axis=2) + spread * np.sqrt(variance.sum(axis=(2, 3)))
    return np.asarray(np.minimum((most / each.mean(axis=2)).mean(axis=1), gpus))


@lru_cache
def largest_of_normals(count: int) -> float:
    """The expected largest of so many standard normals."""
    below = NormalDist().cdf
    at = np.linspace(-9.0, 9.0, 3601)
    none_above = np.array([below(x) for x in at]) ** count
    # E max = integral of (1 - F) above 0 minus integral of F below.
    return float(np.trapezoid(np.heaviside(at, 0.5) - none_above, at))
