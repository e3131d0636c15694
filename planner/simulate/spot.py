"""Capacity of zones over time, one placement -> what SkyServe's policy makes of it: availability, cost,
preemptions.

The policy (SkyServe, EuroSys'25, Algorithm 1, as SkyPilot executes it): N + extra - base replicas are wanted
on spot. A missing one is launched in the cheapest active zone that holds none, else in the cheapest active
zone. A zone that preempts or refuses is put aside; a replica that gets ready there makes it active again;
where `min_active` zones or fewer are active, all are. On-demand replicas: min(N, base + wanted - ready on
spot).

Time goes in ticks of 30 s, as in the artifact of the paper. In each, the on-demand target follows the spot
replicas that were ready in the tick before; missing spot replicas are placed; then each zone keeps no more
than it can launch, and the youngest are lost. A replica is ready once it has been held for `cold_ticks` ticks
before this one. Held ticks are billed, ready or not. On-demand replicas can always be had, and start as
slowly.

Ticks in which nothing can change are jumped over, which changes no figure.
Importing this module imports Numba; the kernel is compiled at its first call and kept in its cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Capacity = NDArray[np.int16]
Rule = Literal["min-cost", "round-robin", "even-spread"]

TICK_S = 30.0
_RULES: dict[Rule, int] = {"min-cost": 0, "round-robin": 1, "even-spread": 2}
_MIN_COST, _ROUND_ROBIN = 0, 1
_GOOD, _SHORT, _SPOT_USD, _ON_DEMAND, _LOST, _COUNTED, _TICKS = range(7)
_FIGURES = 7
_NEVER = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What SkyServe is told: `extra` spot replicas to spare, `base` on-demand ones, and how it chooses zones.

    `min_active` is 1 in the paper and in SkyPilot, 0 in the paper's artifact on three zones.
    """

    replicas: int
    extra: int
    base: int = 0
    cold_start_s: float
    min_active: int = 1
    fallback: bool = True
    rule: Rule = "min-cost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """Sums over each block of steps, in ticks; `spot_usd_per_hour` and costs are means over the block's
    ticks.

    Availability counts ticks after the first cold start: those with enough ready replicas.
    """

    good_ticks: Ints  # [blocks]
    counted_ticks: Ints  # [blocks]
    missing_ticks: Ints  # [blocks], replicas missing, summed over ticks
    spot_usd_ticks: Floats  # [blocks], USD per hour, summed over ticks
    on_demand_ticks: Ints  # [blocks], on-demand replicas, summed over ticks
    preemptions: Ints  # [blocks]
    ticks: Ints  # [blocks]
    replicas: int

    @property
    def availability(self) -> float:
        """Share of time with at least as many ready replicas as wanted."""
        return float(self.good_ticks.sum() / max(1, self.counted_ticks.sum()))

    @property
    def shortfall(self) -> float:
        """Mean share of the wanted replicas that is missing."""
        return float(self.missing_ticks.sum() / max(1, self.counted_ticks.sum()) / self.replicas)

    @property
    def preemptions_per_day(self) -> float:
        return float(self.preemptions.sum() / self.ticks.sum() * 86400.0 / TICK_S)

    def usd_per_hour(self, on_demand_usd_per_hour: float) -> float:
        """Mean bill of all that was held, on-demand replicas at this price."""
        return float(
            (self.spot_usd_ticks.sum() + on_demand_usd_per_hour * self.on_demand_ticks.sum())
            / self.ticks.sum()
        )

    @property
    def mean_on_demand(self) -> float:
        """On-demand replicas held, on average."""
        return float(self.on_demand_ticks.sum() / self.ticks.sum())

    def daily_availability(self) -> Floats:
        return np.asarray(self.good_ticks / np.maximum(1, self.counted_ticks), dtype=np.float64)

    def daily_shortfall(self) -> Floats:
        return np.asarray(self.missing_ticks / np.maximum(1, self.counted_ticks) / self.replicas)


@njit(cache=True)
def _choose(active, held, ranked):
    """The cheapest active zone that holds nothing, else the cheapest active one."""
    second = -1
    for zone in ranked:
        if active[zone]:
            if held[zone] == 0:
                return zone
            if second < 0:
                second = zone
    return second


@njit(cache=True)
def _youngest(zone_of, born, zone):
    best = -1
    for i in range(len(zone_of)):
        if zone_of[i] == zone and (best < 0 or born[i] > born[best]):
            best = i
    return best


@njit(cache=True)
def _until(step, block_steps, ticks, step_ticks):
    """The first tick of a block that belongs to the step after `step`."""
    if step + 1 >= block_steps:
        return ticks
    return min(ticks, math.ceil((step + 1) * step_ticks - 1e-9))


@njit(cache=True)
def _place(zone_of, born, held, active, ranked, rule, now, turn):
    """Launch what is missing; returns whose turn it is (round robin)."""
    zones = len(held)
    for i in range(len(zone_of)):
        if zone_of[i] >= 0:
            continue
        zone = i % zones
        if rule == _MIN_COST:
            zone = _choose(active, held, ranked)
        elif rule == _ROUND_ROBIN:
            zone = turn % zones
            turn += 1
        zone_of[i], born[i] = zone, now
        held[zone] += 1
    return turn


@njit(cache=True)
def _cap(zone_of, born, held, active, most, min_active, now):
    """Take what zones cannot hold; returns how many replicas were lost that had run before."""
    lost = 0
    refused = False
    for zone in range(len(held)):
        while held[zone] > most[zone]:
            i = _youngest(zone_of, born, zone)
            lost += born[i] < now
            zone_of[i] = -1
            held[zone] -= 1
            active[zone] = 0
            refused = True
    if refused and active.sum() <= min_active:
        active[:] = 1
    return lost


@njit(cache=True)
def _count(zone_of, born, active, usd, cold, now):
    """USD per hour of what is held on spot, how many are ready, ticks until the next is; 1 where some
    miss."""
    spot, ready, wait = 0.0, 0, _NEVER
    for i in range(len(zone_of)):
        if zone_of[i] < 0:
            wait = 1
            continue
        spot += usd[zone_of[i]]
        age = now - born[i]
        if age >= cold:
            ready += 1
        else:
            wait = min(wait, cold - age)
        if age == cold:
            active[zone_of[i]] = 1
    return spot, ready, wait


@njit(cache=True)
def _count_stand_ins(launched, stand_ins, cold, now):
    """How many on-demand replicas are ready, and ticks until the next is."""
    ready, wait = 0, _NEVER
    for i in range(stand_ins):
        age = now - launched[i]
        if age >= cold:
            ready += 1
        else:
            wait = min(wait, cold - age)
    return ready, wait


@njit(cache=True)
def _note(sums, change, spot, stand_ins, lost, counts, missing):
    """Add `change` ticks that are all alike."""
    sums[_TICKS] += change
    sums[_SPOT_USD] += spot * change
    sums[_ON_DEMAND] += stand_ins * change
    sums[_LOST] += lost
    if counts:
        sums[_COUNTED] += change
        sums[_SHORT] += missing * change
        sums[_GOOD] += change * (missing == 0)


@njit(cache=True)
def _replay(capacity, columns, starts, block_steps, step_ticks, ranked, usd, numbers, sums, timeline):
    """Fill `sums[block]` and, where it has rows, `timeline[tick]` = ready spot, ready on-demand, lost.

    Zone z at step s of block b can hold `capacity[starts[b, z] + s, columns[z]]`. The state goes on from
    block to block.
    """
    replicas, extra, base, cold, min_active, fallback, rule = numbers
    wanted, zones = replicas + extra - base, len(columns)
    active, held, most = np.ones(zones, np.int64), np.zeros(zones, np.int64), np.zeros(zones, np.int64)
    zone_of, born = np.full(wanted, -1, np.int64), np.zeros(wanted, np.int64)
    launched = np.zeros(replicas, np.int64)  # of on-demand replicas
    target, now, turn = min(replicas, base + wanted) * fallback, 0, 0
    stand_ins = 0
    ticks = int(block_steps * step_ticks + 1e-9)
    for block in range(len(starts)):
        tick = 0
        while tick < ticks:
            step = int(tick / step_ticks + 1e-9)
            for zone in range(zones):
                most[zone] = capacity[starts[block, zone] + step, columns[zone]]
            launched[stand_ins:target] = now
            stand_ins = target
            turn = _place(zone_of, born, held, active, ranked, rule, now, turn)
            lost = _cap(zone_of, born, held, active, most, min_active, now)
            spot, ready, wait = _count(zone_of, born, active, usd, cold, now)
            ready_too, wait_too = _count_stand_ins(launched, stand_ins, cold, now)
            change = min(wait, wait_too, _until(step, block_steps, ticks, step_ticks) - tick)
            if now < cold:
                change = min(change, cold - now)
            target = min(replicas, base + max(0, wanted - ready)) * fallback
            if target != stand_ins:
                change = 1
            missing = max(0, replicas - ready - ready_too)
            _note(sums[block], change, spot, stand_ins, lost, now >= cold, missing)
            if len(timeline):
                timeline[now : now + change, 0] = ready
                timeline[now : now + change, 1] = ready_too
                timeline[now, 2] = lost
            tick += change
            now += change


def replay(
    capacity: Capacity,
    step_s: float,
    columns: Ints,
    usd_per_hour: Floats,
    policy: Policy,
    *,
    starts: Ints | None = None,
    block_steps: int = 0,
    timeline: NDArray[np.int32] | None = None,
) -> Replayed:
    """Replay `policy` over `capacity` [steps, all zones], of which it uses `columns` at `usd_per_hour` each.

    `starts` [blocks] or [blocks, zones] are the steps at which blocks of `block_steps` begin, in the order in
    which they are put together; none: the whole trace is one block. `timeline` [ticks, 3] is filled in place.
    """
    if starts is None:
        starts, block_steps = np.zeros(1, np.int64), len(capacity)
    if starts.ndim == 1:
        starts = np.repeat(starts[:, None], len(columns), axis=1)
    sums = np.zeros((len(starts), _FIGURES))
    numbers = (
        policy.replicas,
        policy.extra,
        policy.base,
        cold_ticks(policy.cold_start_s),
        policy.min_active,
        int(policy.fallback),
        _RULES[policy.rule],
    )
    ranked = np.argsort(usd_per_hour, kind="stable")
    drawn = np.zeros((0, 3), np.int32) if timeline is None else timeline
    _replay(
        capacity, columns, starts, block_steps, step_s / TICK_S, ranked, usd_per_hour, numbers, sums, drawn
    )
    whole = sums.astype(np.int64)
    return Replayed(
        good_ticks=whole[:, _GOOD],
        counted_ticks=whole[:, _COUNTED],
        missing_ticks=whole[:, _SHORT],
        spot_usd_ticks=sums[:, _SPOT_USD],
        on_demand_ticks=whole[:, _ON_DEMAND],
        preemptions=whole[:, _LOST],
        ticks=whole[:, _TICKS],
        replicas=policy.replicas,
    )


def cold_ticks(cold_start_s: float) -> int:
    """Whole ticks, rounded up: a replica is never ready before its cold start is over."""
    return math.ceil(cold_start_s / TICK_S - 1e-9)


def ticks_of(steps: int, step_s: float) -> int:
    """Ticks that a block of `steps` holds."""
    return int(steps * step_s / TICK_S + 1e-9)
