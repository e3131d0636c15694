"""Schedule programs: ordering derived from reads and writes, proved, and mutated to see the proof bite."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import networkx as nx
import numpy as np
import pytest

from moeplan.codegen.emit.schedule_py import schedule_text
from moeplan.planner import programs
from moeplan.planner.ir.schedule import LANES, OPS, Phase, Schedule
from moeplan.planner.verify import VerificationError, prove_race_free, verify_schedule

PHASES: list[Phase] = ["prefill", "decode", "decode"]


def make(kind: str, **changes: object) -> Schedule:
    base = Schedule(
        kind="stream",
        layers=3,
        micro_batches=2,
        pages_per_layer=5,
        resident_pages=1,
        slots=3,
        lookahead=0,
        staged=False,
        gpu_attended=0,
        cache_up=0,
        decode_cpu_experts=False,
        prefill_cpu_experts=False,
        disk_pages=0,
        tasks_per_decode_pass=0,
        lane_tasks=(),
        waits_per_decode_pass=0,
    )
    return replace(base, kind=kind, **changes)  # type: ignore[arg-type]


def cgopipe(layers: int, micro_batches: int, staged: bool, **changes: object) -> Schedule:
    lookahead = min(2, micro_batches - 1)
    return make(
        "cgopipe",
        layers=layers,
        micro_batches=micro_batches,
        pages_per_layer=micro_batches,
        resident_pages=0,
        slots=micro_batches + 2,
        lookahead=lookahead,
        staged=staged,
        **changes,
    )


def shared(layers: int, on_gpu: int, cache_up: int, on_cpu: int, disk_pages: int = 0) -> Schedule:
    """Attention three ways, the CPU computing a part of the experts in decode."""
    count = on_gpu + cache_up + on_cpu
    ways = {"gpu_attended": on_gpu, "cache_up": cache_up, "disk_pages": disk_pages}
    return cgopipe(layers, count, disk_pages > 0, decode_cpu_experts=True, **ways)


def unmoved(layers: int, on_gpu: int, cache_up: int, on_cpu: int) -> Schedule:
    """No expert moves: the CPU computes those that are not resident in both phases."""
    return replace(
        shared(layers, on_gpu, cache_up, on_cpu), prefill_cpu_experts=True, pages_per_layer=0, slots=0
    )


SHARED = [
    *[
        shared(layers, *ways)
        for layers in (1, 3)
        for ways in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 3), (3, 2, 1))
    ],
    *[unmoved(layers, *ways) for layers in (1, 3) for ways in ((1, 0, 0), (0, 0, 1), (2, 2, 2))],
    cgopipe(3, 4, False, gpu_attended=2, cache_up=1),
    cgopipe(3, 4, True, disk_pages=3),
    shared(2, 1, 2, 1, disk_pages=2),
]


SCHEDULES = [
    make("stream"),
    make("stream", resident_pages=5, slots=0),
    make("stream", resident_pages=0, slots=1, layers=1, micro_batches=1),
    make("stream", resident_pages=0, slots=7, micro_batches=4),
    *[cgopipe(layers, n, staged) for layers in (1, 2, 3) for n in (1, 2, 3, 6) for staged in (True, False)],
    *SHARED,
]


@pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda s: f"{s.kind}-{s.layers}x{s.micro_batches}-{s.staged}"
)
def test_every_program_is_race_free(schedule: Schedule) -> None:
    """Vector clocks, an argument independent of how the waits were made, find no unordered conflict."""
    verify_schedule(schedule)


@pytest.mark.parametrize(
    "schedule", SCHEDULES[:4] + SCHEDULES[-4:], ids=lambda s: f"{s.kind}-{s.micro_batches}"
)
def test_graph_is_acyclic_and_orders_each_lane(schedule: Schedule) -> None:
    tasks = programs.passes(schedule, PHASES)
    graph = programs.task_graph(schedule.kind, tasks)
    assert nx.is_directed_acyclic_graph(graph)
    for lane in LANES[schedule.kind]:
        own = [at for at, task in enumerate(tasks) if task.lane == lane]
        assert all(graph.has_edge(a, b) for a, b in itertools.pairwise(own))


@pytest.mark.parametrize(
    "schedule",
    [
        make("stream", slots=2, resident_pages=0),
        cgopipe(3, 3, True),
        cgopipe(2, 1, True),
        cgopipe(3, 2, False),
        shared(2, 1, 2, 1, disk_pages=2),
        unmoved(2, 1, 2, 1),
    ],
    ids=["stream", "cgopipe", "cgopipe-1", "cgopipe-pinned", "shared", "unmoved"],
)
def test_dropping_a_needed_wait_is_detected(schedule: Schedule) -> None:
    """Each wait is removed in turn. The proof must notice unless other orders already imply it."""
    tasks = programs.passes(schedule, PHASES)
    waits = list(programs.waits(schedule.kind, tasks))
    noticed = 0
    for at, row in enumerate(waits):
        for lane, count in enumerate(row):
            if not count:
                continue
            mutant = [*waits[:at], (*row[:lane], 0, *row[lane + 1 :]), *waits[at + 1 :]]
            implied = _implied(schedule, mutant, tasks, at, lane, count)
            if implied:
                prove_race_free(schedule, tasks, mutant)
            else:
                noticed += 1
                with pytest.raises(VerificationError, match="races on"):
                    prove_race_free(schedule, tasks, mutant)
    assert noticed > 10


def _implied(
    schedule: Schedule, waits: list[programs.Waits], tasks: object, at: int, lane: int, count: int
) -> bool:
    """Whether the other edges already order the `count`-th task of `lane` before task `at`."""
    assert isinstance(tasks, tuple)
    lanes = LANES[schedule.kind]
    graph: nx.DiGraph[int] = nx.DiGraph()
    positions: dict[str, list[int]] = {name: [] for name in lanes}
    for number, (task, row) in enumerate(zip(tasks, waits, strict=True)):
        graph.add_node(number)
        if positions[task.lane]:
            graph.add_edge(positions[task.lane][-1], number)
        for other, needed in enumerate(row):
            if needed:
                graph.add_edge(positions[lanes[other]][needed - 1], number)
        positions[task.lane].append(number)
    return nx.has_path(graph, positions[lanes[lane]][count - 1], at)


def test_a_wait_for_a_later_task_is_a_deadlock() -> None:
    schedule = make("stream")
    tasks = programs.passes(schedule, PHASES)
    waits = list(programs.waits(schedule.kind, tasks))
    waits[0] = (0, len(tasks))
    with pytest.raises(VerificationError, match="waits for a later task"):
        prove_race_free(schedule, tasks, waits)


@pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda s: f"{s.kind}-{s.layers}x{s.micro_batches}-{s.staged}"
)
def test_each_task_runs_once_per_pass(schedule: Schedule) -> None:
    """Conservation: every micro-batch passes through every layer once, every streamed page moves once."""
    first = len(programs.passes(schedule, ["prefill"]))
    decode = programs.passes(schedule, ["prefill", "decode"])[first:]
    seen = [(task.op, task.layer, task.item) for task in decode]
    assert len(seen) == len(set(seen))
    attention = ("attention",) if schedule.kind == "stream" else ("cpu_attention", "gpu_attention")
    pages = "read" if schedule.kind == "stream" else "copy_page"
    moved = schedule.pages_per_layer - schedule.resident_pages
    assert sum(op in attention for op, _, _ in seen) == schedule.layers * schedule.micro_batches
    assert sum(op == pages for op, _, _ in seen) == schedule.layers * moved


def load(schedule: Schedule, folder: Path) -> ModuleType:
    name = f"schedule_{abs(hash(schedule))}"
    path = folder / f"{name}.py"
    path.write_text(schedule_text(schedule))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def issued(module: ModuleType, schedule: Schedule) -> list[tuple[int, ...]]:
    clock = module.new_clock()
    rows = np.zeros((20_000, module.COLUMNS), dtype=np.int64)
    end = 0
    for phase in PHASES:
        start = end
        end = module.issue(clock, rows, int(phase == "decode"), schedule.micro_batches, start)
        assert end - start <= module.max_rows(schedule.micro_batches)
    return [tuple(row) for row in rows[:end].tolist()]


def expected(schedule: Schedule) -> list[tuple[int, ...]]:
    tasks = programs.passes(schedule, PHASES)
    ops, lanes = OPS[schedule.kind], LANES[schedule.kind]
    return [
        (ops.index(t.op), lanes.index(t.lane), t.layer, t.item, t.slot, *row)
        for t, row in zip(tasks, programs.waits(schedule.kind, tasks), strict=True)
    ]


@pytest.mark.parametrize("schedule", [SCHEDULES[0], cgopipe(3, 4, True)], ids=["stream", "cgopipe"])
def test_compiled_schedule_equals_the_graph(schedule: Schedule, tmp_path: Path) -> None:
    """The emitted module, compiled by Numba, issues the planner's tasks and waits row by row."""
    assert issued(load(schedule, tmp_path), schedule) == expected(schedule)


_PLAIN = """
import sys
sys.path.insert(0, {folder!r})
from test_programs import SCHEDULES, expected, issued, load
from pathlib import Path
for schedule in SCHEDULES:
    assert issued(load(schedule, Path({out!r})), schedule) == expected(schedule)
"""


def test_plain_python_schedule_equals_the_graph(tmp_path: Path) -> None:
    """The same text without Numba's compiler, for every schedule above."""
    code = _PLAIN.format(folder=str(Path(__file__).parent), out=str(tmp_path))
    env = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
