"""Schedule programs: the loops that issue one pass, and the ordering that their reads and writes imply.

A program yields tasks in issue order. Each lane runs its tasks in that order, so the only orders left to
enforce are between lanes, and they are *derived*: a task waits for the last write of what it reads, and for
the last write and all later reads of what it writes. `issue` in every emitted schedule.py is the same loops
and the same rule in Numba; the tests compare the two row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import networkx as nx

from moeplan.planner.ir.schedule import LANES, Buffer, Phase, Schedule, ScheduleKind, Task

Waits = tuple[int, ...]
Program = Callable[[Schedule, Phase, int, int], Iterator[Task]]


def passes(schedule: Schedule, phases: Sequence[Phase]) -> tuple[Task, ...]:
    """The tasks of consecutive passes, micro-batches full. Buffers carry over from pass to pass."""
    program = PROGRAMS[schedule.kind]
    return tuple(
        task
        for number, phase in enumerate(phases)
        for task in program(schedule, phase, schedule.micro_batches, number)
    )


def _stream(s: Schedule, phase: Phase, micro_batches: int, number: int) -> Iterator[Task]:
    """Disk, DRAM, cores: page after page of each layer, over all tokens, while the next pages are read."""
    del phase  # prefill and decode differ in tokens per sequence only
    hidden: Buffer = ("hidden",)
    page = number * s.layers * (s.pages_per_layer - s.resident_pages)
    yield Task(op="embed", lane="compute", layer=0, item=0, slot=-1, reads=(), writes=(hidden,))
    for layer in range(s.layers):
        for p in range(s.pages_per_layer):
            slot = -1
            if p >= s.resident_pages:
                slot = page % s.slots
                page += 1
                yield Task(
                    op="read", lane="disk", layer=layer, item=p, slot=slot, reads=(), writes=(("slot", slot),)
                )
            weights: tuple[Buffer, ...] = (("slot", slot),) if slot >= 0 else ()
            if p == 0:
                for j in range(micro_batches):
                    yield _compute("attention", layer, j, slot, (*weights, hidden), (hidden,))
                yield _compute("route", layer, 0, -1, (hidden,), (("routing",),))
            else:
                yield _compute("experts", layer, p, slot, (*weights, hidden, ("routing",)), (hidden,))
    yield _compute("head", s.layers - 1, 0, -1, (hidden,), (("tokens",),))


def _compute(
    op: str, layer: int, item: int, slot: int, reads: tuple[Buffer, ...], writes: tuple[Buffer, ...]
) -> Task:
    return Task(op=op, lane="compute", layer=layer, item=item, slot=slot, reads=reads, writes=writes)


def _cgopipe(s: Schedule, phase: Phase, micro_batches: int, number: int) -> Iterator[Task]:
    """GPU, link, CPU. Source: MoE-Lightning (ASPLOS'25), Algorithm 1, its index slips corrected.

    Pages form one endless stream over all layers of all passes: while layer i computes, the pages of the
    layer that follows (the first layer of the next pass after the last) are copied, one a micro-batch.
    """
    pages = _PageStream(s)
    first = number * s.layers  # the pass's first layer in the endless stream
    if number == 0:
        yield from pages.fill()
    yield Task(op="embed", lane="gpu", layer=0, item=0, slot=-1, reads=(("token",),), writes=(("hidden",),))
    body = _prefill_layer if phase == "prefill" else _decode_layer
    ahead = min(s.lookahead, micro_batches - 1)
    if phase == "decode":
        for j in range(ahead):
            yield from _attend(s, 0, j, micro_batches)
    for layer in range(s.layers):
        for j in range(max(micro_batches, s.pages_per_layer)):
            page = (first + layer + 1) * s.pages_per_layer + j
            if j < micro_batches:
                yield from body(s, layer, j, micro_batches, ahead, pages, page, first)
            elif j < s.pages_per_layer:
                yield from pages.advance(page)
    cpu_experts = s.prefill_cpu_experts if phase == "prefill" else s.decode_cpu_experts
    partials = range(micro_batches if cpu_experts else 0)
    for j in partials:
        yield _load_partial(s.layers - 1, j)
    reads: tuple[Buffer, ...] = (("hidden",), *(("partial", j) for j in partials))
    yield Task(op="head", lane="gpu", layer=s.layers - 1, item=0, slot=-1, reads=reads, writes=(("token",),))


@dataclass(frozen=True, slots=True)
class _PageStream:
    """The endless stream of weight pages: staged (if at all) `ahead` pages before they are copied."""

    s: Schedule

    @property
    def ahead(self) -> int:
        return max(1, self.s.lookahead)

    def fill(self) -> Iterator[Task]:
        """Before the first pass: all pages of the first layer, and the staging lead of the second."""
        if not self.s.pages_per_layer:
            return
        for page in range(self.s.pages_per_layer):
            yield from self._stage(page)
            yield from self._copy(page)
        for page in range(self.s.pages_per_layer, self.s.pages_per_layer + self.ahead):
            yield from self._stage(page)

    def advance(self, page: int) -> Iterator[Task]:
        """Copy `page` and stage the page `ahead` of it."""
        yield from self._copy(page)
        yield from self._stage(page + self.ahead)

    def weights(self, stream_layer: int) -> tuple[Buffer, ...]:
        return tuple(("weights", stream_layer % 2, p) for p in range(self.s.pages_per_layer))

    def _stage(self, page: int) -> Iterator[Task]:
        if not self.s.staged:
            return
        layer, p = divmod(page, self.s.pages_per_layer)
        slot = page % self.s.slots
        from_disk = p >= self.s.pages_per_layer - self.s.disk_pages
        yield Task(
            op="read_page" if from_disk else "stage_page",
            lane="disk" if from_disk else "copier",
            layer=layer % self.s.layers,
            item=p,
            slot=slot,
            reads=(),
            writes=(("pinned", slot),),
        )

    def _copy(self, page: int) -> Iterator[Task]:
        layer, p = divmod(page, self.s.pages_per_layer)
        slot = page % self.s.slots if self.s.staged else -1
        yield Task(
            op="copy_page",
            lane="h2d",
            layer=layer % self.s.layers,
            item=p,
            slot=layer % 2,
            reads=(("pinned", slot),) if self.s.staged else (),
            writes=(("weights", layer % 2, p),),
        )


def _decode_layer(
    s: Schedule, layer: int, j: int, micro_batches: int, ahead: int, pages: _PageStream, page: int, first: int
) -> Iterator[Task]:
    if ahead == 0:
        yield from _attend(s, layer, j, micro_batches)
    if _on_cpu(s, j):
        yield _task("load_hidden", "h2d", layer, j, (("hidden_pin", j),), (("attended", j),))
    if j < s.pages_per_layer:
        yield from pages.advance(page)
    reads = (("attended", j), *pages.weights(first + layer))
    writes: tuple[Buffer, ...] = (("hidden",), ("routed", j)) if s.decode_cpu_experts else (("hidden",),)
    yield _task("post_attention", "gpu", layer, j, reads, writes, (first + layer) % 2)
    if s.decode_cpu_experts:
        yield from _cpu_experts(layer, j)
    if ahead > 0:
        yield from _attend(s, layer, j + ahead, micro_batches)


def _on_cpu(s: Schedule, j: int) -> bool:
    """Whether micro-batch j attends on the CPU; those that do not are the last."""
    return j < s.micro_batches - s.gpu_attended - s.cache_up


def _copied_up(s: Schedule, j: int) -> bool:
    return not _on_cpu(s, j) and j < s.micro_batches - s.gpu_attended


def _task(
    op: str,
    lane: str,
    layer: int,
    j: int,
    reads: tuple[Buffer, ...],
    writes: tuple[Buffer, ...],
    slot: int = -1,
) -> Task:
    return Task(op=op, lane=lane, layer=layer, item=j, slot=slot, reads=reads, writes=writes)


def _attend(s: Schedule, layer: int, j: int, micro_batches: int) -> Iterator[Task]:
    """Attention of micro-batch j, on the GPU or on the CPU; past the last micro-batch: the next layer.

    It needs the whole output of the layer before: what the CPU's experts added is loaded first.
    """
    if j >= micro_batches:
        layer, j = layer + 1, j - micro_batches
    if layer >= s.layers:
        return
    reads: tuple[Buffer, ...] = (("hidden",),)
    if s.decode_cpu_experts and layer > 0:
        yield _load_partial(layer - 1, j)
        reads = (("hidden",), ("partial", j))
    if _on_cpu(s, j):
        yield _task("pre_attention", "gpu", layer, j, reads, (("qkv", j),))
        yield _task("offload_qkv", "d2h", layer, j, (("qkv", j),), (("qkv_pin", j),))
        yield _task("cpu_attention", "cpu", layer, j, (("qkv_pin", j),), (("hidden_pin", j), ("kv", j)))
    elif _copied_up(s, j):
        yield _task("load_kv", "h2d", layer, j, (("kv", j),), (("kv_in", j % 2),), j % 2)
        reads = (*reads, ("kv_in", j % 2))
        yield _task("gpu_attention", "gpu", layer, j, reads, (("attended", j), ("kv_out", j % 2)), j % 2)
        yield _task("store_kv", "d2h", layer, j, (("kv_out", j % 2),), (("kv", j),), j % 2)
    else:
        yield _task("gpu_attention", "gpu", layer, j, reads, (("attended", j),))


def _cpu_experts(layer: int, j: int) -> Iterator[Task]:
    """The routed hidden states of micro-batch j to the host, and the CPU's experts over them."""
    yield _task("offload_routed", "d2h", layer, j, (("routed", j),), (("routed_pin", j),))
    yield _task("cpu_experts", "cpu", layer, j, (("routed_pin", j),), (("partial_pin", j),))


def _load_partial(layer: int, j: int) -> Task:
    """What the CPU's experts add to micro-batch j, to the GPU: as late as possible, the link is in order."""
    return _task("load_partial", "h2d", layer, j, (("partial_pin", j),), (("partial", j),))


def _prefill_layer(
    s: Schedule, layer: int, j: int, micro_batches: int, ahead: int, pages: _PageStream, page: int, first: int
) -> Iterator[Task]:
    """The layer on the GPU for one micro-batch, the CPU's experts aside; its keys and values go to the host
    unless they stay on the GPU."""
    del micro_batches, ahead
    if j < s.pages_per_layer:
        yield from pages.advance(page)
    reads = pages.weights(first + layer)
    if s.prefill_cpu_experts and layer > 0:
        yield _load_partial(layer - 1, j)
        reads = (("partial", j), *reads)
    stored = _on_cpu(s, j) or _copied_up(s, j)
    writes: tuple[Buffer, ...] = (("hidden",),)
    writes += (("routed", j),) if s.prefill_cpu_experts else ()
    writes += (("kv_out", j % 2),) if stored else ()
    yield _task("prefill_layer", "gpu", layer, j, reads, writes, (first + layer) % 2)
    if s.prefill_cpu_experts:
        yield from _cpu_experts(layer, j)
    if stored:
        yield _task("store_kv", "d2h", layer, j, (("kv_out", j % 2),), (("kv", j),), j % 2)


PROGRAMS: dict[ScheduleKind, Program] = {"stream": _stream, "cgopipe": _cgopipe}


@dataclass(slots=True)
class _Access:
    """The last write of a buffer as (lane, count), and per lane the count of its last read since."""

    writer: tuple[int, int] | None = None
    readers: dict[int, int] = field(default_factory=dict)


def waits(kind: ScheduleKind, tasks: Sequence[Task]) -> tuple[Waits, ...]:
    """For each task, per lane: how many of that lane's tasks must be complete before it starts (0: none).

    Waits on the task's own lane are left out: the lane's order already holds them.
    """
    lanes = {lane: number for number, lane in enumerate(LANES[kind])}
    issued = [0] * len(lanes)
    buffers: dict[Buffer, _Access] = {}
    result = []
    for task in tasks:
        lane = lanes[task.lane]
        issued[lane] += 1
        row = [0] * len(lanes)
        for other, count in _orders(task, lane, issued[lane], buffers):
            if other != lane:
                row[other] = max(row[other], count)
        result.append(tuple(row))
    return tuple(result)


def _orders(task: Task, lane: int, count: int, buffers: dict[Buffer, _Access]) -> Iterator[tuple[int, int]]:
    """The (lane, count) pairs that `task` must follow; records its accesses."""
    for buffer in task.reads:
        access = buffers.setdefault(buffer, _Access())
        if access.writer is not None:
            yield access.writer
        access.readers[lane] = count
    for buffer in task.writes:
        access = buffers.setdefault(buffer, _Access())
        if access.writer is not None:
            yield access.writer
        yield from access.readers.items()
        buffers[buffer] = _Access(writer=(lane, count))


def task_graph(kind: ScheduleKind, tasks: Sequence[Task]) -> nx.DiGraph[int]:
    """The tasks (by position) with an edge for each lane order and each wait."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(len(tasks)))
    lanes = LANES[kind]
    positions: dict[str, list[int]] = {lane: [] for lane in lanes}
    for at, (task, row) in enumerate(zip(tasks, waits(kind, tasks), strict=True)):
        if positions[task.lane]:
            graph.add_edge(positions[task.lane][-1], at)
        graph.add_edges_from((positions[lanes[n]][count - 1], at) for n, count in enumerate(row) if count)
        positions[task.lane].append(at)
    return graph
