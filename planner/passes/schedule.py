"""Policy -> Pipeline: the fastest of the schedules that run the policy, as the simulator has it.

From CGOPipe on, each rewrite is kept that makes a decode pass shorter; the schedules that others use are
timed beside it, on the same tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from moeplan.planner import schedules
from moeplan.planner.ir.policy import LaneTime, Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.schedule import (
    Alternative,
    Constants,
    OffloadConstants,
    OpTime,
    Pipeline,
    StreamConstants,
)
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.programs import lanes, ops
from moeplan.planner.simulate.decode import Timed, time_decode
from moeplan.planner.strategies.offload import point_of
from moeplan.planner.strategies.offload_tasks import decode_tasks
from moeplan.planner.strategies.stream import stream_tasks
from moeplan.planner.strategies.task_costs import TaskCosts

CostsOf = Callable[[Constants], TaskCosts]

_IMPROVEMENTS = (
    schedules.begin_next_step,
    schedules.look_ahead,
    schedules.stage_further,
    schedules.merge_pages,
)
_WORTH = 1e-3  # a rewrite must make the pass shorter by this share
_DRAWN = 400  # tasks


def build_schedule(workload: Workload, roofline: Roofline, policy: Policy) -> Pipeline:
    """Return the schedule of a policy of ours, timed in the steady state of decoding."""
    requests = workload.request_class(policy.serves)
    costs = costs_of(workload, requests, roofline, policy)
    known = known_schedules(constants_of(workload, requests, policy), policy.micro_batches, costs)
    start = next(timed for timed in known if timed.schedule.name == _start(policy))
    best = improved(start, policy.micro_batches, costs) if policy.gpus else start
    return _pipeline(best, [timed for timed in known if timed.schedule != best.schedule])


def fastest_schedule(workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy) -> Timed:
    """The fastest schedule that rewriting finds, those of others aside."""
    costs = costs_of(workload, requests, roofline, policy)
    schedule = schedules.named(constants_of(workload, requests, policy), _start(policy))
    start = time_decode(schedule, policy.micro_batches, costs(schedule.constants))
    return improved(start, policy.micro_batches, costs) if policy.gpus else start


def _start(policy: Policy) -> str:
    """The schedule that rewriting starts from."""
    return "CGOPipe" if policy.gpus else "paged"


def known_schedules(constants: Constants, micro_batches: int, costs: CostsOf) -> list[Timed]:
    """The schedules that have names, each timed."""
    names = schedules.OFFLOAD if isinstance(constants, OffloadConstants) else schedules.STREAM
    made = (schedules.named(constants, name) for name in names)
    return [time_decode(schedule, micro_batches, costs(schedule.constants)) for schedule in made]


def costs_of(workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy) -> CostsOf:
    """What the tasks of the policy's decode pass take, for each way to cut its pages."""
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
            places=pages.places,
            guesses=pages.guesses,
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


def improved(start: Timed, micro_batches: int, costs: CostsOf) -> Timed:
    """The schedule after every rewrite that makes its pass shorter, each as often as it does."""
    best, applied = start, list[str]()
    for rewrite in _IMPROVEMENTS:
        while (after := rewrite(best.schedule)).constants != best.schedule.constants:
            timed = time_decode(after, micro_batches, costs(after.constants))
            if timed.seconds > (1.0 - _WORTH) * best.seconds:
                break
            best = timed
            applied.append(rewrite.__name__.replace("_", " "))
    name = " + ".join([start.schedule.name, *dict.fromkeys(applied)])
    return replace(best, schedule=replace(best.schedule, name=name))


def _pipeline(best: Timed, others: Sequence[Timed]) -> Pipeline:
    lane_names, op_names = lanes(best.schedule), ops(best.schedule)
    step = best.stretch
    path = [(lane_names[share.lane], op_names[share.op], share.seconds) for share in step.path]
    return Pipeline(
        schedule=best.schedule,
        phase="decode",
        pass_s=best.seconds,
        busy=tuple(
            LaneTime(lane=lane, seconds=seconds)
            for lane, seconds in zip(lane_names, step.busy_s, strict=True)
        ),
        bubble_s=step.bubble_s,
        critical=tuple(OpTime(lane=lane, op=op, seconds=seconds) for lane, op, seconds in path),
        tasks=best.tasks,
        waits=best.waits,
        implied_waits=best.implied_waits,
        others=tuple(Alternative(name=o.schedule.name, pass_s=o.seconds) for o in others),
        window=best.window(_DRAWN),
    )
