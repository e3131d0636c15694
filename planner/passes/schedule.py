"""Policy -> Pipeline: the fastest of the schedules that run the policy, as the simulator has it.

From CGOPipe on, each rewrite is kept that makes a decode pass shorter; the schedules that others use are
timed beside it, on the same tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moeplan.planner import schedules
from moeplan.planner.ir.policy import LaneTime, Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.schedule import (
    Alternative,
    Constants,
    OffloadConstants,
    OpTime,
    Pipeline,
    Schedule,
    StreamConstants,
)
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.programs import Step, issue, lanes, ops
from moeplan.planner.programs.order import WAIT
from moeplan.planner.simulate.schedule import Stretch, simulate, stretch
from moeplan.planner.strategies.offload import point_of
from moeplan.planner.strategies.offload_tasks import decode_tasks
from moeplan.planner.strategies.stream import stream_tasks
from moeplan.planner.strategies.task_costs import TaskCosts, of_rows

CostsOf = Callable[[Constants], TaskCosts]

_BEST = {"stream": "paged", "offload": "CGOPipe"}
_IMPROVEMENTS = (
    schedules.begin_next_step,
    schedules.look_ahead,
    schedules.stage_further,
    schedules.merge_pages,
)
_WORTH = 1e-3  # a rewrite must make the pass shorter by this share
_PASSES = 3  # simulated; the last is in the steady state


def build_schedule(workload: Workload, roofline: Roofline, policy: Policy) -> Pipeline:
    """Return the schedule of a policy of ours, timed in the steady state of decoding."""
    requests = workload.request_class(policy.serves)
    costs = _costs(workload, requests, roofline, policy)
    constants = constants_of(workload, requests, policy)
    kind = "offload" if isinstance(constants, OffloadConstants) else "stream"
    names = schedules.OFFLOAD if policy.gpus else schedules.STREAM
    known = [_Timed.of(schedules.named(constants, name), policy.micro_batches, costs) for name in names]
    best = next(timed for timed in known if timed.schedule.name == _BEST[kind])
    if kind == "offload":
        best = improved(best, costs)
    return best.pipeline([timed for timed in known if timed.schedule != best.schedule])


def _costs(workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy) -> CostsOf:
    if not policy.gpus:
        tasks = stream_tasks(workload, requests, roofline, policy)
        return lambda _: tasks
    problem, point = point_of(workload, requests, roofline, policy, policy.sequences)

    def costs(constants: Constants) -> TaskCosts:
        assert isinstance(constants, OffloadConstants)
        return decode_tasks(problem, point, constants)

    return costs


def constants_of(workload: Workload, requests: RequestClass, policy: Policy) -> Constants:
    """The sizes of a policy's schedule; how it is ordered the rewrites say."""
    pages, layers = policy.pages, workload.model.layers
    if not policy.gpus:
        return StreamConstants(
            layers=layers,
            pages=pages.pages_per_layer,
            resident=pages.resident_pages,
            slots=pages.slots,
            lead=0,
            across=0,
            barrier=0,
            lean=0,
        )
    on_gpu = round(policy.kv_gpu_share * policy.micro_batches)
    copied_up = round(policy.attention_gpu_share * policy.micro_batches) - on_gpu
    prompt_tokens = policy.sequences * requests.mean_prompt_tokens()
    return OffloadConstants(
        layers=layers,
        micro_batches=policy.micro_batches,
        pieces=math.ceil(prompt_tokens / policy.prefill_tokens),
        pages=pages.pages_per_layer,
        slots=pages.slots if policy.staged else 0,
        lead=1,
        disk_pages=_disk_pages(policy),
        cpu_attended=policy.micro_batches - on_gpu - copied_up,
        copied_up=copied_up,
        decode_cpu_experts=int(policy.experts_cpu_share > 0),
        prefill_cpu_experts=int(policy.experts_cpu_share > 0 and not pages.pages_per_layer),
        lookahead=0,
        wrap=0,
        interleave=0,
        across=0,
        barrier=0,
        lean=0,
    )


def _disk_pages(policy: Policy) -> int:
    """Pages that hold experts from disk, among those of all experts that are not resident."""
    outside = 1.0 - policy.resident_share
    share = policy.experts_disk_share / outside if outside else 0.0
    return math.ceil(policy.pages.pages_per_layer * share - 1e-9)


def decode_steps(micro_batches: int) -> list[Step]:
    """Full decode passes, each followed by another; the last is in the steady state."""
    return [Step(micro_batches, 0, micro_batches)] * _PASSES


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """A schedule, how a decode pass of it goes in the steady state, and its tasks and waits."""

    schedule: Schedule
    micro_batches: int
    step: Stretch
    tasks: int
    waits: int

    @classmethod
    def of(cls, schedule: Schedule, micro_batches: int, costs: CostsOf) -> _Timed:
        issued = issue(schedule, decode_steps(micro_batches))
        seconds, demands = of_rows(issued.rows, ops(schedule), costs(schedule.constants))
        timeline = simulate(issued.rows, len(lanes(schedule)), seconds, demands)
        first = issued.starts[-1]
        return cls(
            schedule=schedule,
            micro_batches=micro_batches,
            step=stretch(timeline, first),
            tasks=len(issued.rows) - first,
            waits=int((issued.rows[first:, WAIT:] > 0).sum()),
        )

    def pipeline(self, others: Sequence[_Timed]) -> Pipeline:
        lane_names, op_names = lanes(self.schedule), ops(self.schedule)
        busy = zip(lane_names, self.step.busy_s, strict=True)
        path = [(lane_names[share.lane], op_names[share.op], share.seconds) for share in self.step.path]
        return Pipeline(
            schedule=self.schedule,
            phase="decode",
            pass_s=self.step.seconds,
            busy=tuple(LaneTime(lane=lane, seconds=seconds) for lane, seconds in busy),
            bubble_s=self.step.bubble_s,
            critical=tuple(OpTime(lane=lane, op=op, seconds=seconds) for lane, op, seconds in path),
            tasks=self.tasks,
            waits=self.waits,
            implied_waits=self._all_waits() - self.waits,
            others=tuple(Alternative(name=o.schedule.name, pass_s=o.step.seconds) for o in others),
        )

    def _all_waits(self) -> int:
        """The waits of a pass where those that others imply are not left out."""
        every = replace(self.schedule, constants=self.schedule.constants._replace(lean=0))
        issued = issue(every, decode_steps(self.micro_batches))
        return int((issued.rows[issued.starts[-1] :, WAIT:] > 0).sum())


def improved(start: _Timed, costs: CostsOf) -> _Timed:
    """The schedule after every rewrite that makes its pass shorter, each as often as it does."""
    best, applied = start, list[str]()
    for rewrite in _IMPROVEMENTS:
        while True:
            after = rewrite(best.schedule)
            if after.constants == best.schedule.constants:
                break
            timed = _Timed.of(after, best.micro_batches, costs)
            if timed.step.seconds > (1.0 - _WORTH) * best.step.seconds:
                break
            best = timed
            applied.append(rewrite.__name__.replace("_", " "))
    name = " + ".join([start.schedule.name, *dict.fromkeys(applied)])
    return replace(best, schedule=replace(best.schedule, name=name))
