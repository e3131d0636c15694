"""FLOPs, bytes and seconds of operators and passes: the arithmetic that roofline and policy share.

Quantities may be numbers or numpy arrays of one shape, so that a search is a single evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.cold_start import cold_start
from moeplan.planner.ir.model import PACKED_BYTES, PACKINGS, Model, Packed, Packing
from moeplan.planner.ir.policy import WeightsDtype
from moeplan.planner.ir.roofline import Roof
from moeplan.planner.ir.workload import KvDtype, Operator, Workload

Quantity = float | NDArray[np.float64]

# The knee of a roofline is round: t = (t_mem^p + t_comp^p)^(1/p). Fitted to linear operators of Llama-2 on
# A40, A100 and H100, TP 1-8 and 1-4096 tokens (Vidur's profiles, MIT licence): p = 1.5, median error 4.5 %.
KNEE = 1.5
_HALF_BYTES = 2.0
# Bytes per stored weight, scales and the few wider weights of a quantised model included.
EIGHT_BITS, FOUR_BITS = 1.6, 0.6
# Attention cores reach about half of the FLOP/s of matrix products (softmax between two small products).
_ATTENTION_COMPUTE_SHARE = 0.5


def touched_expert_share(model: Model, tokens: Quantity) -> Quantity:
    """Expected share of a layer's experts that `tokens` tokens hit: 1 - (1 - k/E)^tokens.

    Checked on Mixtral's real routing over MT-Bench: within 1 % from 1 to 32 tokens.
    """
    if not model.experts:
        return np.ones_like(np.asarray(tokens, dtype=float))
    return 1.0 - (1.0 - model.experts_per_token / model.experts) ** np.asarray(tokens, dtype=float)


def flops(operator: Operator, tokens: Quantity, context: Quantity) -> Quantity:
    """FLOPs of `tokens` tokens, each attending to `context` tokens on average."""
    return tokens * (
        operator.flops_per_token + operator.flops_per_context_token * _seen_context(operator, context)
    )


def weight_bytes(workload: Workload, operator: Operator, tokens: Quantity) -> Quantity:
    """Bytes of weights that one call over `tokens` tokens reads where it computes."""
    whole = operator.parameters * held_bytes_per_parameter(operator.stored_bytes_per_parameter, workload)
    if operator.name == "routed_experts":
        return whole * touched_expert_share(workload.model, tokens)
    return whole + 0.0 * np.asarray(tokens, dtype=float)


def kv_bytes_read(workload: Workload, operator: Operator, tokens: Quantity, context: Quantity) -> Quantity:
    """Bytes of cached keys and values that decode attention of `tokens` sequences reads."""
    seen = _seen_context(operator, context)
    return tokens * seen * operator.kv_values_per_context_token * workload.kv_value_bytes


def activation_bytes(workload: Workload, operator: Operator, tokens: Quantity) -> Quantity:
    """Bytes of activations read and written."""
    return tokens * operator.activation_values_per_token * workload.value_bytes


def kv_bytes_held(workload: Workload, sequences: Quantity, context: Quantity) -> Quantity:
    """Bytes of cache of `sequences` sequences of `context` tokens; windowed layers keep only their window."""
    return sum(
        (
            kv_bytes_read(workload, operator, sequences, context)
            for operator in workload.operators
            if operator.kv_values_per_context_token
        ),
        start=0.0 * np.asarray(sequences, dtype=float),
    )


def _seen_context(operator: Operator, context: Quantity) -> Quantity:
    if operator.context_limit_tokens:
        return np.minimum(context, operator.context_limit_tokens)
    return context


def knee(memory_s: Quantity, compute_s: Quantity) -> Quantity:
    """Seconds of an operator whose memory traffic and arithmetic overlap, but not perfectly at the knee."""
    return (memory_s**KNEE + compute_s**KNEE) ** (1.0 / KNEE)


def is_attention_core(operator: Operator) -> bool:
    """Whether `operator` works on the cache and has no weights."""
    return operator.kv_values_per_context_token > 0


def operator_bytes_per_s(operator: Operator, roof: Roof) -> float:
    """The rate at which `operator`'s kernel reads memory."""
    if is_attention_core(operator):
        return roof.attention_bytes_per_s
    return roof.expert_bytes_per_s if operator.name == "routed_experts" else roof.bytes_per_s


def operator_flops_per_s(operator: Operator, roof: Roof) -> float:
    """The rate at which `operator` computes: weights of 8 or 4 bits may use faster arithmetic."""
    if is_attention_core(operator):
        return roof.flops_per_s * _ATTENTION_COMPUTE_SHARE
    if operator.stored_bytes_per_parameter <= FOUR_BITS:
        return roof.flops_4bit_per_s
    if operator.stored_bytes_per_parameter <= EIGHT_BITS:
        return roof.flops_8bit_per_s
    return roof.flops_per_s


def operator_seconds(
    workload: Workload,
    operator: Operator,
    roof: Roof,
    tokens: Quantity,
    context: Quantity,
    kv_copies: Quantity = 1.0,
) -> Quantity:
    """Seconds to run `operator` in all its layers once over `tokens` decode tokens at `roof`.

    The cache is read `kv_copies` times: GPUs that share a KV head each read it.
    """
    return knee(*operator_parts(workload, operator, roof, tokens, context, kv_copies))


def operator_parts(
    workload: Workload,
    operator: Operator,
    roof: Roof,
    tokens: Quantity,
    context: Quantity,
    kv_copies: Quantity = 1.0,
) -> tuple[Quantity, Quantity]:
    """Seconds of memory traffic and of arithmetic, of which `operator_seconds` is the knee."""
    moved = (
        weight_bytes(workload, operator, tokens)
        + kv_copies * kv_bytes_read(workload, operator, tokens, context)
        + activation_bytes(workload, operator, tokens)
    )
    return (
        np.asarray(moved) / operator_bytes_per_s(operator, roof),
        np.asarray(flops(operator, tokens, context)) / operator_flops_per_s(operator, roof),
    )


def call_seconds(
    workload: Workload, operators: Iterable[Operator], roof: Roof, tokens: Quantity, context: Quantity
) -> Quantity:
    """Seconds to run `operators` (all layers) once over `tokens` decode tokens at `roof`."""
    total: Quantity = 0.0 * np.asarray(tokens, dtype=float)
    for operator in operators:
        total = total + operator_seconds(workload, operator, roof, tokens, context)
    return total


def operator_prefill_flops(operator: Operator, sequences: Quantity, prompt: Quantity) -> Quantity:
    """FLOPs of `sequences` prompts of `prompt` tokens; the LM head runs on each last token only."""
    tokens = sequences if operator.name == "lm_head" else sequences * prompt
    seen = _seen_context(operator, prompt / 2.0)
    return tokens * (operator.flops_per_token + operator.prefill_flops_per_context_token * seen)


def prefill_flops(workload: Workload, sequences: Quantity, prompt: float) -> Quantity:
    """FLOPs of all operators for `sequences` prompts of `prompt` tokens."""
    total: Quantity = 0.0 * np.asarray(sequences, dtype=float)
    for operator in workload.operators:
        total = total + operator_prefill_flops(operator, sequences, prompt)
    return total


def cold_start_s(workload: Workload) -> float:
    """Seconds from a launch request to the first answer: boot, image pull, weights, engine start."""
    return cold_start(workload).seconds


def held_bytes_per_parameter(stored: float, workload: Workload) -> float:
    """Bytes of a weight where it is computed with: quantised ones as stored, others in the compute dtype."""
    return stored if stored < _HALF_BYTES else float(workload.value_bytes)


def held_weight_bytes(workload: Workload) -> float:
    """Bytes of all weights where they are computed with."""
    model, p = workload.model, workload.model.parameters
    routed = held_bytes_per_parameter(model.stored_bytes_per_expert_parameter, workload)
    other = held_bytes_per_parameter(model.stored_bytes_per_other_parameter, workload)
    return p.routed_experts * routed + (p.total() - p.routed_experts) * other


def packings(workload: Workload) -> tuple[Packed, ...]:
    """What the bundled runtime may hold experts in that are not packed yet, the most exact first.

    Their values are bf16, and so is the arithmetic of its kernels; bf12 takes no wider ones.
    """
    model = workload.model
    wanted = tuple(name for name in PACKINGS if workload.quantize in (name, "allow"))
    if workload.dtype != "bf16" or not model.packable():
        return ()
    sixteen_bit = model.stored_bytes_per_other_parameter == 2.0
    return tuple(name for name in wanted if name != "bf12" or sixteen_bit)


def kv_dtypes(workload: Workload) -> tuple[KvDtype, ...]:
    """What the bundled runtime may keep keys and values in, the more exact first.

    Its kernels take int8 rows of whole lines, and no latents.
    """
    attention = workload.model.attention
    if workload.kv_cache == "same" or attention.kind == "mla" or attention.head_dim % 64:
        return ("same",)
    return ("int8",) if workload.kv_cache == "int8" else ("same", "int8")


def held_as(workload: Workload, weights_dtype: WeightsDtype, kv_dtype: KvDtype = "same") -> Workload:
    """The workload with its weights and its cache as a policy holds them."""
    if kv_dtype != workload.kv_dtype:
        workload = replace(workload, kv_dtype=kv_dtype)
    if weights_dtype == "checkpoint":
        return workload
    return in_fp8(workload) if weights_dtype == "fp8" else packed(workload, weights_dtype)


def packed(workload: Workload, packing: Packing) -> Workload:
    """The workload with routed experts, or the MLPs of a dense model, packed by `runtime_min quantize`."""
    name = "routed_experts" if workload.model.experts else "dense_mlp"
    size = PACKED_BYTES[packing]
    operators = tuple(
        replace(op, stored_bytes_per_parameter=size) if op.name == name else op for op in workload.operators
    )
    return replace(workload, model=workload.model.packed(packing), operators=operators)


def in_fp8(workload: Workload) -> Workload:
    """The workload with the matrices of its layers held in fp8, as vLLM rounds them while loading: not the
    embedding, the LM head, the router and the norms."""
    model, p = workload.model, workload.model.parameters
    kept = p.embedding + p.lm_head + p.router + p.norms
    others = p.total() - p.routed_experts
    mean = (others - kept + model.stored_bytes_per_other_parameter * kept) / others
    operators = tuple(
        op
        if op.name in ("lm_head", "router") or is_attention_core(op)
        else replace(op, stored_bytes_per_parameter=1.0)
        for op in workload.operators
    )
    smaller = replace(model, stored_bytes_per_expert_parameter=1.0, stored_bytes_per_other_parameter=mean)
    return replace(workload, model=smaller, operators=operators)
