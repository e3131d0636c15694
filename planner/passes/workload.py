"""Spec, Inputs -> Workload: request classes in size buckets, and the model's operators as cost laws."""

from __future__ import annotations

import numpy as np

from moeplan.planner.buckets import size_buckets
from moeplan.planner.diagnostics import CompileError, Diagnostic
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.model import Model
from moeplan.planner.ir.spec import BatchSpec, OnlineSpec, Spec
from moeplan.planner.ir.workload import Bucket, Operator, OperatorName, RequestClass, Workload
from moeplan.planner.request_files import PromptsFile
from moeplan.planner.traces import RequestTrace


def build_workload(spec: Spec, inputs: Inputs) -> Workload:
    """Return the workload of `spec`; sizes from files come with `inputs`.

    Raises CompileError for requests longer than the model's context.
    """
    classes = []
    if spec.workload.batch:
        classes.append(_batch(spec.workload.batch, inputs))
    if spec.workload.online:
        classes.append(_online(spec.workload.online, inputs.trace))
    _require_context(spec, inputs.model, classes)
    return Workload(
        model=inputs.model,
        dtype=spec.model.dtype,
        quantize=spec.model.quantize,
        kv_cache=spec.model.kv_cache,
        operators=_operators(inputs.model),
        classes=tuple(classes),
        popularity=inputs.popularity,
    )


def _require_context(spec: Spec, model: Model, classes: list[RequestClass]) -> None:
    """Requests must fit the context that the model was made for."""
    problems = [
        Diagnostic(
            code="context-too-long",
            span=spec.span(f"workload.{requests.name}"),
            message=f"requests of up to {requests.context_tokens_max:,} tokens do not fit {model.name}",
            hint=f"its context is {model.max_context_tokens:,} tokens, prompt and output together",
        )
        for requests in classes
        if 0 < model.max_context_tokens < requests.context_tokens_max
    ]
    if problems:
        raise CompileError(*problems)


def _batch(batch: BatchSpec, inputs: Inputs) -> RequestClass:
    listed = inputs.prompts
    prompt = float(batch.prompt_tokens or (listed.mean_prompt_tokens if listed else 0))
    output = float(batch.output_tokens or (listed.mean_output_tokens if listed else 0))
    return RequestClass(
        name="batch",
        buckets=(Bucket(prompt_tokens=prompt, output_tokens=output, share=1.0),),
        prompt_tokens_min=min(round(prompt), listed.min_prompt_tokens) if listed else round(prompt),
        prompt_tokens_max=max(round(prompt), listed.max_prompt_tokens if listed else 0),
        output_tokens_max=max(round(output), listed.max_output_tokens if listed else 0),
        requests=listed.requests if listed else batch.requests,
        deadline_s=batch.deadline_s,
        rate_per_s=0.0,
        arrival_cv=0.0,
        slo=None,
        basis=_listed_basis(listed) if listed else "spec",
    )


def _listed_basis(listed: PromptsFile) -> str:
    skipped = f", {listed.unreadable} lines without a readable request" if listed.unreadable else ""
    return f"prompts file, tokens estimated from bytes{skipped}"


def _online(online: OnlineSpec, trace: RequestTrace | None) -> RequestClass:
    if trace:
        buckets = size_buckets(trace.prompt_tokens, trace.output_tokens)
        prompts, outputs = trace.prompt_tokens, trace.output_tokens
    else:
        buckets = tuple(
            Bucket(prompt_tokens=s.prompt_tokens, output_tokens=s.output_tokens, share=s.share)
            for s in online.sizes
        )
        prompts = np.array([s.prompt_tokens for s in online.sizes])
        outputs = np.array([s.output_tokens for s in online.sizes])
    rate = online.rate_per_s if online.rate_per_s is not None else (trace.rate_per_s if trace else 0.0)
    unread = trace.unread_note() if trace else ""
    return RequestClass(
        name="online",
        buckets=buckets,
        prompt_tokens_min=round(min(bucket.prompt_tokens for bucket in buckets)),
        prompt_tokens_max=int(prompts.max()),
        output_tokens_max=int(outputs.max()),
        requests=0,
        deadline_s=None,
        rate_per_s=rate,
        arrival_cv=trace.arrival_cv if trace else 1.0,
        slo=online.slo,
        basis="spec" if trace is None else ", ".join(["trace"] + [unread] * bool(unread)),
    )


def _operators(model: Model) -> tuple[Operator, ...]:
    """Each operator once, summed over its layers; those that the model lacks are left out."""
    p, a = model.parameters, model.attention
    full, windowed = model.layers - a.windowed_layers, a.windowed_layers
    k_share = model.experts_per_token / model.experts if model.experts else 0.0
    hidden, k = model.hidden, model.experts_per_token
    heads_out = a.heads * a.value_dim
    found = (
        _linear(model, "attention_projections", model.layers, p.attention, 2 * hidden + 3 * heads_out),
        _core(model, "attention_core", full, 0),
        _core(model, "windowed_attention_core", windowed, a.window_tokens),
        _linear(model, "router", model.moe_layers, p.router, hidden),
        _linear(
            model,
            "routed_experts",
            model.moe_layers,
            p.routed_experts,
            k * (2 * hidden + 3 * model.expert_intermediate),
            used=k_share,
        ),
        _linear(
            model,
            "shared_experts",
            model.moe_layers,
            p.shared_experts,
            2 * hidden + 3 * model.shared_intermediate,
        ),
        _linear(
            model, "dense_mlp", model.dense_layers, p.dense_mlp, 2 * hidden + 3 * model.dense_intermediate
        ),
        _linear(model, "lm_head", 1, p.lm_head or p.embedding, hidden + model.vocab),
    )
    return tuple(
        operator
        for operator in found
        if operator.layers and operator.flops_per_token + operator.flops_per_context_token
    )


def _linear(
    model: Model, name: OperatorName, layers: int, parameters: int, values: int, used: float = 1.0
) -> Operator:
    """A matrix product: two FLOPs per parameter used; `values` activations per token and layer."""
    routed = name == "routed_experts"
    return Operator(
        name=name,
        layers=layers,
        parameters=parameters,
        flops_per_token=2.0 * parameters * used,
        flops_per_context_token=0.0,
        prefill_flops_per_context_token=0.0,
        kv_values_per_context_token=0.0,
        context_limit_tokens=0,
        activation_values_per_token=float(layers * values),
        stored_bytes_per_parameter=(
            model.stored_bytes_per_expert_parameter if routed else model.stored_bytes_per_other_parameter
        ),
    )


def _core(model: Model, name: OperatorName, layers: int, limit: int) -> Operator:
    """QK^T and PV over the cache; no weights."""
    attention = model.attention
    return Operator(
        name=name,
        layers=layers,
        parameters=0,
        flops_per_token=0.0,
        flops_per_context_token=float(layers * attention.score_flops_per_pair()),
        prefill_flops_per_context_token=float(layers * attention.prefill_flops_per_pair()),
        kv_values_per_context_token=float(layers * attention.kv_values_per_token()),
        context_limit_tokens=limit,
        activation_values_per_token=float(
            layers * attention.heads * (attention.head_dim + attention.value_dim)
        ),
        stored_bytes_per_parameter=0.0,
    )
