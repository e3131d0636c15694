"""Plan -> llama_cpp/<replica>.sh: the nearest that llama.cpp can do to our replica on the user's machine.

llama.cpp keeps the experts of a layer on one side. Those on the CPU's side are computed there in decode and
copied to the GPU for long prompts; none are streamed in decode, and none picked by what routing hits. So the
plan's rates say nothing about it.
"""

from __future__ import annotations

import math

from moeplan.codegen.render import render
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.policy import Policy

_MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ


def emit(plan: Plan) -> dict[str, str]:
    """Return a script for each replica of ours on a machine that the user owns."""
    owned = {site.column for site in plan.placement.sites if site.market == "owned"}
    return {
        f"llama_cpp/{replica.name}.sh": render(
            "llama_cpp/server.sh.j2", lines=llama_arguments(plan, replica), gpu=replica.policy.gpus > 0
        )
        for replica in plan.replicas
        if replica.name in owned and replica.policy.engine == "runtime_min"
    }


def llama_arguments(plan: Plan, replica: Replica) -> tuple[str, ...]:
    """The arguments of llama-server, a line each: where weights lie, what is in flight, who computes."""
    policy = replica.policy
    sequences = min(policy.sequences, _MOST_SEQUENCES)
    context = plan.workload.request_class(policy.serves).context_tokens_max
    passes = max(policy.prefill_tokens, sequences)
    return (
        _weights(plan, policy),
        f"--parallel {sequences} --ctx-size {sequences * context} --no-kv-unified --cont-batching",
        f"--batch-size {passes} --ubatch-size {passes}",
        f"--threads {policy.threads}"
        + (" --no-kv-offload" if policy.gpus and policy.kv_gpu_share < 0.5 else ""),
    )


def _weights(plan: Plan, policy: Policy) -> str:
    """Layers whose experts stay off the GPU: as many as leave the planned share of experts on it."""
    if not policy.gpus:
        return "--n-gpu-layers 0"
    layers = plan.workload.model.layers
    cpu_layers = layers - math.floor(layers * policy.resident_share)
    split = f" --tensor-split {','.join(['1'] * policy.gpus)}" if policy.gpus > 1 else ""
    return f"--n-gpu-layers {layers + 1} --n-cpu-moe {cpu_layers}{split}"
