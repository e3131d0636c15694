"""A policy -> the arguments that vLLM is started with."""

from __future__ import annotations

from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy

# What generated files install. Every flag below is held against a record of this version's own:
# tests/codegen/flags/vllm.json.
VERSION = "0.33.0"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}


def vllm_arguments(plan: Plan, policy: Policy) -> tuple[str, str]:
    """How a replica is spread over its GPUs, and what bounds its batch: one line each."""
    longest = plan.workload.request_class(policy.serves).context_tokens_max
    fp8 = " --quantization fp8_per_tensor" if policy.weights_dtype == "fp8" else ""
    return (
        f"--tensor-parallel-size {policy.gpus} --data-parallel-size {policy.data_parallel} "
        f"--dtype {_DTYPES[policy.dtype]}{fp8}",
        f"--max-model-len {longest} --max-num-seqs {policy.sequences} "
        f"--max-num-batched-tokens {max(policy.prefill_tokens, policy.sequences)}",
    )
