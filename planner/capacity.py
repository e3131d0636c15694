"""The most that offloaded weights allow, however requests are batched and scheduled.

Source: MoE-Lens (arXiv 2504.09345), T_max = min(PME·M/δ, T_GPU) in prompt and generated tokens per second,
with PME = 2(p + g)/((2p + g)·g), M the tokens of cache that memory holds and δ the seconds in which the
weights pass once. A request of p and g tokens lives for g passes and holds p + g/2 tokens on average, so
PME·M tokens are worked on per pass; of p + g tokens g are generated.
"""

from __future__ import annotations

import math

import numpy as np

from moeplan.planner import costs
from moeplan.planner.ir.policy import CapacityBound, Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import RequestClass, Workload


def capacity_bound(workload: Workload, roofline: Roofline, policy: Policy) -> CapacityBound | None:
    """Return the bound on the policy's generated tokens per second; both parts at effective rates.

    None where no weights move: then only arithmetic and memory traffic bound it, as the lanes say.

    Beyond MoE-Lens: only the weights that are not resident pass, and of them only experts that the sequences
    in flight hit; sliding windows hold less cache; T_GPU is the time of the processor that has the experts.
    """
    requests = workload.request_class(policy.serves)
    context = requests.mean_prompt_tokens() + requests.mean_output_tokens() / 2
    held = float(np.asarray(costs.kv_bytes_held(workload, 1.0, context)))
    sequences = _cache_bytes(policy) / held if held else math.inf
    streamed = _streamed_bytes(workload, policy, sequences)
    if streamed == 0:
        return None
    pass_s = streamed / _arrival_bytes_per_s(roofline, policy)
    memory = sequences / pass_s
    compute = requests.mean_output_tokens() / _processor_s(workload, requests, roofline, policy)
    return CapacityBound(
        generated_tokens_per_s=min(memory, compute),
        binds="memory" if memory < compute else "compute",
        sequences=sequences,
        pass_s=pass_s,
    )


def _cache_bytes(policy: Policy) -> float:
    """What the levels that hold cache have beside weights."""
    levels = {use.level for use in policy.memory if "KV" in use.item}
    weights = sum(use.bytes for use in policy.memory if use.level in levels and "weights" in use.item)
    return sum(float(limit.bytes) for limit in policy.limits if limit.level in levels) - weights


def _streamed_bytes(workload: Workload, policy: Policy, sequences: float) -> float:
    """Weights that one pass over `sequences` sequences brings to the processor: the experts that are not
    resident and are hit."""
    model, pages = workload.model, policy.pages
    resident = policy.resident_share * model.experts
    per_expert = model.expert_parameters() * costs.held_bytes_per_parameter(
        model.stored_bytes_per_expert_parameter, workload
    )
    if policy.weights_on == "disk":  # pages of whole experts, after one of attention; read as stored
        resident = max(0, pages.resident_pages - 1) * pages.experts_per_page
        per_expert = model.expert_parameters() * model.stored_bytes_per_expert_parameter
    elif policy.experts_on == "cpu":
        return 0.0
    touched = float(np.asarray(costs.touched_expert_share(model, sequences)))
    return max(0.0, model.experts - resident) * touched * per_expert * model.moe_layers


def _arrival_bytes_per_s(roofline: Roofline, policy: Policy) -> float:
    if policy.weights_on == "disk":
        return roofline.roof("disk").up_bytes_per_s
    return roofline.roof("dram").up_bytes_per_s * max(1, roofline.machine.gpus)


def _processor_s(workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy) -> float:
    """Seconds of arithmetic of one request where the experts are computed, memory traffic aside."""
    roof, processors = roofline.roof("dram"), 1
    prefill_flops_per_s = roof.prefill_flops_per_s
    if policy.experts_on == "gpu":
        roof, processors = roofline.roof("gpu"), roofline.machine.gpus
        prefill_flops_per_s = roof.offload_prefill_flops_per_s
    prompt, output = requests.mean_prompt_tokens(), requests.mean_output_tokens()
    together = policy.attention_on == policy.experts_on
    there = [op for op in workload.operators if together or "attention_core" not in op.name]
    step = sum(float(np.asarray(costs.flops(op, 1.0, prompt + output / 2))) for op in there)
    prefill = float(np.asarray(costs.prefill_flops(workload, 1.0, prompt)))
    return (prefill / prefill_flops_per_s + (output - 1) * step / roof.flops_per_s) / processors
