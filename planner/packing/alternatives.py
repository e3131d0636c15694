"""What each other column would cost alone, quota and budget aside."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from moeplan.planner.ir.fleet import UNSIMULATED, Alternative, Column
from moeplan.planner.ir.workload import ClassName
from moeplan.planner.packing.formulate import Market
from moeplan.planner.packing.problem import Pool
from moeplan.planner.units import format_duration

MOST_ALTERNATIVES = 8
PREDICTED_ONLY = "; predicted only, runtime_min has never run on a GPU"


def find_alternatives(
    market: Market, pools: Sequence[tuple[Pool, Column]], chosen: Collection[str], serves: ClassName
) -> tuple[Alternative, ...]:
    """Return the cheapest columns that could do all work of a class alone, but for a lone chosen one.

    Online work in USD per hour, batch work as a bill. Queues of online work are not simulated: they may ask
    for more replicas, or refuse the column.
    """
    price: Callable[[Market, Pool, Column], Alternative | None] = _online if serves == "online" else _batch
    own = [(pool, column) for pool, column in pools if column.policy.serves == serves]
    alone = {column.name for _, column in own if column.name in chosen}
    left_out = alone if serves == "batch" or len(alone) == 1 else set()
    found = [price(market, pool, column) for pool, column in own if column.name not in left_out]
    priced = sorted((a for a in found if a is not None), key=lambda a: (a.cost_usd, a.column))
    return tuple(priced[:MOST_ALTERNATIVES])


def _own_load(market: Market, pool: Pool, serves: ClassName) -> float:
    return sum(
        load for load, demand in zip(pool.loads, market.demands, strict=True) if demand.serves == serves
    )


def _online(market: Market, pool: Pool, column: Column) -> Alternative | None:
    load = _own_load(market, pool, "online")
    if not math.isfinite(load):
        return None
    replicas = pool.enough(load) + pool.spare
    return Alternative(
        column=column.name,
        serves="online",
        replicas=replicas,
        cost_usd=replicas * column.usd_per_hour,
        note="USD per hour" + UNSIMULATED + PREDICTED_ONLY * column.policy.rehearsed_only,
    )


def _batch(market: Market, pool: Pool, column: Column) -> Alternative | None:
    load = _own_load(market, pool, "batch")
    replicas = pool.enough(load) if math.isfinite(load) else 0
    if not replicas or (pool.most is not None and replicas > pool.most):
        return None
    work = sum(market.work_hours(column, d) for d in market.demands if d.serves == "batch")
    hours = work + market.start_hours(column) * replicas
    return Alternative(
        column=column.name,
        serves="batch",
        replicas=replicas,
        cost_usd=hours * column.usd_per_hour,
        note=f"USD in all, {format_duration(hours * 3600)} of machine time"
        + PREDICTED_ONLY * column.policy.rehearsed_only,
    )
