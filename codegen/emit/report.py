"""Plan -> report.md: what to deploy, what it costs and reaches, and why. Short, made for pull requests."""

from __future__ import annotations

from typing import Any

from moeplan.codegen.render import render
from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.fleet import Choice
from moeplan.planner.ir.placement import Site
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.workload import RequestClass
from moeplan.planner.units import format_bytes, format_duration, format_figure

_REFUSALS = 8


def emit(plan: Plan) -> dict[str, str]:
    """Return report.md."""
    values: dict[str, Any] = {
        "plan": plan,
        "model": plan.workload.model,
        "classes": [_class_line(requests) for requests in plan.workload.classes],
        "deploy": [_deploy_row(c, s) for c, s in zip(plan.fleet.choices, plan.placement.sites, strict=True)],
        "rented": plan.fleet.usd_per_hour > 0,
        "usd_per_hour": f"{plan.fleet.usd_per_hour:.2f}",
        "token_prices": [
            (name, interval(price, "$", "")) for name, price in plan.fleet.usd_per_million_tokens
        ],
        "replicas": [_replica(replica) for replica in plan.replicas],
        "alternatives": [
            (a.column, a.serves, a.replicas, f"{a.cost_usd:.2f}", a.note) for a in plan.fleet.alternatives
        ],
        "refusals": plan.rejections[:_REFUSALS],
        "more_refusals": max(0, len(plan.rejections) - _REFUSALS),
        "totals": f"{plan.workload.model.parameters.total() / 1e9:.2f}",
        "active": f"{plan.workload.model.active_parameters() / 1e9:.2f}",
        "weights": format_bytes(plan.workload.model.weight_bytes()),
    }
    return {"report.md": render("report/report.md.j2", **values)}


def interval(estimate: Estimate, before: str, after: str) -> str:
    """`value (low to high)` with the unit around the value."""
    text = f"{before}{format_figure(estimate.value)}{after}"
    return (
        f"{text} ({format_figure(estimate.low)} to {format_figure(estimate.high)})"
        if estimate.sigma
        else text
    )


def _class_line(requests: RequestClass) -> str:
    sizes = (
        f"{requests.mean_prompt_tokens():.0f} prompt and {requests.mean_output_tokens():.0f} output tokens "
        f"on average ({requests.basis})"
    )
    if requests.name == "batch":
        deadline = f", within {format_duration(requests.deadline_s)}" if requests.deadline_s else ""
        return f"batch: {requests.requests} requests of {sizes}{deadline}"
    slo = requests.slo
    assert slo is not None  # every online class has one
    return (
        f"online: {requests.rate_per_s:.4g} requests/s of {sizes}; TTFT {format_duration(slo.ttft_s)}, "
        f"ITL {format_duration(slo.itl_s)} for {slo.attainment:.4g} of them"
    )


def _deploy_row(choice: Choice, site: Site) -> dict[str, str]:
    regions = ", ".join(f"{zone.cloud}/{zone.region}" for zone in site.zones) or "yours"
    return {
        "name": site.column,
        "replicas": str(choice.replicas),
        "machine": choice.column.policy.machine.name,
        "market": site.market,
        "regions": regions,
        "usd_per_hour": f"{choice.replicas * choice.column.usd_per_hour:.2f}",
        "load": f"{choice.utilisation:.0%}",
        "hours": format_duration(choice.hours * 3600) if choice.hours else "always",
    }


def _replica(replica: Replica) -> dict[str, Any]:
    policy = replica.policy
    return {
        "name": replica.name,
        "how": _how(policy),
        "generated": interval(policy.generated_tokens_per_s, "", " tokens/s"),
        "decode": interval(policy.decode_tokens_per_s, "", " tokens/s"),
        "prefill": interval(policy.prefill_tokens_per_s, "", " tokens/s"),
        "provenance": policy.generated_tokens_per_s.provenance,
        "bottleneck": policy.bottleneck,
        "lanes": [
            (lane.lane, format_duration(lane.seconds), f"{lane.seconds / policy.decode.seconds:.0%}")
            for lane in policy.decode.lanes
        ],
        "memory": [(use.level, use.item, format_bytes(use.bytes)) for use in policy.memory],
        "limits": [
            (limit.level, format_bytes(policy.used_bytes(limit.level)), format_bytes(limit.bytes))
            for limit in policy.limits
        ],
        "points": [
            (p.level, f"{p.p1_flops_per_byte:.3g}", f"{p.p2_flops_per_byte:.3g}", f"{p.tokens_at_p2:.0f}")
            for p in replica.roofline.turning_points
            if policy.engine == "runtime_min" and p.p1_flops_per_byte > 0
        ],
        "schedule": replica.schedule,
        "unrun": policy.engine == "runtime_min" and policy.gpus > 0,
    }


def _how(policy: Policy) -> str:
    batch = f"{policy.sequences} sequences in flight, computed in {policy.dtype}"
    if policy.engine == "vllm":
        return f"vLLM, {policy.data_parallel} × {policy.gpus} GPUs, weights in GPU memory, at most {batch}"
    plural = "" if policy.micro_batches == 1 else "es"
    groups = f"{policy.micro_batches} micro-batch{plural} of {policy.micro_batch}"
    if policy.gpus:
        way = "through a pinned ring" if policy.staged else "from pinned memory"
        return (
            f"runtime_min, experts streamed to {policy.gpus} GPU{'s' * (policy.gpus > 1)} {way}, "
            f"{policy.resident_share:.0%} of them resident, attention on the CPU, {batch}, in {groups}"
        )
    held = (
        "weights held in memory"
        if policy.weights_on == "dram"
        else f"weights streamed from disk, {policy.resident_share:.0%} of each layer's pages resident"
    )
    return f"runtime_min, {held}, {batch}, in {groups}"
