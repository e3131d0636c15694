"""The schedule pass: what is chosen is the fastest in simulation, on tasks that sum to what lanes were
predicted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from conftest import batch_spec

from moeplan.planner import programs
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.schedule import OffloadConstants
from moeplan.planner.programs import Step
from moeplan.planner.strategies.offload import point_of
from moeplan.planner.strategies.offload_tasks import decode_tasks, prefill_tasks
from moeplan.planner.strategies.stream import stream_tasks
from moeplan.planner.strategies.task_costs import TaskCosts, of_rows

Compile = Callable[[str], Plan]
# Attention on the CPU and on the GPU; experts streamed, staged, on the CPU, from disk.
MACHINES = (
    "g4dn.16xlarge",
    "n1-custom-48-196608+1xT4",
    "g2-standard-48",
    "n1-custom-64-425984+4xT4",
    "g5.4xlarge",
    "a2-highgpu-1g",
)


@pytest.fixture(params=MACHINES)
def made(request: pytest.FixtureRequest, compile_text: Compile) -> tuple[Plan, Replica]:
    plan = compile_text(batch_spec(request.param))
    return plan, plan.replicas[0]


def lane_seconds(replica: Replica, costs: TaskCosts, step: Step) -> dict[str, float]:
    """Seconds of each lane in one pass in the steady state."""
    pipeline = replica.pipeline
    assert pipeline is not None
    issued = programs.issue(pipeline.schedule, [step] * 3)
    rows = issued.rows[issued.starts[2] :]
    seconds, _ = of_rows(rows, programs.ops(pipeline.schedule), costs)
    names = programs.lanes(pipeline.schedule)
    return {name: float(seconds[rows[:, 1] == lane].sum()) for lane, name in enumerate(names)}


def test_decode_tasks_sum_to_the_lanes(made: tuple[Plan, Replica]) -> None:
    """What HRM predicts of each lane is what its tasks take together."""
    plan, replica = made
    policy, requests = replica.policy, plan.workload.request_class("batch")
    problem, point = point_of(plan.workload, requests, replica.roofline, policy, policy.sequences)
    constants = replica.pipeline.schedule.constants  # type: ignore[union-attr]
    assert isinstance(constants, OffloadConstants)
    costs = decode_tasks(problem, point, constants)
    n = policy.micro_batches
    found = lane_seconds(replica, costs, Step(n, 0, n))
    predicted = {lane.lane: lane.seconds for lane in policy.decode.lanes}
    same_as_predicted(found, predicted)


def same_as_predicted(found: dict[str, float], predicted: dict[str, float]) -> None:
    """Lane by lane; where DRAM is slower than the lanes that use it, these take longer, but no longer than
    it."""
    dram_bound = predicted["dram"] > max(predicted["h2d"], predicted.get("cpu", 0.0))
    for lane in ("gpu", "d2h", "disk"):
        assert found[lane] == pytest.approx(predicted.get(lane, 0.0), rel=1e-6, abs=1e-9), lane
    for lane in ("h2d", "cpu"):
        if not dram_bound:
            assert found[lane] == pytest.approx(predicted.get(lane, 0.0), rel=1e-6, abs=1e-9), lane
        assert predicted.get(lane, 0.0) - 1e-9 <= found[lane] <= sum(predicted.values())


def test_prefill_tasks_sum_to_the_lanes(made: tuple[Plan, Replica]) -> None:
    plan, replica = made
    policy, requests = replica.policy, plan.workload.request_class("batch")
    problem, point = point_of(plan.workload, requests, replica.roofline, policy, policy.sequences)
    constants = replica.pipeline.schedule.constants  # type: ignore[union-attr]
    assert isinstance(constants, OffloadConstants)
    costs = prefill_tasks(problem, point, constants)
    found = lane_seconds(replica, costs, Step(0, constants.pieces, 0))
    predicted = {lane.lane: lane.seconds for lane in policy.prefill.lanes}
    same_as_predicted(found, predicted)


def test_nothing_beats_the_chosen(made: tuple[Plan, Replica]) -> None:
    """Every schedule beside it is slower or as fast (a rewrite must win 0.1 %), and no pass is shorter than
    its busiest lane."""
    _, replica = made
    pipeline = replica.pipeline
    assert pipeline is not None
    assert all(pipeline.pass_s <= other.pass_s * (1 + 1e-3) for other in pipeline.others)
    assert pipeline.pass_s >= max(lane.seconds for lane in pipeline.busy) - 1e-9
    assert sum(op.seconds for op in pipeline.critical) == pytest.approx(pipeline.pass_s)


def test_what_a_pass_is_made_of(made: tuple[Plan, Replica]) -> None:
    """The tasks and waits that a report names are those of the emitted schedule."""
    _, replica = made
    pipeline = replica.pipeline
    assert pipeline is not None
    n = replica.policy.micro_batches
    issued = programs.issue(pipeline.schedule, [Step(n, 0, n)] * 3)
    rows = issued.rows[issued.starts[-1] :]
    assert len(rows) == pipeline.tasks
    assert Counter((rows[:, 5:] > 0).ravel().tolist())[True] == pipeline.waits
    assert pipeline.implied_waits > 0


def test_streamed_tasks_take_what_the_policy_says(compile_text: Compile) -> None:
    """Without a GPU the closed form and the simulator agree on a pass that streams."""
    plan = compile_text(batch_spec("cpu-32core", model="mixtral-8x22b"))
    replica = plan.replicas[0]
    assert replica.pipeline is not None
    assert replica.policy.weights_on == "disk"
    assert replica.pipeline.schedule.name == "paged"
    assert replica.pipeline.pass_s == pytest.approx(replica.policy.decode.seconds, rel=0.02)
    requests = plan.workload.request_class("batch")
    costs = stream_tasks(plan.workload, requests, replica.roofline, replica.policy)
    found = lane_seconds(replica, costs, Step(replica.policy.micro_batches, 0, 1))
    lanes = {lane.lane: lane.seconds for lane in replica.policy.decode.lanes}
    assert found["compute"] == pytest.approx(lanes["cores"], rel=1e-6)
    assert found["disk"] == pytest.approx(lanes["disk"], rel=1e-6)
