"""Task matrix, seconds, demands -> Timeline: when each task of a schedule runs, and what that leaves idle.

A schedule is an int64 matrix in issue order: op, lane, layer, item, slot, then for each lane how many of its
tasks, counted from the first row, must be complete before this one starts (0: none). A lane runs its own
tasks in order. Two models of time:

- alone: a task starts when all that it follows has ended, and takes its own seconds;
- shared: it starts at the same event, but running tasks, at most one a lane, slow each other down. A task
  that alone uses the share `demands[n, r]` of resource r takes max(1, D) times as long while D is the largest
  sum, over the resources that it uses, of the demands of all running tasks. Speeds change only where a task
  starts or ends, so this is exact, event by event. Where no sum exceeds 1 it is the first model, bit for bit.

Importing this module imports Numba; the kernels are compiled at their first call and kept in its cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Indices = NDArray[np.uint32]
Floats = NDArray[np.float64]

WAITS = 5  # the first column of waits
_OP, _LANE = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What each of n tasks follows, and the tasks of each lane in their order.

    Task n follows `before[first[n]:first[n + 1]]`: the task before it on its lane, then the last task that it
    waits for on each other lane, unless its lane has waited as long already. Lane l runs
    `queue[begin[l]:begin[l + 1]]`.
    """

    first: Indices  # [n + 1]
    before: Indices  # [m]
    begin: Indices  # [lanes + 1]
    queue: Indices  # [n]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When each task of `rows` ran, and the seconds that each takes alone."""

    rows: Ints  # [n, 5 + lanes]
    order: Order
    alone_s: Floats  # [n]
    start_s: Floats  # [n]
    end_s: Floats  # [n]

    @property
    def makespan_s(self) -> float:
        return float(self.end_s.max(initial=0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class PathShare:
    """What one operation of one lane has of the critical path; `contention_s` of its seconds are delay."""

    lane: int
    op: int
    seconds: float
    contention_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A timeline between two moments.

    `busy_s` is by lane, delay by other lanes included, and `contention_s` that delay. The critical path leads
    from the last end back through the task that let each one start: it has no gaps, so its shares, longest
    first, sum to the length of the stretch.
    """

    begin_s: float
    end_s: float
    busy_s: tuple[float, ...]
    contention_s: tuple[float, ...]
    path: tuple[PathShare, ...]

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s

    @property
    def busiest(self) -> int:
        """The lane that is busy longest; the first of equals."""
        return self.busy_s.index(max(self.busy_s))

    @property
    def bubble_s(self) -> float:
        """How long even the busiest lane idles."""
        return self.seconds - max(self.busy_s)


def simulate(rows: Ints, lanes: int, seconds: Floats, demands: Floats | None = None) -> Timeline:
    """Time the schedule `rows` [n, 5 + lanes] whose tasks take `seconds` [n] alone.

    With `demands` [n, resources], each from 0 to 1, tasks share resources; without, each runs as if alone.
    Raises ValueError where shapes disagree, a wait refers to a task that is not above, or a figure is out of
    range.
    """
    order = order_of(rows, lanes)
    start, end = _times(order, seconds, demands)
    return Timeline(rows=rows, order=order, alone_s=seconds, start_s=start, end_s=end)


def makespan(order: Order, seconds: Floats, demands: Floats | None = None) -> float:
    """The last end in seconds: `simulate` for searches that time one order many times. Raises as it does."""
    return float(_times(order, seconds, demands)[1].max(initial=0.0))


def order_of(rows: Ints, lanes: int) -> Order:
    """What the tasks of `rows` follow. Raises ValueError on a bad shape, lane or wait."""
    if lanes < 1 or rows.ndim != 2 or rows.shape[1] != WAITS + lanes:
        raise ValueError(f"a schedule of {lanes} lanes has rows of {WAITS + lanes}, not shape {rows.shape}")
    lane = rows[:, _LANE]
    if ((lane < 0) | (lane >= lanes)).any():
        raise ValueError(f"lanes are numbered 0 to {lanes - 1}")
    begin = np.concatenate(([0], np.cumsum(np.bincount(lane, minlength=lanes)))).astype(np.uint32)
    first = np.empty(len(rows) + 1, np.uint32)
    before = np.empty(len(rows) * lanes, np.uint32)
    queue = np.empty(len(rows), np.uint32)
    bad = _link(np.ascontiguousarray(rows, np.int64), begin, first, before, queue)
    if bad >= 0:
        raise ValueError(f"row {bad} waits for a task that no row above it has issued")
    return Order(first=first, before=before[: first[-1]].copy(), begin=begin, queue=queue)


def stretch(timeline: Timeline, first: int = 0, last: int | None = None) -> Stretch:
    """From the end of all rows above `first` to the end of all above `last`: what rows `first` to `last` add.

    Without bounds, the whole timeline. For one pass out of several, `first` is its first row and `last` the
    first row of the next; in the steady state that is what a pass takes, however much passes overlap. Tasks
    that cross a bound count by the part inside.
    """
    end = timeline.end_s
    begin_s = float(end[:first].max(initial=0.0))
    end_s = float(end[:last].max(initial=0.0))
    inside = np.maximum(np.minimum(end, end_s) - np.maximum(timeline.start_s, begin_s), 0.0)
    taken, delay = end - timeline.start_s, np.maximum(end - (timeline.start_s + timeline.alone_s), 0.0)
    lost = np.divide(inside * delay, taken, out=np.zeros_like(taken), where=taken > 0)
    lane, lanes = timeline.rows[:, _LANE], len(timeline.order.begin) - 1
    return Stretch(
        begin_s=begin_s,
        end_s=end_s,
        busy_s=tuple(np.bincount(lane, inside, lanes).tolist()),
        contention_s=tuple(np.bincount(lane, lost, lanes).tolist()),
        path=_shares(timeline.rows, _path(timeline, begin_s, end_s), inside, lost),
    )


def _path(timeline: Timeline, begin_s: float, end_s: float) -> list[int]:
    """Tasks from one that ends at `end_s` back to one that runs at `begin_s`, each waiting for the next."""
    start, end = timeline.start_s, timeline.end_s
    first, before = timeline.order.first, timeline.order.before
    path: list[int] = np.flatnonzero(end == end_s)[:1].tolist()
    while path and start[path[-1]] > begin_s:
        follows = before[first[path[-1]] : first[path[-1] + 1]]
        path.append(int(follows[end[follows].argmax()]))
    return path


def _shares(rows: Ints, path: list[int], inside: Floats, lost: Floats) -> tuple[PathShare, ...]:
    sums: dict[tuple[int, int], tuple[float, float]] = {}
    for task in path:
        at = int(rows[task, _LANE]), int(rows[task, _OP])
        seconds, contention = sums.get(at, (0.0, 0.0))
        sums[at] = seconds + float(inside[task]), contention + float(lost[task])
    shares = [PathShare(lane=at[0], op=at[1], seconds=s, contention_s=c) for at, (s, c) in sums.items() if s]
    return tuple(sorted(shares, key=lambda share: (-share.seconds, share.lane, share.op)))


def _times(order: Order, seconds: Floats, demands: Floats | None) -> tuple[Floats, Floats]:
    """Start and end of each task."""
    tasks = len(order.queue)
    if seconds.shape != (tasks,) or not ((seconds >= 0) & (seconds < np.inf)).all():
        raise ValueError(f"seconds are {tasks} finite figures, none below 0")
    start, end = np.empty(tasks), np.empty(tasks)
    contested = _contested(order, demands)
    seconds = np.ascontiguousarray(seconds, np.float64)
    if contested.shape[1]:
        _share(order.first, order.before, order.begin, order.queue, seconds, contested, start, end)
    else:
        _run(order.first, order.before, seconds, start, end)
    return start, end


def _contested(order: Order, demands: Floats | None) -> Floats:
    """The columns of `demands` in which one task of each lane can together want more than there is."""
    tasks = len(order.queue)
    if demands is None:
        return np.empty((tasks, 0))
    shares = demands.min(initial=0.0) >= 0 and demands.max(initial=0.0) <= 1
    if demands.ndim != 2 or len(demands) != tasks or not shares:
        raise ValueError(f"demands are {tasks} rows of shares from 0 to 1")
    demands = np.ascontiguousarray(demands, np.float64)
    scarce = _most_wanted(order.begin, order.queue, demands).sum(axis=0) > 1.0
    return demands if scarce.all() else np.ascontiguousarray(demands[:, scarce])


@njit(cache=True)
def _link(rows: Any, begin: Any, first: Any, before: Any, queue: Any) -> int:
    """Fill `first`, `before` and `queue`; the first row whose wait is not above it, or -1."""
    lanes = len(begin) - 1
    issued = np.zeros(lanes, np.int64)
    waited = np.zeros((lanes, lanes), np.int64)
    edges = 0
    for task in range(len(rows)):
        first[task] = edges
        lane = rows[task, _LANE]
        if issued[lane]:
            before[edges] = queue[begin[lane] + issued[lane] - 1]
            edges += 1
        for other in range(lanes):
            count = rows[task, WAITS + other]
            if count < 0 or count > issued[other]:
                return task
            if other != lane and count > waited[lane, other]:
                waited[lane, other] = count
                before[edges] = queue[begin[other] + count - 1]
                edges += 1
        queue[begin[lane] + issued[lane]] = task
        issued[lane] += 1
    first[len(rows)] = edges
    return -1


@njit(cache=True)
def _most_wanted(begin: Any, queue: Any, demands: Any) -> Any:
    """By lane and resource: the most that a task of the lane wants."""
    lanes, resources = len(begin) - 1, demands.shape[1]
    most = np.zeros((lanes, resources))
    for lane in range(lanes):
        for place in range(begin[lane], begin[lane + 1]):
            for resource in range(resources):
                most[lane, resource] = max(most[lane, resource], demands[queue[place], resource])
    return most


@njit(cache=True)
def _run(first: Any, before: Any, seconds: Any, start: Any, end: Any) -> None:
    """Each task alone: it starts at the last end of what it follows."""
    for task in range(len(seconds)):
        at = 0.0
        for edge in range(first[task], first[task + 1]):
            at = max(at, end[before[edge]])
        start[task] = at
        end[task] = at + seconds[task]


@njit(cache=True)
def _share(
    first: Any, before: Any, begin: Any, queue: Any, seconds: Any, demands: Any, start: Any, end: Any
) -> None:
    """Tasks sharing resources: from event to event, where an event is the end of at least one task.

    A speed that stays leaves its task untouched, so without contention nothing is rounded. One long function:
    with parts of it in kernels of their own it ran at a third of the speed.
    """
    lanes, resources = len(begin) - 1, demands.shape[1]
    done = np.zeros(len(seconds), np.bool_)
    # By lane: its next place in `queue`, that task, and the first that it follows and that may not be done.
    place, task, edge = begin[:-1].astype(np.int64), np.full(lanes, -1), np.zeros(lanes, np.int64)
    # By lane, of the task that runs: its last change of speed, the seconds left then, how many times longer
    # they take, when it is due, what it uses.
    since, left, slow, due = np.zeros(lanes), np.zeros(lanes), np.ones(lanes), np.full(lanes, np.inf)
    use, wanted = np.zeros((lanes, resources)), np.zeros(resources)
    now, todo = 0.0, len(seconds)
    while todo:
        for lane in range(lanes):
            if due[lane] < np.inf or place[lane] == begin[lane + 1]:
                continue
            if task[lane] < 0:
                task[lane] = queue[place[lane]]
                edge[lane] = first[task[lane]]
            at = task[lane]
            while edge[lane] < first[at + 1] and done[before[edge[lane]]]:
                edge[lane] += 1
            if edge[lane] == first[at + 1]:
                start[at] = since[lane] = now
                left[lane], slow[lane], due[lane] = seconds[at], 1.0, now + seconds[at]
                for resource in range(resources):
                    use[lane, resource] = demands[at, resource]
        for resource in range(resources):
            total = 0.0
            for lane in range(lanes):
                total += use[lane, resource]
            wanted[resource] = total
        soonest = np.inf
        for lane in range(lanes):
            most = 1.0
            for resource in range(resources):
                if use[lane, resource] > 0.0:
                    most = max(most, wanted[resource])
            if most != slow[lane] and due[lane] < np.inf:
                left[lane] = max(0.0, left[lane] - (now - since[lane]) / slow[lane])
                since[lane], slow[lane], due[lane] = now, most, now + left[lane] * most
            soonest = min(soonest, due[lane])
        now = soonest
        for lane in range(lanes):
            if due[lane] == now:
                end[task[lane]] = now
                done[task[lane]] = True
                due[lane], task[lane] = np.inf, -1
                for resource in range(resources):
                    use[lane, resource] = 0.0
                place[lane] += 1
                todo -= 1
