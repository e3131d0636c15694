"""Spec, workload, columns -> the solver's problem: every size of both kinds of work over one market.

Money is per hour where there is online work: a batch's bill is spread over its deadline, or over a day
without one, which matters only where quota or budget make the two compete. Batch work alone is one bill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moeplan.planner import costs
from moeplan.planner.ir.fleet import Column
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.spec import MarketSpec
from moeplan.planner.ir.workload import ClassName, RequestClass, Workload
from moeplan.planner.packing.headroom import headroom_of
from moeplan.planner.packing.problem import Pool, Problem

SPOT_OVERPROVISION = 1  # more spot replicas than needed while serving online: SkyServe's N_Extra
BUDGET, GPU = "budget", "gpu "  # resources; GPUs by type
# Assumed, for want of spot traces: a spot machine is taken away every ten hours, and what it did of its part
# of the requests is done again; parts are of an hour's work, so half an hour on average.
INTERRUPTIONS_PER_HOUR = 0.1
REDONE_HOURS = 0.5
_DAY_HOURS = 24.0
_HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One size of one class; `hours` is the deadline of batch work, infinite without."""

    requests: RequestClass
    bucket: int
    hours: float

    @property
    def serves(self) -> ClassName:
        return self.requests.name

    def rate_per_s(self) -> float:
        """Requests/s of this size; online only."""
        return self.requests.rate_per_s * self.requests.buckets[self.bucket].share

    def machine_hours(self, requests_per_s: float) -> float:
        """Hours of one machine for all requests of this size; batch only."""
        count = self.requests.requests * self.requests.buckets[self.bucket].share
        return count / requests_per_s / _HOUR_S if requests_per_s > 0 else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """What the pools and demands of a problem stand for. `horizon_hours` is what a bill is divided by to be
    added to prices per hour; 1 where there is no online work."""

    workload: Workload
    columns: Mapping[str, Column]
    demands: tuple[Demand, ...]
    horizon_hours: float

    def start_hours(self, column: Column) -> float:
        """A rented machine is paid from launch."""
        return 0.0 if column.market == "owned" else costs.cold_start_s(self.workload) / _HOUR_S

    def work_hours(self, column: Column, demand: Demand) -> float:
        """Hours of one machine of a batch column for all of a demand, repeated work included."""
        hours = demand.machine_hours(column.policy.rates[demand.bucket].requests_per_s.value)
        return hours * interruption_factor(column, self.start_hours(column))


def interruption_factor(column: Column, start_hours: float) -> float:
    """Hours that batch work takes on a column over those without interruptions."""
    if column.market != "spot":
        return 1.0
    return 1.0 + INTERRUPTIONS_PER_HOUR * (REDONE_HOURS + start_hours)


def find_market(
    workload: Workload, columns: Sequence[Column], rules: MarketSpec, all_columns: bool = False
) -> Market:
    """Return what may be bought and what for; with `all_columns` also what is listed only."""
    demands = tuple(
        Demand(requests=requests, bucket=b, hours=(requests.deadline_s or math.inf) / _HOUR_S)
        for requests in workload.classes
        for b in range(len(requests.buckets))
    )
    return Market(
        workload=workload,
        columns={
            column.name: column for column in columns if all_columns or _eligible(column, columns, rules)
        },
        demands=demands,
        horizon_hours=_horizon_hours(demands),
    )


def formulate(
    market: Market, rules: MarketSpec, headroom: float = 1.0, previous: Mapping[str, int] | None = None
) -> Problem:
    """Return the problem of the cheapest fleet; `headroom` scales how full machines may be planned."""
    columns = market.columns.values()
    limits = {f"{GPU}{gpu}": float(most) for gpu, most in rules.quota.items()}
    if rules.budget_usd_per_hour is not None:
        limits[BUDGET] = rules.budget_usd_per_hour
    unhurried = any(d.serves == "batch" and d.hours == math.inf for d in market.demands)
    return Problem(
        pools=tuple(_pool(market, column, headroom) for column in columns),
        online=tuple(d.serves == "online" for d in market.demands),
        limits=limits,
        floor=rules.on_demand_floor,
        survive=rules.survive,
        single=frozenset(c.name for c in columns if unhurried and c.policy.serves == "batch"),
        before=previous,
    )


def _horizon_hours(demands: Sequence[Demand]) -> float:
    if not any(d.serves == "online" for d in demands):
        return 1.0
    ends = [d.hours for d in demands if math.isfinite(d.hours)]
    return max(ends, default=_DAY_HOURS)


def _eligible(column: Column, columns: Sequence[Column], market: MarketSpec) -> bool:
    """Columns that no engine has executed are bought where nothing else can do the work, and for batch work
    where the spec allows it."""
    if not column.policy.rehearsed_only:
        return True
    serves = column.policy.serves
    if serves == "batch" and market.offload == "allow":
        return True
    return all(c.policy.rehearsed_only for c in columns if c.policy.serves == serves)


def _pool(market: Market, column: Column, headroom: float) -> Pool:
    policy, machine = column.policy, column.policy.machine
    amounts = {f"{GPU}{machine.gpu}": float(machine.gpus), BUDGET: column.usd_per_hour}
    room = headroom_of(policy, market.workload.request_class(policy.serves), headroom)
    if policy.serves == "online":
        return Pool(
            name=column.name,
            usd=column.usd_per_hour,
            loads=tuple(_online_load(market, column, demand) for demand in market.demands),
            target=room.target,
            ceiling=room.ceiling,
            reserve=room.reserve,
            spare=SPOT_OVERPROVISION if column.market == "spot" else 0,
            most=1 if column.market == "owned" else None,
            amounts=amounts,
            steady=column.market != "spot",
            region=column.region,
        )
    return Pool(
        name=column.name,
        usd=column.usd_per_hour * market.start_hours(column) / market.horizon_hours,
        loads=tuple(_batch_load(market, column, demand, room.target) for demand in market.demands),
        share_usd=tuple(_batch_usd(market, column, demand) for demand in market.demands),
        most=1 if column.market == "owned" else None,
        amounts=amounts,
        steady=column.market != "spot",
        region=column.region,
    )


def _online_load(market: Market, column: Column, demand: Demand) -> float:
    """Machines that a demand keeps busy; a batch demand up to its deadline, in what time requests leave."""
    if demand.serves == "online":
        rate = column.policy.rates[demand.bucket].requests_per_s.value
        return demand.rate_per_s() / rate if rate > 0 else math.inf
    if demand.hours == math.inf:
        return math.inf
    return demand.machine_hours(_fill_rate(market, column.policy, demand)) / demand.hours


def _fill_rate(market: Market, online: Policy, demand: Demand) -> float:
    """Batch requests/s of an online machine that does nothing else; 0 where that is not known.

    Known where the same machine, engine, GPUs and weights also make a batch column. Its throughput counts in
    proportion to the sequences that the online SLO leaves in flight: throughput is concave in sequences, so
    that is never too much.
    """
    for column in market.columns.values():
        batch = column.policy
        if batch.serves == "batch" and batch.engine == "vllm" == online.engine and _alike(batch, online):
            fewest = min((r.batch for r in online.rates if r.requests_per_s.value > 0), default=0)
            rate = batch.rates[demand.bucket]
            return rate.requests_per_s.value * min(1.0, fewest / rate.batch)
    return 0.0


def _alike(a: Policy, b: Policy) -> bool:
    return (a.machine.name, a.gpus, a.weights_dtype) == (b.machine.name, b.gpus, b.weights_dtype)


def _batch_load(market: Market, column: Column, demand: Demand, target: float) -> float:
    """Machines that do a batch demand in time, their start included; without a deadline any one does."""
    hours = market.work_hours(column, demand) if demand.serves == "batch" else math.inf
    if demand.hours == math.inf:
        return 1e-3 if math.isfinite(hours) else math.inf
    available = target * demand.hours - market.start_hours(column)
    return hours / available if available > 0 else math.inf


def _batch_usd(market: Market, column: Column, demand: Demand) -> float:
    """What all of a demand costs on a column, start-up aside."""
    if demand.serves != "batch":
        return 0.0
    hours = market.work_hours(column, demand)
    return column.usd_per_hour * hours / market.horizon_hours if math.isfinite(hours) else 0.0
