"""Seconds of a decode step and of a prefill of a model served from GPU memory, by cause.

A step of b sequences is a sum over operators of rounded rooflines, plus what each layer costs whatever its
size: kernel launches, their tails and the gaps between them, and two all-reduces under tensor parallelism.
These fixed costs, not expert imbalance, are what makes rooflines optimistic for MoE models on many GPUs:
`benchmarks/serving_accuracy.py` fits the constants below to measured serving runs and tests them on models
and GPUs left out of the fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moeplan.planner import costs
from moeplan.planner.costs import Quantity
from moeplan.planner.ir.model import Attention
from moeplan.planner.ir.roofline import Roof
from moeplan.planner.ir.workload import Operator, Workload

# Of the GPU libraries' all-reduce: seconds whatever its size, and the share of the nominal GPU-to-GPU rate.
ALL_REDUCE_S = 18e-6
PEER_EFFICIENCY = 0.27


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a serving engine adds to its kernels' work.

    `layer_s` passes in every layer of a decode step, `moe_layer_s` more in one with experts (routing, sorting
    and combining tokens), `all_reduce_s` in every all-reduce, which moves its data at `peer_efficiency` of
    the nominal GPU-to-GPU rate. Decode steps of other requests see only `mixed_prefill` of a prompt's own
    prefill time: its tokens ride along with weights that are read anyway.

    A first token waits for `first_steps` decode steps (the one under way, then its own) and for `queued` of
    the prefills of all running requests; its prefill takes `first_prefill` of the plain arithmetic, and
    `prefill_moe_layer_s` more in each layer with experts.
    """

    layer_s: float
    moe_layer_s: float
    all_reduce_s: float
    peer_efficiency: float
    mixed_prefill: float
    first_steps: float
    first_prefill: float
    queued: float
    prefill_moe_layer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How one copy of a model lies on GPUs: `tensor` share each matrix, `groups` such groups share the
    experts and split the sequences (attention data parallelism); 1 where each group is a copy of its own."""

    tensor: int
    groups: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.groups


def kv_copies(attention: Attention, tensor: Quantity) -> Quantity:
    """How often the cache lies on `tensor` GPUs: KV heads are shared out, and copied where there are fewer
    heads than GPUs; MLA's latent cache has no heads."""
    parts = 1 if attention.kind == "mla" else attention.kv_heads
    return np.asarray(tensor / np.minimum(tensor, parts))


def weight_bytes(workload: Workload, tensor: int) -> float:
    """Bytes of all weights in GPU memory. vLLM pads the matrices of MXFP4 experts to multiples of 256 by 128
    values for its Marlin kernel (vllm, layers/quantization/mxfp4.py)."""
    model, held = workload.model, costs.held_weight_bytes(workload)
    if not model.experts or model.stored_bytes_per_expert_parameter > costs.FOUR_BITS:
        return held
    hidden = math.ceil(model.hidden / 256) * 256 / model.hidden
    inner = math.ceil(model.expert_intermediate / tensor / 128) * 128 * tensor / model.expert_intermediate
    experts = model.parameters.routed_experts * model.stored_bytes_per_expert_parameter
    return held + experts * (hidden * inner - 1.0)


def step_parts(
    workload: Workload,
    roof: Roof,
    peer_bytes_per_s: float,
    sharding: Sharding,
    engine: Engine,
    batch: Quantity,
    context: Quantity,
) -> dict[str, Quantity]:
    """Seconds of one decode step of `batch` sequences per group, by cause, over all layers."""
    model = workload.model
    copies = kv_copies(model.attention, sharding.tensor)

    def seconds(operator: Operator) -> Quantity:
        if operator.name == "routed_experts":
            whole = costs.operator_seconds(workload, operator, roof, batch * sharding.groups, context)
            return whole / sharding.gpus
        return costs.operator_seconds(workload, operator, roof, batch, context, copies) / sharding.tensor

    parts: dict[str, Quantity] = {"attention": 0.0, "experts": 0.0, "other matrices": 0.0}
    for operator in workload.operators:
        parts[_part(operator)] = parts[_part(operator)] + seconds(operator)
    fixed = model.layers * engine.layer_s + model.moe_layers * engine.moe_layer_s
    parts["layers"] = fixed + 0.0 * np.asarray(batch)
    if sharding.gpus > 1:
        parts["all-reduce"] = 2 * model.layers * engine.all_reduce_s + exchange_s(
            workload, peer_bytes_per_s * engine.peer_efficiency, sharding.tensor, batch
        )
    return parts


def _part(operator: Operator) -> str:
    if costs.is_attention_core(operator):
        return "attention"
    return "experts" if operator.name == "routed_experts" else "other matrices"


def exchange_s(
    workload: Workload, reached_bytes_per_s: float, tensor: Quantity, tokens: Quantity
) -> Quantity:
    """Seconds in which two ring all-reduces a layer move `tokens` hidden states among `tensor` GPUs, at the
    GPU-to-GPU rate that they reach."""
    model = workload.model
    moved = tokens * model.hidden * workload.value_bytes * 2 * (tensor - 1) / tensor
    return 2 * model.layers * moved / max(reached_bytes_per_s, 1.0)


def prefill_s(
    workload: Workload,
    roof: Roof,
    peer_bytes_per_s: float,
    sharding: Sharding,
    engine: Engine,
    prompt: Quantity,
) -> Quantity:
    """Seconds of the prefill of one prompt of `prompt` tokens, alone on its group."""
    total = exchange_s(workload, peer_bytes_per_s * engine.peer_efficiency, sharding.tensor, prompt)
    for operator in workload.operators:
        work = costs.operator_prefill_flops(operator, 1.0, prompt)
        faster = costs.operator_flops_per_s(operator, roof) / roof.flops_per_s
        if costs.is_attention_core(operator):
            faster = 1.0
        total = total + work / (roof.prefill_flops_per_s * faster * sharding.tensor)
    return total


def inter_token_s(
    parts: dict[str, Quantity], prefill: Quantity, engine: Engine, batch: Quantity, output: Quantity
) -> Quantity:
    """Mean seconds between two tokens of a request of `output` tokens while `batch` run: a step, and what the
    prefills of the requests that enter meanwhile (`batch` of them per `output` steps) add to it."""
    step: Quantity = sum((seconds for seconds in parts.values()), start=0.0 * np.asarray(batch))
    return step + batch * prefill * engine.mixed_prefill / output


def first_token_s(
    workload: Workload, engine: Engine, prefill: Quantity, inter_token: Quantity, batch: Quantity
) -> Quantity:
    """Mean seconds to the first token while `batch` requests run in a closed loop; bursts can take longer."""
    own = prefill * engine.first_prefill + workload.model.moe_layers * engine.prefill_moe_layer_s
    return own + engine.first_steps * inter_token + engine.queued * batch * prefill
