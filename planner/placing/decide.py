"""Capacity of zones, prices, what is wanted -> zones, spare replicas, on-demand floor: the cheapest that
keeps it.

Candidates are nested zone lists (the k cheapest, the k cheapest after failures, the k most available; k = 1,
2, ...) times spare replicas times on-demand floor. Each is replayed as SkyServe would run it, all zones
together. With less than two weeks of days it is accepted if the worst day keeps availability and shortfall;
with more, if 95 % of weeks drawn from them do (day blocks). Of the accepted the cheapest wins, or rather, of
those hardly dearer, the most available: a list that is cheapest by a little is so by chance; nested lists
rather than all subsets for the same reason. `benchmarks/placement.py` shows what the rule does on days that
were not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.simulate.spot import Policy, Replayed, replay

DAY_S = 86400.0
FULL_EVIDENCE_DAYS = 13.5  # two weeks, give or take what days leave over
_WEEK_DAYS, _DRAWS, _SEED = 7, 400, 20250330
_WORST_SHARE = 0.05  # of weeks, that may be worse than the bound
_NOISE = 0.05  # plans whose bills differ by less are equally cheap
# Of the replicas, that may be missing on average while some are: 0.65 with all zones of AWS3, 1 with one.
_MISSING_SHARE = 0.75

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """What zones could launch and what they cost. `domains` [zones] numbers zones, regions or clouds, any one
    of which may fail as a whole."""

    capacity: NDArray[np.int16] = field(repr=False)  # [steps, zones]
    step_s: float
    usd_per_hour: Floats  # [zones]
    on_demand_usd_per_hour: Floats  # [zones]
    domains: Ints

    def on_demand(self, zones: Sequence[int]) -> float:
        """What an on-demand machine costs that may stand in any of `zones`: the cheapest, USD per hour."""
        return float(self.on_demand_usd_per_hour[list(zones)].min())

    @property
    def all_on_demand(self) -> float:
        """The cheapest on-demand machine of all, USD per hour."""
        return float(self.on_demand_usd_per_hour.min())


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a placement must keep. `floor` replicas must survive the loss of any one domain (0: no such wish);
    at most `most` replicas may be held at a time."""

    replicas: int
    cold_start_s: float
    availability: float
    floor: int = 0
    most: int = 1 << 30

    @property
    def shortfall(self) -> float:
        """The mean share of replicas that may be missing."""
        share = _MISSING_SHARE if self.replicas > 1 else 1.0
        return share * (1.0 - self.availability)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement and how it did on the training days."""

    zones: tuple[int, ...]
    extra: int
    base: int
    availability: float
    usd_per_hour: float
    bound_availability: float
    bound_shortfall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The best candidate; where none keeps what is wanted, the one that comes closest, and `kept` is
    false."""

    best: Candidate
    kept: bool
    tried: int


def decide(market: Market, wanted: Wanted) -> Decision | None:
    """The placement to deploy; None where no zone list fits the quota or survives the loss of a domain."""
    return choose(candidates(market, wanted), market, wanted)


def candidates(market: Market, wanted: Wanted) -> tuple[Candidate, ...]:
    """All placements worth a thought, replayed; they do not depend on the availability that is wanted."""
    return tuple(
        replay_candidate(market, wanted, zones, extra, base)
        for zones in zone_lists(market)
        for extra, base in _settings(wanted)
        if survives(market, wanted, zones, extra, base)
    )


def choose(found: Sequence[Candidate], market: Market, wanted: Wanted) -> Decision | None:
    """The cheapest of what keeps the availability and the shortfall; None where nothing was found."""
    if not found:
        return None
    # What costs as much as on-demand machines is no use: they are always there.
    most = wanted.replicas * market.all_on_demand
    sensible = [c for c in found if c.usd_per_hour < most] or list(found)
    kept = [c for c in sensible if _keeps(c, wanted)]
    if not kept:
        best = max(sensible, key=lambda c: (c.bound_availability, -c.usd_per_hour, c.zones))
        return Decision(best=best, kept=False, tried=len(found))
    least = min(c.usd_per_hour for c in kept)
    near = [c for c in kept if c.usd_per_hour <= least * (1 + _NOISE)]
    best = max(near, key=lambda c: (c.bound_availability, c.availability, -c.usd_per_hour, c.zones))
    return Decision(best=best, kept=True, tried=len(found))


def _keeps(candidate: Candidate, wanted: Wanted) -> bool:
    return (
        candidate.bound_availability >= wanted.availability
        and candidate.bound_shortfall <= wanted.shortfall + 1e-12
    )


def zone_lists(market: Market) -> tuple[tuple[int, ...], ...]:
    """The first k zones, for every k, in the order of price, of price after failures and of availability."""
    up = (market.capacity > 0).mean(axis=0)
    usd = market.usd_per_hour
    after_failures = usd * up + market.all_on_demand * (1.0 - up)
    orders = [np.argsort(key, kind="stable") for key in (usd, after_failures, -up)]
    lists = {tuple(sorted(order[:k].tolist())) for order in orders for k in range(1, len(usd) + 1)}
    alive = {tuple(z for z in zones if up[z] > 0) for zones in lists}
    return tuple(sorted(alive - {()}, key=lambda zones: (len(zones), zones)))


def _settings(wanted: Wanted) -> Iterator[tuple[int, int]]:
    """Spare replicas and on-demand floors worth trying."""
    n = wanted.replicas
    bases = sorted({0, 1, n // 4, n // 2, n - 1} & set(range(n)))
    for extra in sorted({0, 1, 2, math.ceil(n / 4)}):
        yield from ((extra, base) for base in bases if n + extra <= wanted.most)


def survives(market: Market, wanted: Wanted, zones: Sequence[int], extra: int, base: int) -> bool:
    """Whether `floor` replicas are left after the loss of any one domain, all zones having been up."""
    if not wanted.floor:
        return True
    counts = steady_counts(market, zones, wanted.replicas + extra - base)
    lost: dict[int, int] = {}
    for zone, count in counts.items():
        domain = int(market.domains[zone])
        lost[domain] = lost.get(domain, 0) + count
    # On-demand replicas are all in the cheapest region, which may be in the domain that is lost.
    return wanted.replicas + extra - base - max(lost.values(), default=0) >= wanted.floor


def steady_counts(market: Market, zones: Sequence[int], spot: int) -> dict[int, int]:
    """Where SkyServe puts `spot` replicas while all zones are up: one in each, then all in the cheapest."""
    ranked = sorted(zones, key=lambda z: (market.usd_per_hour[z], z))
    counts = dict.fromkeys(ranked[:spot], 1)
    if spot > len(ranked):
        counts[ranked[0]] += spot - len(ranked)
    return counts


def day_starts(steps: int, step_s: float) -> tuple[Ints, int]:
    """First steps of the trace's days, and their length in steps: at least a day each where there is one."""
    days = max(1, int(steps * step_s / DAY_S + 1e-6))
    length = steps // days
    return np.arange(days, dtype=np.int64) * length, length


def policy_of(wanted: Wanted, extra: int, base: int) -> Policy:
    return Policy(replicas=wanted.replicas, extra=extra, base=base, cold_start_s=wanted.cold_start_s)


def replayed(market: Market, wanted: Wanted, zones: Sequence[int], extra: int, base: int) -> Replayed:
    """The policy over the market's days in their order."""
    starts, length = day_starts(len(market.capacity), market.step_s)
    columns = np.array(zones, dtype=np.int64)
    return replay(
        market.capacity,
        market.step_s,
        columns,
        market.usd_per_hour[columns],
        policy_of(wanted, extra, base),
        starts=starts,
        block_steps=length,
    )


def replay_candidate(
    market: Market, wanted: Wanted, zones: tuple[int, ...], extra: int, base: int
) -> Candidate:
    """A placement and its figures on the training days."""
    run = replayed(market, wanted, zones, extra, base)
    kept, missing = _bounds(run, len(market.capacity) * market.step_s / DAY_S)
    return Candidate(
        zones=zones,
        extra=extra,
        base=base,
        availability=run.availability,
        usd_per_hour=run.usd_per_hour(market.on_demand(zones)),
        bound_availability=kept,
        bound_shortfall=missing,
    )


def _bounds(run: Replayed, span_days: float) -> tuple[float, float]:
    """Availability and shortfall of the worst day or, given two weeks, of the 5 % worst week of drawn
    days."""
    if span_days < FULL_EVIDENCE_DAYS:
        return float(run.daily_availability().min()), float(run.daily_shortfall().max())
    days = len(run.good_ticks)
    drawn = np.random.default_rng(_SEED).integers(0, days, (_DRAWS, _WEEK_DAYS))
    counted = run.counted_ticks[drawn].sum(axis=1)
    available = run.good_ticks[drawn].sum(axis=1) / counted
    missing = run.missing_ticks[drawn].sum(axis=1) / counted / run.replicas
    return float(np.quantile(available, _WORST_SHARE)), float(np.quantile(missing, 1 - _WORST_SHARE))
