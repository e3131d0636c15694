"""Workload, Roofline -> the policies one machine offers for each request class, or why it offers none.

Three ways to run a model, each in a file of its own: in GPU memory under vLLM (`in_memory`), shared by a GPU
that does not hold it, its host and its disk (`offload`), and streamed from disk on a machine without a GPU
(`stream`).
"""

from __future__ import annotations

from collections.abc import Sequence

from moeplan.planner.ir.model import PACKED_BYTES
from moeplan.planner.ir.policy import Policy, Rejection
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.strategies.common import impossible
from moeplan.planner.strategies.in_memory import in_memory_policy
from moeplan.planner.strategies.offload import offload_policy
from moeplan.planner.strategies.stream import stream_policy


def find_policies(
    workload: Workload,
    roofline: Roofline,
    memory_limit_bytes: int | None,
    unrunnable: Sequence[str] = (),
) -> tuple[tuple[Policy, ...], tuple[Rejection, ...]]:
    """Return every usable policy of this machine and every refusal, in the order of the request classes.

    `memory_limit_bytes` lowers the host memory that a policy may use. `unrunnable`: why the bundled runtime
    does not run the model, in which case vLLM alone may.
    """
    found: list[Policy] = []
    refused: list[Rejection] = []
    for requests in workload.classes:
        for answer in _answers(workload, requests, roofline, memory_limit_bytes, unrunnable):
            if isinstance(answer, Policy):
                found.append(answer)
            else:
                refused.append(answer)
    return tuple(found), tuple(refused)


def _answers(
    workload: Workload,
    requests: RequestClass,
    roofline: Roofline,
    memory_limit_bytes: int | None,
    unrunnable: Sequence[str],
) -> list[Policy | Rejection]:
    """Each strategy's answer."""
    if roofline.roofs[0].flops_per_s == 0:
        return [_no_arithmetic(workload, requests, roofline)]
    if roofline.has("gpu") and workload.model.packing in PACKED_BYTES:
        return [_packed_for_cpus(workload, requests, roofline)]
    refusal = _not_ours(workload, requests, roofline, unrunnable) if unrunnable else None
    refusal = refusal or _not_executed(workload, requests, roofline)
    if not roofline.has("gpu"):
        if requests.name == "online":
            return [_no_online_without_gpu(requests, roofline)]
        return [refusal or stream_policy(workload, requests, roofline, memory_limit_bytes)]
    answers = [in_memory_policy(workload, requests, roofline)]
    if roofline.roof("dram").flops_per_s > 0:
        refusal = refusal or _not_offloaded(workload, requests, roofline)
        answers.append(refusal or offload_policy(workload, requests, roofline, memory_limit_bytes))
    return answers


def _not_ours(
    workload: Workload, requests: RequestClass, roofline: Roofline, why: Sequence[str]
) -> Rejection:
    return impossible(
        roofline.machine.name,
        requests,
        "engine",
        f"the bundled runtime does not run {workload.model.name}: {'; '.join(why)}",
        "GPUs that hold the whole model, which vLLM serves",
    )


def _no_arithmetic(workload: Workload, requests: RequestClass, roofline: Roofline) -> Rejection:
    known = ", ".join(sorted(roofline.machine.levels[0].flops_per_s)) or "nothing"
    return impossible(
        roofline.machine.name,
        requests,
        "dtype",
        f"it computes in neither {workload.dtype} nor another dtype of its size, but in {known}",
        "another model.dtype, or the machine's rate in this one",
    )


def _not_executed(workload: Workload, requests: RequestClass, roofline: Roofline) -> Rejection | None:
    """A refusal where the bundled runtime does not compute something of the model."""
    model = workload.model
    if requests.context_tokens_max > model.executed_context_tokens:
        return impossible(
            roofline.machine.name,
            requests,
            "model",
            f"the bundled runtime executes {model.name} (longrope) within its original context, "
            f"{model.executed_context_tokens:,} tokens; requests have {requests.context_tokens_max:,}",
            "GPUs that hold the whole model, or shorter requests",
        )
    if not model.not_executed:
        return None
    return impossible(
        roofline.machine.name,
        requests,
        "model",
        f"the bundled runtime does not execute {' and '.join(model.not_executed)} "
        f"({model.name}, {model.model_type})",
        "GPUs that hold the whole model, or a checkpoint without",
    )


def _packed_for_cpus(workload: Workload, requests: RequestClass, roofline: Roofline) -> Rejection:
    return impossible(
        roofline.machine.name,
        requests,
        "model",
        f"experts packed in {workload.model.packing} are read by the bundled runtime alone, on a CPU",
        "the checkpoint as it was, or a machine without a GPU",
    )


def _not_offloaded(workload: Workload, requests: RequestClass, roofline: Roofline) -> Rejection | None:
    """A refusal where the bundled runtime executes the model on a CPU only."""
    if workload.model.packing == "none":
        return None
    return impossible(
        roofline.machine.name,
        requests,
        "model",
        f"the bundled runtime executes weights in {workload.model.packing} on a CPU only "
        f"({workload.model.name})",
        "GPUs that hold the whole model, or a checkpoint in bf16",
    )


def _no_online_without_gpu(requests: RequestClass, roofline: Roofline) -> Rejection:
    return impossible(
        roofline.machine.name,
        requests,
        "engine",
        "online requests need a GPU: the bundled runtime does batch work only",
        "choose a machine with a GPU, or make the work a batch",
    )
