"""Capacity, prices, cold start -> the least that any policy could have paid: the clairvoyant's bill.

The omniscient problem (SkyServe, EuroSys'25, section 4): launched L and ready R per zone and time, R(z, t) <=
L(z, u) for the cold start's u in [t - d, t], L <= capacity, enough ready at every moment; minimise what is
launched. Replicas are alike, so it is a minimum-cost flow of N units, whose optimum is whole: a unit runs
along a zone's time, and changes to another zone by going back in time by d there, which is the cold start
that it pays twice for. On-demand is a zone without limit. Time in which a unit serves nowhere costs `fine`
per hour; for every fine the flow less what the allowed time is fined is a lower bound (Lagrange), and the
best of some fines is taken.

Time is cut into blocks no longer than the cold start, capacity in a block is the most in it, and the cold
start is rounded down to blocks: all three only lower the bound. Successive shortest paths with potentials;
Numba.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

_MOST_NODES = 60_000
_ROUNDING_S = 60.0
_FINES = (0.0, 0.5, 1.0, 2.0, 4.0, 16.0)  # times the on-demand price


@njit(cache=True)
def _arcs(capacity, usd, fine, cold, replicas):
    """Arcs as (from, to, capacity, cost); node z * (T + 1) + t is zone z, the last T + 1 nodes the hub."""
    steps, zones = capacity.shape
    wide, hub = steps + 1, zones * (steps + 1)
    most = steps * zones + 2 * zones * wide + steps
    tail, head = np.empty(most, np.int64), np.empty(most, np.int64)
    room, cost = np.empty(most, np.int64), np.empty(most, np.float64)
    n = 0
    for z in range(zones):
        for t in range(wide):
            node = z * wide + t
            if t < steps and capacity[t, z] > 0:
                tail[n], head[n], room[n], cost[n] = node, node + 1, min(replicas, capacity[t, z]), usd[z]
                n += 1
            if t > 0:
                tail[n], head[n], room[n], cost[n] = node, hub + t, replicas, 0.0
                n += 1
            if t >= cold:
                tail[n], head[n], room[n], cost[n] = hub + t, z * wide + t - cold, replicas, 0.0
                n += 1
    for t in range(steps):
        tail[n], head[n], room[n], cost[n] = hub + t, hub + t + 1, replicas, fine
        n += 1
    return tail[:n], head[:n], room[:n], cost[:n]


@njit(cache=True)
def _adjacency(tail, head, nodes):
    """Arcs 2n and 2n + 1 are arc n and its reverse; those of a node stand together."""
    first = np.zeros(nodes + 1, np.int64)
    for n in range(len(tail)):
        first[tail[n] + 1] += 1
        first[head[n] + 1] += 1
    first = np.cumsum(first)
    fill, leaving = first.copy(), np.empty(2 * len(tail), np.int64)
    for n in range(len(tail)):
        leaving[fill[tail[n]]] = 2 * n
        fill[tail[n]] += 1
        leaving[fill[head[n]]] = 2 * n + 1
        fill[head[n]] += 1
    return first, leaving


@njit(cache=True)
def _shortest(graph, room, potential, source, sink):
    """Dijkstra on reduced costs: distances and the arc by which each node is reached."""
    tail, head, cost, first, leaving = graph
    nodes = len(potential)
    distance, reached = np.full(nodes, np.inf), np.full(nodes, -1, np.int64)
    done = np.zeros(nodes, np.bool_)
    distance[source] = 0.0
    heap = [(0.0, source)]
    while heap:
        far, node = heapq.heappop(heap)
        if done[node]:
            continue
        done[node] = True
        if node == sink:
            break
        for at in range(first[node], first[node + 1]):
            arc = leaving[at]
            if room[arc] <= 0:
                continue
            n, back = arc // 2, arc % 2
            to = tail[n] if back else head[n]
            weight = -cost[n] if back else cost[n]
            through = far + max(0.0, weight + potential[node] - potential[to])
            if through < distance[to] - 1e-12:
                distance[to], reached[to] = through, arc
                heapq.heappush(heap, (through, to))
    return distance, reached


@njit(cache=True)
def _flow(capacity, usd, fine, cold, replicas):
    """USD per hour, summed over blocks, of the cheapest flow of `replicas` units; fines included."""
    steps, zones = capacity.shape
    wide, hub = steps + 1, zones * (steps + 1)
    nodes = hub + wide
    tail, head, most, cost = _arcs(capacity, usd, fine, cold, replicas)
    room = np.zeros(2 * len(tail), np.int64)
    room[0::2] = most
    first, leaving = _adjacency(tail, head, nodes)
    graph = (tail, head, cost, first, leaving)
    potential, source, sink = np.zeros(nodes), hub + cold, hub + steps
    left, total = replicas, 0.0
    while left > 0:
        distance, reached = _shortest(graph, room, potential, source, sink)
        if not np.isfinite(distance[sink]):
            return np.inf
        potential += np.minimum(distance, distance[sink])
        push, node = left, sink
        while node != source:
            arc = reached[node]
            push = min(push, room[arc])
            node = head[arc // 2] if arc % 2 else tail[arc // 2]
        node = sink
        while node != source:
            arc = reached[node]
            room[arc] -= push
            room[arc ^ 1] += push
            total += push * (-cost[arc // 2] if arc % 2 else cost[arc // 2])
            node = head[arc // 2] if arc % 2 else tail[arc // 2]
        left -= push
    return total


def clairvoyant_bound(
    capacity: NDArray[np.int16],
    step_s: float,
    usd_per_hour: NDArray[np.float64],
    on_demand_usd_per_hour: float,
    replicas: int,
    cold_start_s: float,
    availability: float,
) -> float:
    """USD per hour: the least mean bill of any policy over `capacity` [steps, zones] that has enough ready
    replicas for at least the share `availability` of the time after the first cold start."""
    block_steps, parts = _blocks(step_s, cold_start_s)
    blocks = _coarse(capacity, block_steps, parts)
    on_demand = np.full((len(blocks), 1), replicas, np.int16)
    block_s = step_s * block_steps / parts
    cold = min(len(blocks) - 1, int(cold_start_s / block_s + 1e-9))
    rooms = np.ascontiguousarray(np.concatenate([blocks, on_demand], axis=1))
    usd = np.append(usd_per_hour, on_demand_usd_per_hour)
    # Nothing serves before the cold start is over, and a tick more is the rounding of ticks to blocks.
    excused_s = cold_start_s - cold * block_s + _ROUNDING_S
    served_s = len(blocks) * block_s - cold_start_s
    allowed = replicas * ((1.0 - availability) * served_s + excused_s) / block_s
    bounds = []
    for fine in _FINES:
        usd_fine = fine * on_demand_usd_per_hour
        bounds.append(_flow(rooms, usd, usd_fine, cold, replicas) - usd_fine * allowed)
    return float(max(bounds) / len(blocks))


def manageable_steps(step_s: float, cold_start_s: float, zones: int, replicas: int) -> int:
    """How many steps of a trace the bound can be found for in about a second."""
    block_steps, parts = _blocks(step_s, cold_start_s)
    nodes = _MOST_NODES * 3 // max(3, replicas)  # a unit of flow takes a path of its own, at worst
    return max(2, nodes * block_steps // ((zones + 2) * parts))


def _blocks(step_s: float, cold_start_s: float) -> tuple[int, int]:
    """Steps per block, and blocks per step, one of them 1: blocks no longer than the cold start."""
    if cold_start_s >= step_s:
        return max(1, math.floor(cold_start_s / step_s / 4 + 1e-9)), 1
    return 1, min(20, math.ceil(step_s / max(cold_start_s, 1.0) - 1e-9))


def _coarse(capacity: NDArray[np.int16], block_steps: int, parts: int) -> NDArray[np.int16]:
    """Capacity by block: the most of its steps, or each step `parts` times."""
    if parts > 1:
        return np.repeat(capacity, parts, axis=0)
    whole = len(capacity) // block_steps * block_steps
    grouped = capacity[len(capacity) - whole :].reshape(-1, block_steps, capacity.shape[1])
    return np.asarray(grouped.max(axis=1), dtype=np.int16)
