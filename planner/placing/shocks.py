"""Rates of zones -> a synthetic trace in which zones of a region fail together, and sometimes regions do.

A zone is down while x = sqrt(across) G + sqrt(within - across) R + sqrt(1 - within) Z is below a threshold: G
is common to all, R to a region, Z the zone's own; all are Gaussian, of unit variance, smooth in time (two
first-order filters in a row). The threshold is the zone's down share's quantile, the time constant follows
from the mean length of its spells (Rice's rate of crossings). Common parts of x make spells of very different
length: short ones while it hovers about the threshold, long ones while it is far from it.

Correlations are fitted to how often *pairs* of zones are down together; how often all are is then a
prediction (`joint_down`), which `tests/placing/test_shocks.py` compares with what was measured. A loss that
is not of the whole zone leaves a part of its machines, in the share 1 - `loses_all` of losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moeplan.planner.ir.spot import SpotTrace, ZoneName

Floats = NDArray[np.float64]

_GRID = np.linspace(-6.0, 6.0, 121)
_WEIGHTS = np.exp(-_GRID * _GRID / 2) / np.exp(-_GRID * _GRID / 2).sum()
_HIGHEST_CORRELATION = 0.98
_NORMAL = NormalDist()
_WARM_UP = 20  # time constants, before which the filters forget where they began


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneRates:
    """How a zone behaves by itself; `loses_all` is the share of its losses that take all its machines."""

    name: ZoneName
    down_share: float
    down_spell_s: float
    depth: int
    loses_all: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shocks:
    """Zones and the correlation of their latent states: within a region, and across regions."""

    zones: tuple[ZoneRates, ...]
    within: float
    across: float


def fit_shocks(trace: SpotTrace) -> Shocks:
    """The generator whose zones and pairs of zones are down as often as the trace's."""
    down = trace.capacity == 0
    shares = np.clip(down.mean(axis=0), 1e-4, 1 - 1e-4)
    rates = tuple(
        ZoneRates(
            name=name,
            down_share=float(shares[z]),
            down_spell_s=_mean_spell(down[:, z]) * trace.step_s,
            depth=max(1, int(trace.capacity[:, z].max())),
            loses_all=_loses_all(trace.capacity[:, z]),
        )
        for z, name in enumerate(trace.zones)
    )
    pairs = [(i, j) for i in range(len(rates)) for j in range(i)]
    same = [(i, j) for i, j in pairs if _region(rates[i]) == _region(rates[j])]
    other = [pair for pair in pairs if pair not in set(same)]
    across = _correlation(down, shares, other)
    return Shocks(zones=rates, within=max(across, _correlation(down, shares, same)), across=across)


def _region(rates: ZoneRates) -> tuple[str, str]:
    return rates.name.cloud, rates.name.region


def _mean_spell(down: NDArray[np.bool_]) -> float:
    begins = int(down[0]) + int((down[1:] & ~down[:-1]).sum())
    return float(down.sum()) / max(1, begins)


def _loses_all(capacity: NDArray[np.int16]) -> float:
    losses = np.flatnonzero(capacity[1:] < capacity[:-1]) + 1
    return float((capacity[losses] == 0).mean()) if len(losses) else 1.0


def _correlation(down: NDArray[np.bool_], shares: Floats, pairs: Sequence[tuple[int, int]]) -> float:
    """The latent correlation at which pairs are down together as often as they were, on average."""
    if not pairs:
        return 0.0
    wanted = float(np.mean([(down[:, i] & down[:, j]).mean() for i, j in pairs]))

    def together(rho: float) -> float:
        parts = [_down_given(share, math.sqrt(rho) * _GRID, 1.0 - rho) for share in shares]
        return float(np.mean([(_WEIGHTS * parts[i] * parts[j]).sum() for i, j in pairs]))

    return _bisect(together, wanted)


def _bisect(rising: Callable[[float], float], wanted: float) -> float:
    low, high = 0.0, _HIGHEST_CORRELATION
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return low


def _phi(x: Floats) -> Floats:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x.ravel()]).reshape(x.shape)


def _down_given(share: float, common: Floats, variance: float) -> Floats:
    """Probability that a zone is down, given the common part of its state."""
    return _phi((_NORMAL.inv_cdf(share) - common) / math.sqrt(variance))


def joint_down(shocks: Shocks) -> float:
    """How often all zones are down together, by quadrature over the common states."""
    total = np.ones(len(_GRID))
    everywhere, region = np.meshgrid(_GRID, _GRID, indexing="ij")
    common = math.sqrt(shocks.across) * everywhere + math.sqrt(shocks.within - shocks.across) * region
    for name in sorted({_region(zone) for zone in shocks.zones}):
        inside = np.ones_like(common)
        for zone in shocks.zones:
            if _region(zone) == name:
                inside *= _down_given(zone.down_share, common, 1.0 - shocks.within)
        total *= (inside * _WEIGHTS[None, :]).sum(axis=1)
    return float((_WEIGHTS * total).sum())


@njit(cache=True)
def _smooth(noise, keep, skip):
    """Two first-order filters in a row over `noise`, without its first `skip` steps; not yet of unit
    variance."""
    out = np.empty(len(noise) - skip)
    first = second = 0.0
    for t in range(len(noise)):
        first = keep * first + (1.0 - keep) * noise[t]
        second = keep * second + (1.0 - keep) * first
        if t >= skip:
            out[t - skip] = second
    return out


def _process(generator: np.random.Generator, steps: int, constant: float) -> Floats:
    """A smooth Gaussian process of unit variance with a time constant in steps."""
    keep = math.exp(-1.0 / max(constant, 0.2))
    skip = math.ceil(_WARM_UP * max(constant, 0.2))
    smooth = _smooth(generator.standard_normal(steps + skip), keep, skip)
    gain = (1.0 - keep) ** 4 * (1.0 + keep * keep) / (1.0 - keep * keep) ** 3
    return np.asarray(smooth / math.sqrt(gain), dtype=np.float64)


def _constant(zone: ZoneRates, step_s: float) -> float:
    """Steps: Rice's formula gives crossings per time constant, which for two equal filters is the rate
    exp(-u^2 / 2) / (2 pi constant); a down spell lasts the down share over it."""
    level = _NORMAL.inv_cdf(zone.down_share)
    return zone.down_spell_s / step_s * math.exp(-level * level / 2) / (2 * math.pi * zone.down_share)


def generate(shocks: Shocks, steps: int, step_s: float, seed: int) -> SpotTrace:
    """A synthetic trace of `steps`; the same seed, the same trace."""
    generator = np.random.default_rng(seed)
    constants = [_constant(zone, step_s) for zone in shocks.zones]
    usual = float(np.median(constants))
    everywhere = _process(generator, steps, usual)
    regions = {name: _process(generator, steps, usual) for name in sorted({_region(z) for z in shocks.zones})}
    columns = []
    for zone, constant in zip(shocks.zones, constants, strict=True):
        state = (
            math.sqrt(shocks.across) * everywhere
            + math.sqrt(shocks.within - shocks.across) * regions[_region(zone)]
            + math.sqrt(1.0 - shocks.within) * _process(generator, steps, constant)
        )
        columns.append(_depths(zone, state > _NORMAL.inv_cdf(zone.down_share), generator))
    return SpotTrace(
        zones=tuple(zone.name for zone in shocks.zones),
        step_s=step_s,
        capacity=np.stack(columns, axis=1).astype(np.int16),
        counted=any(zone.depth > 1 for zone in shocks.zones),
        source=f"synthetic: common shocks, seed {seed}",
    )


def _depths(zone: ZoneRates, up: NDArray[np.bool_], generator: np.random.Generator) -> NDArray[np.int64]:
    """Machines over time: all while up, but in dips, which make up the losses that do not take all."""
    machines = np.where(up, zone.depth, 0)
    losses = int((up[:-1] & ~up[1:]).sum())
    if zone.depth < 2 or zone.loses_all >= 1.0 or not losses:
        return machines
    dips = round(losses * (1.0 - zone.loses_all) / max(zone.loses_all, 0.05))
    length = max(1, int((~up).sum()) // losses)
    for begin in generator.integers(0, len(up), dips):
        left = int(generator.integers(1, zone.depth))
        machines[begin : begin + length] = np.minimum(machines[begin : begin + length], left)
    return machines
