"""Plan, Analysis -> report.html: one file that needs nothing else; every chart beside its table.

A part of the report is one function in SECTIONS: it takes both records and yields sections, none where the
plan has nothing to say about it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from moeplan.codegen.bill import cost_lines, deployed, deployed_usd_per_hour, price_note
from moeplan.codegen.decisions import amount_text
from moeplan.codegen.emit.chart import chart as pipeline_svg
from moeplan.codegen.emit.report import REST, UNRUN_KERNELS, kind_of, latency, taken_as, values
from moeplan.codegen.page import Section, Table, Tile
from moeplan.codegen.plots import (
    Chart,
    batch_chart,
    frontier_chart,
    measured_chart,
    roofline_chart,
    timeline_chart,
    value_text,
)
from moeplan.codegen.render import render
from moeplan.planner.ir.analysis import Analysis, OperatorPoint, ReplicaAnalysis
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.units import format_bytes, format_duration, format_figure

PATH = "report.html"
_EXCLUDED = {"": "", "SLO": "breaks the SLO", "memory": "does not fit", "requests": "more than requests"}
_KINDS = {
    "datasheet": "a manufacturer's or cloud's own figure",
    "analytic": "computed from data sheets and measured efficiencies of similar kernels",
    "calibrated": "computed from figures measured on this machine",
    UNRUN_KERNELS: "computed from this machine's kernels, which were measured; no run of the plan was",
    "measured": "this configuration measured in runs",
}


def emit(plan: Plan, analysis: Analysis) -> dict[str, str]:
    """Return report.html."""
    told = values(plan)
    sections = [section for part in SECTIONS for section in part(plan, analysis)]
    page = render(
        "report/report.html.j2",
        name=plan.spec.name,
        model=f"{plan.workload.model.name}: {told['totals']} parameters, {told['active']} active per token, "
        f"{told['weights']} of weights",
        work=told["classes"],
        tiles=list(_tiles(plan)),
        caution=[f"{r['name']}: {r['unrun']}" for r in told["replicas"] if r["unrun"]],
        sections=sections,
    )
    return {PATH: page}


def _tiles(plan: Plan) -> Iterator[Tile]:
    sites = plan.placement.sites
    both = list(zip(plan.fleet.choices, sites, strict=True))
    deploy = [f"{deployed(site)} × {choice.column.policy.machine.name}" for choice, site in both]
    markets = sorted({choice.column.market for choice in plan.fleet.choices})
    yield Tile(label="deploy", value=" + ".join(deploy), note=", ".join(markets))
    if plan.fleet.usd_per_hour:
        yield Tile(label="cost", value=f"{deployed_usd_per_hour(plan):.2f} USD/h", note=price_note(plan))
        for site in sites:
            if site.outlook:
                bill = f"{site.outlook.usd_per_hour:.2f} USD/h"
                yield Tile(label="expected bill", value=bill, note=f"of {site.column}, stand-ins included")
        for serves, price, bill in values(plan)["token_prices"]:
            note = f"per million generated tokens, {serves}, {bill}"
            yield Tile(label="token price", value=price, note=note)
    for replica in plan.replicas:
        rate = replica.policy.generated_tokens_per_s
        value = f"{format_figure(rate.value)} tokens/s"
        yield Tile(label="each replica generates", value=value, note=_band(replica))
        if replica.policy.serves == "online":
            yield Tile(
                label="latency when full", value=latency(replica.policy), note="slowest size, no queue"
            )
        yield Tile(
            label="bottleneck", value=replica.policy.bottleneck.lane, note=str(replica.policy.bottleneck)
        )


def _band(replica: Replica) -> str:
    rate = replica.policy.generated_tokens_per_s
    return f"{format_figure(rate.low)} to {format_figure(rate.high)} (90 %), {kind_of(replica.policy, rate)}"


# Sections


def _fleet(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    shown = ("name", "replicas", "machine", "market", "usd_per_hour", "load", "hours")
    deploy = [[row[column] for column in shown] for row in values(plan)["deploy"]]
    buckets = {requests.name: requests.buckets for requests in plan.workload.classes}
    routes = [
        (
            route.serves,
            f"{buckets[route.serves][route.bucket].prompt_tokens:.0f} + "
            f"{buckets[route.serves][route.bucket].output_tokens:.0f}",
            route.column,
            f"{route.share:.1%}",
        )
        for route in plan.fleet.routes
    ]
    zones = [
        (
            site.column,
            f"{zone.cloud}/{zone.region}",
            f"{zone.usd_per_hour:.4f}",
            f"{zone.on_demand_usd_per_hour:.4f}",
        )
        for site in plan.placement.sites
        for zone in site.zones
    ]
    columns = ("replica", "count", "machine", "market", "USD/h", "load", "runs")
    tables = [
        Table(caption="what to deploy", header=columns, rows=deploy),
        Table(caption="which requests go where", header=("work", "tokens", "replica", "share"), rows=routes),
    ]
    if zones:
        where = ("replica", "region", "USD/h", "on demand")
        tables.append(Table(caption="where, cheapest first", header=where, rows=zones))
    load = [f"{line}." for line in values(plan)["load"]]
    text = [*(f"{line}." for line in cost_lines(plan)), *load, f"Solver: {plan.fleet.solver_status}."]
    yield Section(title="Fleet and routing", text=text, tables=tables)


def _decisions(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    if not analysis.decisions:
        return
    rows = [
        (
            decision.chosen,
            amount_text(decision, decision.value),
            decision.alternative,
            amount_text(decision, decision.other),
            f"{format_figure(decision.times_worse)} times",
        )
        for decision in analysis.decisions
    ]
    yield Section(
        title="The decisions that mattered most",
        text=["Each undone by itself and solved again, online fleets with their queues simulated."],
        tables=[Table(caption="", header=("chosen", "", "instead of", "", "worse"), rows=rows)],
    )


def _frontiers(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    for frontier in analysis.frontiers:
        rows = [
            (
                value_text(frontier, p.value),
                f"{p.usd_per_hour:.2f}" if p.fleet else "–",
                p.fleet or "no fleet",
            )
            for p in frontier.points
        ]
        here = next(n for n, point in enumerate(frontier.points) if point.factor == 1.0)
        header = (frontier.name, "USD/h", "cheapest fleet")
        yield Section(
            title=f"Cost against {frontier.name}",
            text=["Each point is the cheapest fleet there, solved anew; between points the line is a guide."],
            charts=[frontier_chart(frontier)],
            tables=[Table(caption="", header=header, rows=rows, chosen=here)],
        )


def _replicas(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    """Each replica's sections, under its name where there are several."""
    for replica, found in zip(plan.replicas, analysis.replicas, strict=True):
        sections = [_performance(plan, replica), _roofline(replica, found), _batches(replica, found)]
        sections += [_pipeline(replica)] if replica.pipeline else []
        sections.append(_memory(replica))
        of = f" of {replica.name}" if len(plan.replicas) > 1 else ""
        yield from (replace(section, title=f"{section.title}{of}") for section in sections)


def _performance(plan: Plan, replica: Replica) -> Section:
    told = next(r for r in values(plan)["replicas"] if r["name"] == replica.name)
    header = ("phase", "expected, 90 % interval", "figures are")
    lanes = (told["lane_heading"], "per decode pass", told["share_heading"])
    text = [f"{told['how']}.", f"Bottleneck: {told['bottleneck']}."]
    text += [f"{told['bound']}."] if told["bound"] else []
    return Section(
        title="Speed and bottleneck",
        text=text,
        tables=[
            Table(caption="speed", header=header, rows=told["phases"]),
            Table(caption="where the time of a predicted pass goes", header=lanes, rows=told["lanes"]),
        ],
    )


def _roofline(replica: Replica, found: ReplicaAnalysis) -> Section:
    header = ("", "operator", "on", "FLOP/byte", "per byte fetched", "GFLOP/s", "bound by")
    rows = [
        (str(number), point.name.replace("_", " "), point.level, f"{point.flops_per_byte:.3g}",
         _finite(point), format_figure(point.flops_per_s / 1e9), point.bound)
        for number, point in enumerate(found.operators, 1)
    ]  # fmt: skip
    text = [
        "Decode, one call over a micro-batch. Solid lines are what each memory, then each processor allows; "
        "dashed lines what the link up from a memory allows. Hollow marks count only the bytes that cross it."
    ]
    shown = _shown(replica, found.roofline)
    text += [
        f"Experts whose weights lie in {p.level}, called over {p.micro_batch} tokens: fetched for fewer than "
        f"P1, {p.p1_flops_per_byte:.3g} FLOP/byte, they are faster computed there; for fewer than P2, "
        f"{p.p2_flops_per_byte:.4g} FLOP/byte ({p.tokens_at_p2:,.0f} tokens per pass), the link bounds them."
        for p in shown.turning_points
        if p.p1_flops_per_byte > 0
    ]
    text += [_binds(replica, point) for point in found.operators if point.link_bound_below]
    return Section(
        title="Hierarchical roofline",
        text=text,
        charts=[roofline_chart(shown, found.operators, replica.name)],
        tables=[Table(caption="", header=header, rows=rows)],
    )


def _binds(replica: Replica, point: OperatorPoint) -> str:
    """What bounds an operator whose weights are fetched, and what bounds the whole pass."""
    side = "below" if point.bound == "link" else "not below"
    return (
        f"Here the {point.name.replace('_', ' ')} do {point.fetched_flops_per_byte:.4g} FLOP per byte "
        f"fetched, {side} {point.link_bound_below:.4g}: alone they are bound by {point.bound}. "
        "Lanes overlap, and other operators and sums over GPUs take time too: of the pass as a whole the "
        f"bottleneck is {replica.policy.bottleneck}."
    )


def _shown(replica: Replica, roofline: Roofline) -> Roofline:
    """The roofs that the policy's data lie under; turning points where something is fetched."""
    policy = replica.policy
    deepest = "disk" if policy.experts_disk_share else policy.weights_on
    levels = [roof.level for roof in roofline.roofs]
    roofs = roofline.roofs[: levels.index(deepest) + 1]
    points = roofline.turning_points if policy.engine == "runtime_min" else ()
    names = {roof.level for roof in roofs}
    return replace(
        roofline,
        roofs=roofs,
        turning_points=tuple(p for p in points if p.level in names),
    )


def _finite(point: OperatorPoint) -> str:
    fetched = point.fetched_flops_per_byte
    return f"{fetched:.3g}" if math.isfinite(fetched) else "–"


def _batches(replica: Replica, found: ReplicaAnalysis) -> Section:
    policy = replica.policy
    header = ("in flight", "tokens/s", "TTFT", "ITL", "")
    rows = [
        (f"{p.batch}", format_figure(p.tokens_per_s), format_duration(p.ttft_s), format_duration(p.itl_s),
         _EXCLUDED[p.excluded])
        for p in found.batches
    ]  # fmt: skip
    here = next(n for n, point in enumerate(found.batches) if point.batch == policy.sequences)
    text = ["The same placement with fewer and more sequences in flight; TTFT and ITL of the slowest size."]
    if policy.corrections:
        text.append("As predicted, without the corrections that measurements made.")
    return Section(
        title="Throughput against batch",
        text=text,
        charts=[batch_chart(found.batches, policy.sequences, replica.name)],
        tables=[Table(caption="", header=header, rows=rows, chosen=here)],
    )


def _pipeline(replica: Replica) -> Section:
    pipeline = replica.pipeline
    assert pipeline is not None  # the caller looked
    lanes = ", ".join(lane.lane for lane in pipeline.busy if lane.seconds)
    simulated, predicted = (format_duration(s) for s in (pipeline.pass_s, replica.policy.decode.seconds))
    alt = (
        f"Gantt chart of {pipeline.schedule.name} on the lanes {lanes} around the boundary between two "
        "decode passes."
    )
    others = [(pipeline.schedule.name, format_duration(pipeline.pass_s), "1")]
    others += [
        (other.name, format_duration(other.pass_s), f"{other.pass_s / pipeline.pass_s:.2f}")
        for other in pipeline.others
    ]
    busy = [
        (lane.lane, format_duration(lane.seconds), f"{lane.seconds / pipeline.pass_s:.0%}")
        for lane in pipeline.busy
        if lane.seconds
    ]
    return Section(
        title="One step of the pipeline",
        text=[
            f"{pipeline.tasks} tasks and {pipeline.waits} waits per decode pass, proved free of races and "
            f"deadlocks. Simulated, the pass takes {simulated}, of which the busiest lane idles "
            f"{pipeline.bubble_s / pipeline.pass_s:.1%}; the lanes' predicted seconds are "
            f"{taken_as(replica.policy)}. Predicted are {predicted}{REST if replica.policy.gpus else ''}."
        ],
        wide=[Chart(svg=_inlined(pipeline_svg(pipeline), replica.name), alt=alt)],
        tables=[
            Table(
                caption="lanes in the simulated pass",
                header=("lane", "busy", f"of the simulated {simulated}"),
                rows=busy,
            ),
            Table(
                caption="schedules",
                header=("schedule", "simulated pass", "times this one"),
                rows=others,
                chosen=0,
            ),
        ],
    )


def _inlined(svg: str, name: str) -> str:
    """A drawing of a file of its own as part of a page with others."""
    svg = svg.replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
    return re.sub(' (xmlns|role)="[^"]*"', "", svg)


def _memory(replica: Replica) -> Section:
    policy = replica.policy
    rows = [(use.level, use.item, format_bytes(use.bytes)) for use in policy.memory]
    limits = [
        (
            limit.level,
            format_bytes(policy.used_bytes(limit.level)),
            format_bytes(limit.bytes),
            f"{policy.used_bytes(limit.level) / limit.bytes:.0%}",
        )
        for limit in policy.limits
    ]
    return Section(
        title="Memory",
        tables=[
            Table(caption="limits", header=("memory", "used", "may be used", "share"), rows=limits),
            Table(caption="what takes it", header=("memory", "item", "size"), rows=rows),
        ],
    )


def _alternatives(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    told = values(plan)
    rows = [tuple(map(str, row)) for row in told["alternatives"]]
    if rows:
        header = ("each alone", "serves", "count", "cost", "of what")
        text = ["Quota and budget aside. moeplan explain SPEC --why-not MACHINE solves one of them in full."]
        yield Section(
            title="What else was to be had", text=text, tables=[Table(caption="", header=header, rows=rows)]
        )
    if told["refusals"]:
        table = Table(caption="", header=("refused", "for example"), rows=told["refusals"])
        yield Section(title="Refused", tables=[table])


def _why(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    """What the fleet's own record says, where the report has it."""
    if lines := values(plan).get("why"):
        yield Section(title="Why this fleet", text=[f"{line[0].upper()}{line[1:]}." for line in lines])


def _latency(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    """What simulation with queues says of each online class, where the report has it."""
    for found in values(plan).get("attainment", ()):
        text = [f"{found['requests']}, in a queueing simulation; the SLO is kept for {found['shares']}."]
        text += [f"{line}." for line in (found["search"], found["warning"]) if line]
        text.append("An engine steps while it holds any request: one that is never idle need not be full.")
        pools = ("replica, in the surge", "requests", "SLO kept", "engines not idle", "slots taken")
        yield Section(
            title="Latency, simulated",
            text=text,
            tables=[
                Table(caption="", header=("", "rate", "P50", "P90", "P99"), rows=found["rows"]),
                Table(caption="", header=pools, rows=found["pools"]),
            ],
        )


def _availability(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    """What is promised on what evidence; of each spot site what is expected, where the report has it."""
    statement = plan.placement.statement
    text = [f"{statement[0].upper()}{statement[1:]} (evidence: {plan.placement.evidence})."]
    yield Section(title="Availability", text=text)
    for site in values(plan).get("sites", ()):
        header = (
            f"{site['place']}, cheapest first",
            "spot, USD/h",
            "on-demand",
            "fixed target: spot",
            "on-demand",
        )
        columns = ("name", "spot", "on_demand", "spot_target", "on_demand_target")
        zones = [[zone[column] for column in columns] for zone in site["zones"]]
        tables = [Table(caption=f"{site['place']}s", header=header, rows=zones)]
        if site["figures"]:
            tables.insert(0, Table(caption="expected", header=("", ""), rows=site["figures"]))
        title = f"Availability of {site['name']}"
        yield Section(title=title, text=[f"{site['rule']}.", *site["notes"]], tables=tables)


def _timelines(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    """Each site that a spot trace placed, over that trace."""
    for timeline in analysis.timelines:
        lost = sum(part.preemptions for part in timeline.rows)
        days = timeline.rows[-1].end_s / 86400
        rows = [
            (f"{part.begin_s / 86400:.3g} to {part.end_s / 86400:.3g}", f"{part.on_spot:.2f}",
             f"{part.on_demand:.2f}", f"{part.enough_share:.2%}", f"{part.preemptions}")
            for part in timeline.rows
        ]  # fmt: skip
        header = ("days", "ready on spot", "on demand", "time with enough", "lost")
        yield Section(
            title=f"Replay of {timeline.column}",
            text=[
                f"What {timeline.wanted} replicas would have done over the trace ({timeline.source}): {lost} "
                f"preemptions in {days:.3g} days. Means of each stretch; before the first cold start nothing "
                "counts as missing."
            ],
            wide=[timeline_chart(timeline)],
            tables=[Table(caption="", header=header, rows=rows)],
        )


def _measured(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    pairs = [
        (f"{c.figure}, {c.prompt_tokens:.0f} + {c.output_tokens:.0f}", c)
        for replica in plan.replicas
        for c in replica.policy.corrections
    ]
    if not pairs:
        hint = "moeplan run --profile FILE records what a machine does; `profile: FILE` in the spec uses it."
        what = "its speeds are predicted"
        if any(
            kind_of(replica.policy, replica.policy.generated_tokens_per_s) == UNRUN_KERNELS
            for replica in plan.replicas
        ):
            what = "its speeds are predicted from this machine's measured kernels"
        text = [f"No measured run stands behind this plan: {what}.", hint]
        yield Section(title="Predicted against measured", text=text)
        return
    rows = [
        (name, f"{c.factor:.3g}", c.method, ", ".join(map(str, c.lines)), f"{c.residual:.0%}")
        for name, c in pairs
    ]
    header = ("figure, tokens", "measured over predicted", "method", "lines of the profile", "residual")
    yield Section(
        title="Predicted against measured",
        charts=[measured_chart([(name, correction.factor) for name, correction in pairs])],
        tables=[Table(caption="", header=header, rows=rows)],
    )


def _provenance(plan: Plan, analysis: Analysis) -> Iterator[Section]:
    used = sorted(
        {kind_of(replica.policy, replica.policy.generated_tokens_per_s) for replica in plan.replicas}
    )
    kinds = [(kind, _KINDS[kind]) for kind in used]
    sources = [(source.what, source.citation) for source in analysis.sources]
    yield Section(
        title="Where the numbers come from",
        text=[
            "Speeds carry a 90 % interval and their kind; costs follow from speeds and prices.",
            f"Model, machines and offers have the digest {plan.facts_sha256[:16]}.",
        ],
        tables=[
            Table(caption="kinds of figures here", header=("kind", "meaning"), rows=kinds),
            Table(caption="sources", header=("of", "source"), rows=sources),
        ],
    )


SECTIONS: tuple[Callable[[Plan, Analysis], Iterator[Section]], ...] = (
    _fleet,
    _decisions,
    _why,
    _frontiers,
    _latency,
    _replicas,
    _alternatives,
    _availability,
    _timelines,
    _measured,
    _provenance,
)
