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
from moeplan.planner.ir.policy import NO_PAGES, CapacityBound, Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Operator, RequestClass, Workload


def capacity_bound(workload: Workload, roofline: Roofline, policy: Policy) -> CapacityBound | None:
    """Return the bound on the policy's generated tokens per second; both parts at effective rates.

    None where no weights move: then only arithmetic and memory traffic bound it, as the lanes say.

    Beyond MoE-Lens: only the weights that are not resident pass, and of them only experts that the sequences
    in flight hit; sliding windows hold less cache; T_GPU is the time of the processor that has the experts.
    """
    workload = costs.held_as(workload, policy.weights_dtype, policy.kv_dtype).as_one_expert()
    requests = workload.request_class(policy.serves)
    held = float(np.asarray(costs.kv_bytes_held(workload, 1.0, requests.mean_bucket().context_tokens)))
    sequences = _cache_bytes(policy) / held if held else math.inf
    pass_s = _pass_s(workload, roofline, policy, sequences / policy.data_parallel)
    if pass_s == 0:
        return None
    memory = sequences / pass_s
    compute = requests.mean_output_tokens() / _processor_s(workload, requests, roofline, policy)
    return CapacityBound(
        generated_tokens_per_s=min(memory, compute),
        binds="memory" if memory < compute else "compute",
        sequences=sequences,
        pass_s=pass_s,
    )


def _cache_bytes(policy: Policy) -> float:
    """What the levels that hold cache have beside weights, of all copies of the model."""
    levels = {use.level for use in policy.memory if "KV" in use.item}
    free = 0.0
    for limit in policy.limits:
        if limit.level in levels:
            uses = (use for use in policy.memory if use.level == limit.level and "weights" in use.item)
            copies = policy.data_parallel if limit.level == "gpu" else 1
            free += copies * (limit.bytes - sum(use.bytes for use in uses))
    return free


def _pass_s(workload: Workload, roofline: Roofline, policy: Policy, sequences: float) -> float:
    """Seconds in which the experts that a decode pass over `sequences` sequences moves arrive at one copy."""
    touched = float(np.asarray(costs.touched_expert_share(workload.model, sequences)))
    if not policy.gpus:
        return touched * _disk_pages_s(workload, roofline, policy)
    model = workload.model
    each = model.expert_parameters() * model.experts * model.moe_layers * touched
    held = costs.held_bytes_per_parameter(model.stored_bytes_per_expert_parameter, workload)
    moved = max(0.0, 1.0 - policy.resident_share - policy.experts_cpu_share)
    from_disk = min(moved, policy.experts_disk_share) * model.stored_bytes_per_expert_parameter
    link_s = moved * held * each / (roofline.roof("dram").up_bytes_per_s * policy.gpus)
    if not from_disk:
        return link_s
    return max(link_s, from_disk * each * policy.data_parallel / roofline.roof("disk").up_bytes_per_s)


def _disk_pages_s(workload: Workload, roofline: Roofline, policy: Policy) -> float:
    """Seconds in which the disk gives all experts that are not resident: pages of whole experts, after one of
    attention, as stored."""
    model, pages = workload.model, policy.pages
    if policy.weights_on != "disk":
        return 0.0
    resident = max(0, pages.resident_pages - 1) * pages.experts_per_page
    stored = model.expert_parameters() * model.stored_bytes_per_expert_parameter * model.moe_layers
    return max(0.0, model.experts - resident) * stored / roofline.roof("disk").up_bytes_per_s


def _processor_s(workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy) -> float:
    """Seconds of one request's arithmetic on the GPUs, or on the CPU where there are none, memory aside."""
    roof, processors, cpu_prefill = roofline.roof("dram"), 1, 0.0
    prefill_flops_per_s, shares = roof.prefill_flops_per_s, (1.0, 1.0)
    if policy.gpus:
        roof, processors = roofline.roof("gpu"), policy.gpus * policy.data_parallel
        prefill_flops_per_s = roof.offload_prefill_flops_per_s
        shares = (policy.attention_gpu_share, 1.0 - policy.experts_cpu_share)
        cpu_prefill = policy.experts_cpu_share if policy.pages == NO_PAGES else 0.0
    mean = requests.mean_bucket()
    step = prefill = 0.0
    for op in workload.operators:
        step += _share(op, *shares) * float(np.asarray(costs.flops(op, 1.0, mean.context_tokens)))
        prompt = costs.operator_prefill_flops(op, 1.0, mean.prompt_tokens)
        prefill += _share(op, 1.0, 1.0 - cpu_prefill) * float(np.asarray(prompt))
    fastest = max(roof.flops_per_s, roof.flops_8bit_per_s, roof.flops_4bit_per_s)
    return (prefill / prefill_flops_per_s + (mean.output_tokens - 1) * step / fastest) / processors


def _share(operator: Operator, attention: float, experts: float) -> float:
    """The part of an operator that the processor in question computes."""
    if costs.is_attention_core(operator):
        return attention
    return experts if operator.name == "routed_experts" else 1.0
