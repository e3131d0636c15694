"""Simulated against executed: a decode pass of every schedule on this machine, the CPU in a GPU's place.

usage: python benchmarks/schedule_accuracy.py [--rounds N]

The seconds of every task, and the part of a core that it keeps busy meanwhile, are measured in the sequential
schedule, where no two tasks run at once (reads that a stream plan issues back to back: back to back). The
simulator predicts all other schedules from these: lanes that
want more cores together than there are slow each other down. Passes of all schedules are taken in turn, so
that a machine whose speed drifts treats all alike; a figure is the median over rounds. "gain" is what the
schedule saves of the sequential pass. Checkpoints are written under build/bench once.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from moeplan.runtime_min.cpu import cap_onednn

cap_onednn()

import tables  # noqa: E402
import torch  # noqa: E402
from checkpoints import BUILD, Shape, weights_bytes, write_checkpoint  # noqa: E402
from plans import model_of  # noqa: E402
from runtime_accuracy import MIDDLE  # noqa: E402

from moeplan.codegen.emit.schedule_py import schedule_text  # noqa: E402
from moeplan.planner import schedules  # noqa: E402
from moeplan.planner.ir.schedule import OffloadConstants, Schedule, StreamConstants  # noqa: E402
from moeplan.planner.programs import ops  # noqa: E402
from moeplan.planner.simulate.decode import time_decode  # noqa: E402
from moeplan.planner.strategies.task_costs import TaskCost  # noqa: E402
from moeplan.runtime_min import offload as offload_engine  # noqa: E402
from moeplan.runtime_min import plan_file  # noqa: E402
from moeplan.runtime_min import stream as stream_engine  # noqa: E402
from moeplan.runtime_min.engine import Batches, Generation  # noqa: E402
from moeplan.runtime_min.lanes import Lanes  # noqa: E402
from moeplan.runtime_min.offload import Offload  # noqa: E402
from moeplan.runtime_min.plan_file import RuntimePlan, load  # noqa: E402
from moeplan.runtime_min.sampling import Sampling  # noqa: E402
from moeplan.runtime_min.stream import Engine  # noqa: E402

CORES = os.cpu_count() or 1
SKIPPED = 3  # decode passes until the steady state
ANY = plan_file.Range(value=1.0, low=0.0, high=1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan: a model, sequences in micro-batches, prompts and outputs of one size, and where the work is."""

    name: str
    model: Shape
    constants: OffloadConstants | StreamConstants
    sequences: int
    micro_batch: int
    prompt: int = 64
    output: int = 12
    disk_experts: int = 0

    @property
    def schedules(self) -> list[Schedule]:
        """Those that have names, and the best that rewrites make of CGOPipe."""
        stream = isinstance(self.constants, StreamConstants)
        names = schedules.STREAM if stream else schedules.OFFLOAD
        made = [schedules.named(self.constants, name) for name in names]
        if not stream:
            further = schedules.begin_next_step(made[-1])
            made.append(replace(further, name="CGOPipe + begin next step"))
        return made


def offload(layers: int, n: int, **changes: int) -> OffloadConstants:
    """All experts streamed in n pages out of host memory, all attention on the CPU."""
    base = OffloadConstants(*[0] * len(OffloadConstants._fields))
    sizes = {"layers": layers, "micro_batches": n, "pieces": 4, "pages": n, "lead": 1, "cpu_attended": n}
    return base._replace(**{**sizes, **changes})


CASES = (
    Case(
        name="offloaded, pinned",
        model=MIDDLE,
        constants=offload(8, 6),
        sequences=96,
        micro_batch=16,
        prompt=192,
    ),
    Case(
        name="offloaded, half attends on the GPU",
        model=MIDDLE,
        constants=offload(8, 6, cpu_attended=3, copied_up=3),
        sequences=96,
        micro_batch=16,
        prompt=192,
    ),
    Case(
        name="offloaded, staged",
        model=MIDDLE,
        constants=offload(8, 4, slots=6),
        sequences=64,
        micro_batch=16,
    ),
    Case(
        name="offloaded, from disk",
        model=MIDDLE,
        constants=offload(8, 4, slots=6, disk_pages=4),
        sequences=256,
        micro_batch=64,
        disk_experts=8,
    ),
    Case(
        name="streamed from disk",
        model=MIDDLE,
        constants=StreamConstants(
            layers=8, pages=9, resident=0, slots=4, places=0, guesses=0, lead=0, across=0, barrier=0, lean=0
        ),
        sequences=256,
        micro_batch=128,
    ),
)


class Pass(NamedTuple):
    """Its seconds, and a count at its beginning and its end."""

    seconds: float
    first: int
    last: int


class Recorded(Lanes):
    """Lanes that keep how long each row took, and for how long it had a core."""

    taken: list[tuple[int, float, float]]

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.taken = []
        self._under_way: dict[int, list[Any]] = {}

    def _begin(self, lane: Any, row: Any, blocks: Any) -> None:
        super()._begin(lane, row, blocks)
        self._under_way[id(lane.begun[-1])] = [row[0], time.perf_counter(), 0.0] if lane.begun else []

    def _do(self, lane: Any, begun: Any, block: Any) -> None:
        own = time.thread_time()
        super()._do(lane, begun, block)
        record = self._under_way[id(begun)]
        record[2] += time.thread_time() - own
        if begun.blocks_left == 0:
            self.taken.append((record[0], time.perf_counter() - record[1], record[2]))


@contextmanager
def recording() -> Iterator[None]:
    """Engines made meanwhile record."""
    before = offload_engine.Lanes, stream_engine.Lanes
    offload_engine.Lanes = stream_engine.Lanes = Recorded  # type: ignore[misc]
    try:
        yield
    finally:
        offload_engine.Lanes, stream_engine.Lanes = before  # type: ignore[misc]


def plan_of(case: Case, schedule: Schedule, text: str) -> RuntimePlan:
    """The runtime's plan, with memory enough."""
    model = model_of(case.model.folder)
    c, stream = schedule.constants, schedule.kind == "stream"
    experts = 1 if stream else 0
    pages = plan_file.PagePlan(
        pages_per_layer=c.pages,
        experts_per_page=experts,
        resident_pages=0,
        slots=c.slots,
        slot_bytes=0,
        readers=4,
        block_bytes=1 << 20,
        places=0,
        guesses=0,
    )
    if stream:
        pages = replace(pages, slot_bytes=plan_file.slot_bytes(model, pages, 2))
    batch = plan_file.BatchPlan(
        sequences=case.sequences,
        micro_batch=case.micro_batch,
        prefill_tokens=2048,
        prompt_tokens=case.prompt,
        pass_tokens=case.sequences * case.prompt,
        kv_tokens=case.sequences * (case.prompt + case.output),
        kv_cache="same",
        context_tokens=case.prompt + case.output,
    )
    held = replace(plan_file.NO_OFFLOAD, gpus=1, disk_experts=case.disk_experts, budget_bytes=8 << 30)
    return RuntimePlan(
        format=plan_file.FORMAT,
        name=case.name,
        device="cpu" if stream else "accelerator",
        threads=1,
        model=replace(model, parameters=weights_bytes(case.model) // 2),
        batch=batch,
        pages=pages,
        offload=plan_file.NO_OFFLOAD if stream else held,
        memory=plan_file.MemoryPlan(
            budget_bytes=32 << 30,
            weights_bytes=8 << 30,
            slots_bytes=4 << 30,
            kv_bytes=8 << 30,
            workspace_bytes=8 << 30,
            process_bytes=1 << 30,
        ),
        schedule=plan_file.SchedulePlan(
            kind=schedule.kind,
            format=plan_file.SCHEDULE_FORMAT,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        ),
        predicted=plan_file.Predicted(
            prefill_tokens_per_s=ANY, decode_tokens_per_s=ANY, generated_tokens_per_s=ANY
        ),
    )


def load_engine(case: Case, schedule: Schedule) -> Batches:
    """The case's engine, under one schedule."""
    write_checkpoint(case.model)
    folder = BUILD / "schedules" / hashlib.sha256(repr((case.name, schedule.name)).encode()).hexdigest()[:12]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    text = schedule_text(schedule)
    (folder / "schedule.py").write_text(text)
    (folder / "runtime.json").write_text(plan_file.to_json(plan_of(case, schedule, text)))
    plan = load(folder)
    if schedule.kind == "stream":
        return Engine(folder, plan, case.model.folder)
    return Offload(folder, plan, case.model.folder, torch.device("cpu"))


def decode_passes(engine: Batches, case: Case, rows: Callable[[], int] = lambda: 0) -> list[Pass]:
    """The decode passes of one batch in the steady state, with what `rows` is at their ends."""
    numbers = random.Random(0)
    prompts = [numbers.choices(range(case.model.vocab), k=case.prompt) for _ in range(case.sequences)]
    ends: list[tuple[float, int]] = []
    work = [Generation(prompt, case.output, Sampling(0.0, 1.0, 0)) for prompt in prompts]
    engine.run(work, after_pass=lambda: ends.append((time.perf_counter(), rows())))
    passes = [Pass(t1 - t0, n0, n1) for (t0, n0), (t1, n1) in itertools.pairwise(ends)]
    return passes[SKIPPED:-1]  # the last does nothing for a next


def measure_tasks(case: Case, sequential: Schedule) -> tuple[dict[str, TaskCost], float]:
    """What each task of a decode pass takes in the sequential schedule, and what the pass takes."""
    with recording(), load_engine(case, sequential) as engine:
        lanes = engine.lanes
        assert isinstance(lanes, Recorded)
        passes = decode_passes(engine, case, lambda: len(lanes.taken))
    seconds, used = defaultdict(list), defaultdict(list)
    for at in passes:
        rows = lanes.taken[at.first : at.last]
        rest = (at.seconds - sum(taken for _, taken, _ in rows)) / len(rows)  # from one task to the next
        for op, taken, core in rows:
            seconds[ops(sequential)[op]].append(taken + rest)
            used[ops(sequential)[op]].append(core)
    costs = {}
    for op, taken_s in seconds.items():
        mean = statistics.fmean(taken_s)
        costs[op] = TaskCost(seconds=mean, dram_share=min(1.0, statistics.fmean(used[op]) / mean) / CORES)
    return costs, statistics.median(at.seconds for at in passes)


def measure_reads(case: Case, paged: Schedule) -> float:
    """Seconds of one read among others, back to back: blocks of several pages are read at once."""
    with load_engine(case, paged) as engine:
        assert isinstance(engine, Engine)
        engine.model.execute = lambda row: None  # type: ignore[method-assign]
        seconds = statistics.median(at.seconds for at in decode_passes(engine, case))
    return seconds / (case.constants.layers * case.constants.pages)


def all_costs(case: Case) -> tuple[dict[str, TaskCost], float]:
    """The costs of all operations that the case's schedules have, and the seconds of the sequential pass."""
    sequential = case.schedules[0]
    costs, pass_s = measure_tasks(case, sequential)
    if sequential.kind == "stream":
        read_s = measure_reads(case, case.schedules[-1])
        return costs | {"read": replace(costs["read"], seconds=read_s)}, pass_s
    on_gpu, _ = measure_tasks(case, schedules.attend_on_gpu(sequential))
    return {**on_gpu, **costs}, pass_s


def compare(case: Case, rounds: int) -> list[tuple[Schedule, float, float]]:
    """Each schedule: simulated and executed seconds of a decode pass."""
    count = -(-case.sequences // case.micro_batch)
    simulated: list[list[float]] = [[] for _ in case.schedules]
    executed: list[list[float]] = [[] for _ in case.schedules]
    for _ in range(rounds):
        costs, sequential_s = all_costs(case)
        for n, schedule in enumerate(case.schedules):
            simulated[n].append(time_decode(schedule, count, costs).seconds)
            if n == 0:
                executed[n].append(sequential_s)
                continue
            with load_engine(case, schedule) as engine:
                executed[n] += [at.seconds for at in decode_passes(engine, case)]
    return [
        (schedule, statistics.median(s), statistics.median(e))
        for schedule, s, e in zip(case.schedules, simulated, executed, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows, errors = [], []
    for case in CASES:
        found = compare(case, options.rounds)
        sequential = found[0][2]
        for schedule, simulated, executed in found:
            error = simulated / executed - 1
            if schedule.name != "sequential":
                errors.append(abs(error))
            figures = (f"{simulated * 1e3:.1f}", f"{executed * 1e3:.1f}", f"{error:+.1%}")
            rows.append([case.name, schedule.name, *figures, f"{1 - executed / sequential:.0%}"])
    tables.show(("case", "schedule", "simulated ms", "executed ms", "error", "gain"), rows)
    print(
        f"{len(errors)} schedules beside the sequential ones: median error {statistics.median(errors):.1%}, "
        f"worst {max(errors):.0%}; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
