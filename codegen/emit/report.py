"""Plan -> report.md: what to deploy, what it costs and reaches, and why. Short, made for pull requests."""

from __future__ import annotations

from typing import Any

from moeplan.codegen.bill import cost_lines, deployed, token_prices
from moeplan.codegen.emit.chart import chart_path
from moeplan.codegen.fleet_text import NEVER_RUN, fleet_lines, status_line
from moeplan.codegen.packing import option_rows, packing_of, quality_sources, quantize_command
from moeplan.codegen.placement import site_lines
from moeplan.codegen.render import render
from moeplan.codegen.vllm import vllm_arguments
from moeplan.planner.ir.attainment import ClassAttainment, Percentiles
from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.fleet import Choice
from moeplan.planner.ir.placement import Site
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.policy import CapacityBound, Pages, Policy, Rejection
from moeplan.planner.ir.profile import Correction
from moeplan.planner.ir.schedule import Pipeline
from moeplan.planner.ir.workload import RequestClass
from moeplan.planner.units import format_bytes, format_duration, format_figure
from moeplan.runtime_min.plan_file import ARCHITECTURES

REST = "; speeds and latencies are of the latter: the rest is what measured runs lose to imperfect overlap"
UNRUN_KERNELS = "from measured kernels"
_OPS_SHOWN = 3  # of the longest chain


def emit(plan: Plan) -> dict[str, str]:
    """Return report.md."""
    return {"report.md": render("report/report.md.j2", **values(plan))}


def values(plan: Plan) -> dict[str, Any]:
    """What the reports say, as text."""
    return {
        "plan": plan,
        "model": plan.workload.model,
        "classes": [_class_line(requests) for requests in plan.workload.classes],
        "deploy": [_deploy_row(c, s) for c, s in zip(plan.fleet.choices, plan.placement.sites, strict=True)],
        "sites": [site_lines(site) for site in plan.placement.sites if site.market == "spot"],
        "why": fleet_lines(plan),
        "solver": status_line(plan.fleet),
        "rented": plan.fleet.usd_per_hour > 0,
        "cost": cost_lines(plan),
        "load": _load_lines(plan),
        "token_prices": [(name, interval(price, "$", ""), bill) for name, price, bill in token_prices(plan)],
        "attainment": [_attainment(found) for found in plan.attainment.classes],
        "replicas": [_replica(plan, replica) for replica in plan.replicas],
        "alternatives": [
            (a.column, a.serves, a.replicas, f"{a.cost_usd:.2f}", a.note) for a in plan.fleet.alternatives
        ],
        "refusals": _refusals(plan),
        "unused_rows": [(row.line, row.reason) for row in plan.unused_rows],
        "totals": _parameters(plan.workload.model.parameters.total()),
        "active": _parameters(plan.workload.model.active_parameters()),
        "weights": format_bytes(plan.workload.model.weight_bytes()),
    }


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _refusals(plan: Plan) -> list[tuple[str, str]]:
    """Machines refused for one reason together, with the first one's numbers; a lone one is named once."""
    groups: dict[tuple[str, str], list[Rejection]] = {}
    for rejection in plan.rejections:
        groups.setdefault((rejection.serves, rejection.constraint), []).append(rejection)
    return [
        (
            f"{serves}, {constraint}: {', '.join(r.machine for r in group)}",
            f"{group[0].machine}: {group[0].message}" if len(group) > 1 else group[0].message,
        )
        for (serves, constraint), group in groups.items()
    ]


def interval(estimate: Estimate, before: str, after: str) -> str:
    """`value (low to high)` with the unit around the value."""
    text = f"{before}{format_figure(estimate.value)}{after}"
    return (
        f"{text} ({format_figure(estimate.low)} to {format_figure(estimate.high)})"
        if estimate.sigma
        else text
    )


def latency(policy: Policy) -> str:
    """The slowest bucket's TTFT and ITL."""
    ttft, itl = max(r.ttft_s for r in policy.rates), max(r.itl_s for r in policy.rates)
    return f"TTFT {format_duration(ttft)}, ITL {format_duration(itl)}"


def kind_of(policy: Policy, rate: Estimate) -> str:
    """What stands behind a policy's speed; measured kernels alone are no measured run."""
    unrun = rate.provenance == "measured" and not policy.corrections
    return UNRUN_KERNELS if unrun else rate.provenance


def _load_lines(plan: Plan) -> list[str]:
    """What loads are of, and how full a deadline is planned."""
    lines = ["The load of online replicas is of what queues leave of their throughput"]
    lines *= bool(plan.attainment.classes)
    targets = [c.target for c in plan.fleet.choices if c.column.policy.serves == "batch"]
    if targets and any(requests.deadline_s for requests in plan.workload.classes):
        lines.append(f"The batch's deadline is planned to at most {max(targets):.0%} load")
    return lines


def why_unrun(plan: Plan, policy: Policy) -> str:
    """Why the bundled runtime cannot execute a policy that is planned for it; empty where it can."""
    if policy.engine == "runtime_min" and plan.workload.model.model_type not in ARCHITECTURES:
        return f"this version of runtime_min runs {', '.join(ARCHITECTURES)} models only"
    return ""


def caution(policy: Policy) -> str:
    """What to know before running a policy that the bundled runtime can execute; empty where nothing."""
    if policy.rehearsed_only:
        return "runtime_min has never run on a GPU, only with the CPU in its place (--rehearse)"
    return ""


def _class_line(requests: RequestClass) -> str:
    sizes = (
        f"{requests.mean_prompt_tokens():.0f} prompt and {requests.mean_output_tokens():.0f} output tokens"
    )
    if requests.context_tokens_max > requests.mean_prompt_tokens() + requests.mean_output_tokens() + 1:
        most = f"{requests.prompt_tokens_max} and {requests.output_tokens_max}"
        sizes += f" on average and {most} at most ({requests.basis})"
    else:
        sizes += " at most"
    if requests.name == "batch":
        deadline = f", within {format_duration(requests.deadline_s)}" if requests.deadline_s else ""
        return f"batch: {requests.requests} requests of {sizes}{deadline}"
    slo = requests.slo
    assert slo is not None  # every online class has one
    return (
        f"online: {requests.rate_per_s:.4g} requests/s of {sizes}; TTFT {format_duration(slo.ttft_s)}, "
        f"ITL {format_duration(slo.itl_s)} for {slo.attainment * 100:.5g} % of them"
    )


def _deploy_row(choice: Choice, site: Site) -> dict[str, str]:
    regions = ", ".join(dict.fromkeys(f"{zone.cloud}/{zone.region}" for zone in site.zones)) or "yours"
    return {
        "name": f"{site.column} ({NEVER_RUN})" if choice.column.policy.rehearsed_only else site.column,
        "replicas": _count(site),
        "machine": choice.column.policy.machine.name,
        "market": site.market,
        "regions": regions,
        "usd_per_hour": f"{deployed(site) * choice.column.usd_per_hour:.2f}",
        "load": f"{choice.utilisation:.0%}" if choice.utilisation < 1 else "–",
        "usd": f"{choice.usd:.2f}" if choice.usd else "–",
        "hours": format_duration(choice.hours * 3600) if choice.hours else "always",
    }


def _count(site: Site) -> str:
    spare = f" + {site.spot_overprovision} to spare" if site.spot_overprovision else ""
    return f"{site.replicas}{spare}"


def _attainment(found: ClassAttainment) -> dict[str, Any]:
    """What simulation says of an online class."""
    source = "of the trace" if found.arrivals == "trace" else "with gamma-distributed gaps"
    rows = []
    for name, of in (("TTFT", "ttft"), ("ITL", "itl"), ("longest gap", "gap")):
        for speed, replay in (("as planned", found.planned), ("surge", found.surge)):
            percentiles: Percentiles = getattr(replay, of)
            cells = (percentiles.p50_s, percentiles.p90_s, percentiles.p99_s)
            rows.append((name, speed, *map(format_duration, cells)))
    return {
        "requests": f"{found.requests:,} requests {source}",
        "shares": attained(found),
        "rows": rows,
        "pools": [
            (p.column, f"{p.requests:,}", f"{p.attained_share:.2%}", f"{p.busy:.0%}", f"{p.occupied:.0%}")
            for p in found.surge.pools
        ],
        "search": _search_line(found),
        "warning": "" if found.bears_surge else "No fleet that can be had attains it in the surge",
    }


def attained(found: ClassAttainment) -> str:
    """Of how many requests the SLO is kept, in one line."""
    surge = f"{found.surge.attained_share:.2%} with {found.margin - 1:.0%} more requests"
    return (
        f"{found.planned.attained_share:.2%} of the requests, {surge} "
        f"({found.wanted_share * 100:.5g}% wanted)"
    )


def _search_line(found: ClassAttainment) -> str:
    """What simulation changed."""
    if found.fleets_tried == 1:
        return "The first fleet tried attains it"
    share, usd = f"{found.unsimulated_share:.2%}", f"{found.unsimulated_usd_per_hour:.2f}"
    return (
        f"{found.fleets_tried} fleets were tried; the first, {usd} USD/h, keeps it for {share} in the surge"
    )


def _replica(plan: Plan, replica: Replica) -> dict[str, Any]:
    policy = replica.policy
    return {
        "name": replica.name,
        "how": _how(policy),
        "phases": [
            (name, interval(rate, "", " tokens/s"), kind_of(policy, rate))
            for name, rate in (
                ("prefill", policy.prefill_tokens_per_s),
                ("decode", policy.decode_tokens_per_s),
                ("generated, prefill included", policy.generated_tokens_per_s),
            )
        ],
        "corrections": _correction_lines(policy),
        "bottleneck": str(policy.bottleneck),
        "lane_heading": "lane" if policy.decode.overlap else "part",
        "share_heading": f"{'busy' if policy.decode.overlap else 'share'}, of the predicted "
        f"{format_duration(policy.decode.seconds)}",
        "lanes": [
            (lane.lane, format_duration(lane.seconds), f"{lane.seconds / policy.decode.seconds:.0%}")
            for lane in policy.decode.lanes
        ],
        "limits": [
            (limit.level, format_bytes(policy.used_bytes(limit.level)), format_bytes(limit.bytes))
            for limit in policy.limits
        ],
        "pipeline": _pipeline(replica.name, replica.pipeline, policy) if replica.pipeline else None,
        "bound": _bound_line(replica.bound, policy) if replica.bound else "",
        "options": option_rows(policy),
        "option_sources": quality_sources(policy),
        "quantize": quantize_command(plan.spec.model.path or "CHECKPOINT", policy),
        "unrun": why_unrun(plan, policy) or caution(policy),
        "command": _vllm_command(plan, policy) if policy.engine == "vllm" else "",
        "latency": latency(policy) if policy.serves == "online" else "",
    }


def _pipeline(replica: str, pipeline: Pipeline, policy: Policy) -> dict[str, Any]:
    """What the simulator says about the schedule and those beside it."""
    slowest = max((other.pass_s for other in pipeline.others), default=0.0)
    return {
        "name": pipeline.schedule.name,
        "chart": chart_path(replica),
        "tasks": pipeline.tasks,
        "waits": pipeline.waits,
        "pass": format_duration(pipeline.pass_s),
        "predicted": format_duration(policy.decode.seconds),
        "taken": taken_as(policy),
        "rest": REST if policy.gpus else "",
        "bubble": f"{pipeline.bubble_s / pipeline.pass_s:.1%}",
        "path": ", ".join(
            f"{o.op} {o.seconds / pipeline.pass_s:.0%}" for o in pipeline.critical[:_OPS_SHOWN]
        ),
        "others": [
            (other.name, format_duration(other.pass_s), f"{other.pass_s / pipeline.pass_s:.2f}")
            for other in pipeline.others
        ]
        if slowest > pipeline.pass_s
        else [],
    }


def taken_as(policy: Policy) -> str:
    """What the simulator makes of the lanes' predicted seconds."""
    return "taken as given" + ", longer where they share DRAM" * bool(policy.gpus)


def _bound_line(bound: CapacityBound, policy: Policy) -> str:
    """The capacity bound, and how much of it the plan reaches."""
    reached = policy.generated_tokens_per_s.value / bound.generated_tokens_per_s
    why = "arithmetic alone takes as long"
    if bound.binds == "memory":
        why = (
            f"memory holds the cache of {bound.sequences:,.0f} half-done requests, and the weights need "
            f"{format_duration(bound.pass_s)} to pass once"
        )
    most = f"{format_figure(bound.generated_tokens_per_s)} generated tokens/s"
    return f"No schedule exceeds {most}: {why}. This one is expected to reach {reached:.0%} of that"


def _correction_lines(policy: Policy) -> list[str]:
    """What the profile's rows did to each figure, sizes of one treatment together."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[Correction]] = {}
    for correction in policy.corrections:
        groups.setdefault((correction.figure, correction.method, correction.lines), []).append(correction)
    return [_correction_line(group) for group in groups.values()]


def _correction_line(group: list[Correction]) -> str:
    first = group[0]
    low, high = (f(correction.factor for correction in group) for f in (min, max))
    factor = f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
    lines = f"line{'s' * (len(first.lines) > 1)} {', '.join(map(str, first.lines))}"
    rows = f"{len(first.lines)} rows ({lines}; residual {first.residual:.0%})"
    how = {
        "exact": f"measured at this point ({lines}), {factor} of the prediction",
        "nearby": f"scaled by {factor} ({lines}, within a factor of 2)",
        "fit": f"scaled by {factor}, a power law through {rows}",
    }
    return f"{first.figure}: {how[first.method]}"


def _vllm_command(plan: Plan, policy: Policy) -> str:
    """How to start one replica by hand."""
    return " ".join(["vllm serve MODEL", *vllm_arguments(plan, policy)])


def _placed(policy: Policy) -> str:
    """Where experts and attention of an offloaded policy are."""
    which = ", the most popular," if policy.resident_experts else ""
    experts = f"{policy.resident_share:.0%} of them{which} resident"
    if policy.experts_cpu_share:
        experts += f", {policy.experts_cpu_share:.0%} computed by the CPU in decode"
    if policy.experts_disk_share:
        experts += f", {policy.experts_disk_share:.0%} read from disk in every pass"
    if not policy.attention_gpu_share:
        return f"{experts}, attention on the CPU"
    held = f"{policy.kv_gpu_share:.0%} of the KV cache in GPU memory"
    return f"{experts}, attention to {policy.attention_gpu_share:.0%} on the GPU, {held}"


def _gpus(policy: Policy) -> str:
    """How many GPUs share a model, and how they share its experts."""
    if policy.gpus == 1:
        return "1 GPU"
    each = "whole experts" if policy.expert_shares == "whole" else "a part of every expert"
    return f"{policy.gpus} GPUs with {each} on each"


def _routed(pages: Pages) -> str:
    """What decode reads where that is not every page; a page is as many experts as the plan says."""
    if not pages.places:
        return ""
    moving = pages.pages_per_layer - max(1, pages.resident_pages)
    unit = "experts" if pages.experts_per_page == 1 else f"groups of {pages.experts_per_page} experts"
    guessed = f", {pages.guesses} of them guessed ahead" if pages.guesses else ""
    return (
        f", decode reads only the {unit} that routing hits: {pages.hit_pages:.1f} of {moving} a layer "
        f"expected{guessed}"
    )


def _how(policy: Policy) -> str:
    batch = f"{policy.sequences} sequences in flight, computed in {policy.dtype}"
    if policy.engine == "vllm":
        gpus = f"{policy.gpus} GPU{'s' * (policy.gpus > 1)}"
        copies = f"{policy.data_parallel} copies on {gpus} each" if policy.data_parallel > 1 else gpus
        rounded = " rounded to fp8" if policy.weights_dtype == "fp8" else ""
        return f"vLLM, {copies}, weights{rounded} in GPU memory, at most {batch}"
    plural = "" if policy.micro_batches == 1 else "es"
    groups = f"{policy.micro_batches} micro-batch{plural} of {policy.micro_batch}"
    if policy.gpus:
        way = "through a pinned ring" if policy.staged else "from pinned memory"
        moved = f"experts streamed {way}" if policy.pages.pages_per_layer else "no expert streamed"
        return f"runtime_min, {_gpus(policy)}, {moved}, {_placed(policy)}, {batch}, in {groups}"
    packed = f" packed in {packing_of(policy)}" if packing_of(policy) else ""
    held = (
        f"weights{packed} held in memory"
        if policy.weights_on == "dram"
        else f"weights{packed} streamed from disk, {policy.resident_share:.0%} of each layer's pages resident"
        + _routed(policy.pages)
    )
    cache = ", keys and values in int8" if policy.kv_dtype == "int8" else ""
    return f"runtime_min, {held}, {batch}{cache}, in {groups}"
