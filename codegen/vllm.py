"""A policy -> the arguments that vLLM is started with."""

from __future__ import annotations

from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.workload import ClassName

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}


def vllm_arguments(plan: Plan, policy: Policy) -> tuple[str, str]:
    """How a replica is spread over its GPUs, and what bounds its batch: one line each.

    A replica that batch work fills takes requests of both classes, by priority: lower numbers come first.
    """
    served = _served(plan, policy)
    longest = max(plan.workload.request_class(name).context_tokens_max for name in served)
    fp8 = " --quantization fp8_per_tensor" if policy.weights_dtype == "fp8" else ""
    mixed = " --scheduling-policy priority" if len(served) > 1 else ""
    numbers = f"--max-num-seqs {policy.sequences} --max-model-len {longest}"
    return (
        f"--tensor-parallel-size {policy.gpus} --data-parallel-size {policy.data_parallel}",
        f"--dtype {_DTYPES[policy.dtype]} {numbers}{fp8}{mixed}",
    )


def _served(plan: Plan, policy: Policy) -> set[ClassName]:
    """The classes whose requests go to replicas under `policy`."""
    names = {c.column.name for c in plan.fleet.choices if c.column.policy == policy}
    return {policy.serves} | {route.serves for route in plan.fleet.routes if route.column in names}
