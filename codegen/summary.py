"""Plan -> the screen that `moeplan compile` ends with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moeplan.codegen.bill import cost_lines, token_prices
from moeplan.codegen.decisions import decision_text
from moeplan.codegen.emit.report import attained, caution, interval, kind_of, latency, why_unrun
from moeplan.codegen.fleet_text import NEVER_RUN, flip_line, minimised_lines
from moeplan.codegen.packing import packed_path, packing_of, quantize_command
from moeplan.planner.ir.analysis import Decision
from moeplan.planner.ir.fleet import Choice
from moeplan.planner.ir.placement import Site
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.units import format_duration


def summary(
    plan: Plan,
    folder: str,
    changed: int,
    checkpoint_option: str,
    decisions: Sequence[Decision] = (),
    report: str = "report.md",
) -> str:
    """What to deploy, what it costs and reaches, what binds and mattered, where the files are, what next."""
    lines = [f"{plan.spec.name}: {plan.workload.model.name}"]
    for choice, site in zip(plan.fleet.choices, plan.placement.sites, strict=True):
        lines += _choice_lines(choice, site)
    lines += [f"  simulated   SLO kept for {attained(found)}" for found in plan.attainment.classes]
    lines += [f"  cost        {line}" for line in _cost_lines(plan)]
    if any(site.market == "spot" for site in plan.placement.sites):
        lines.append(f"  placement   {plan.placement.statement}")
    lines += [f"  next best   {line}" for line in _alternative_lines(plan)]
    lines += [f"  decided     {decision_text(decision)}" for decision in decisions]
    lines += [f"  changes     {flip_line(flip)}" for flip in plan.fleet.sensitivity.flips[:1]]
    written = f"{changed} file{'s' * (changed > 1)} changed" if changed else "nothing changed"
    lines.append(f"  files       {folder} ({written}); read {folder}/{report}")
    for replica in plan.replicas:
        lines += [f"  next        {line}" for line in _next_lines(plan, replica, folder, checkpoint_option)]
    return "\n".join(lines)


def _choice_lines(choice: Choice, site: Site) -> list[str]:
    column, policy = choice.column, choice.column.policy
    count = site.replicas + site.spot_overprovision
    price = "" if column.market == "owned" else f", {count * column.usd_per_hour:.2f} USD/h"
    spare = f", {site.spot_overprovision} of them to spare" if site.spot_overprovision else ""
    engine = "offloaded under runtime_min" if policy.engine == "runtime_min" else "under vLLM"
    if policy.engine == "runtime_min" and not policy.gpus:
        engine = "from disk" if policy.weights_on == "disk" else "in memory"
    machine = f"{policy.machine.name} ({column.market}{price})"
    dtype = f"{policy.dtype}, experts in {packing_of(policy)}" if packing_of(policy) else policy.dtype
    predicted = [f"              {NEVER_RUN}"] if policy.rehearsed_only else []
    lines = [
        f"  deploy      {count} × {machine}{spare}, {engine}",
        *predicted,
        f"  in flight   {policy.sequences} sequences, micro-batches of {policy.micro_batch}, {dtype}",
        f"  reaches     {interval(policy.generated_tokens_per_s, '', ' tokens/s generated')} per replica"
        f" [{kind_of(policy, policy.generated_tokens_per_s)}]",
    ]
    if policy.serves == "online":
        lines.append(f"  latency     {latency(policy)} when full")
    return [*lines, f"  bottleneck  {policy.bottleneck}"]


def _cost_lines(plan: Plan) -> list[str]:
    if plan.fleet.usd_per_hour == 0:
        return ["none: the machine is yours"]
    lines = [*cost_lines(plan), *minimised_lines(plan.fleet)]
    for choice in plan.fleet.choices:
        if choice.column.policy.serves == "batch":
            hours = format_duration(choice.hours * 3600)
            lines.append(
                f"{choice.usd:.2f} USD in all for the batch work, {hours} on each of {choice.replicas}"
            )
    return lines + [
        f"{interval(price, '$', '')} per million generated tokens ({name}), {bill}"
        for name, price, bill in token_prices(plan)
    ]


def _alternative_lines(plan: Plan) -> list[str]:
    return [
        f"{other.replicas} × {other.column}: {other.cost_usd:.2f} {other.note}"
        for other in plan.fleet.alternatives[:3]
    ]


def _next_lines(plan: Plan, replica: Replica, folder: str, checkpoint_option: str) -> Iterator[str]:
    """The command that runs a replica, and before it what makes its checkpoint here."""
    policy = replica.policy
    line = _next_line(plan, replica, folder, packed_path(checkpoint_option, policy))
    if packing_of(policy) and line.startswith("moeplan run"):
        here = checkpoint_option.removeprefix(" --checkpoint ")
        yield quantize_command(here or str(Path(folder).parent / plan.spec.model.path), policy)
    yield line


def _next_line(plan: Plan, replica: Replica, folder: str, checkpoint_option: str) -> str:
    policy = replica.policy
    if policy.engine == "vllm" and plan.fleet.usd_per_hour == 0:
        return f"start vLLM with the figures in {folder}/report.md"
    if policy.engine == "vllm" and policy.serves == "online":
        return f"sky serve up {folder}/skypilot/{replica.name}.yaml --env MODEL=..."
    if unrun := why_unrun(plan, policy):
        return f"{unrun}: the figures are predictions"
    if plan.fleet.usd_per_hour > 0 and policy.serves == "batch":
        count = next(c.replicas for c in plan.fleet.choices if c.column.name == replica.name)
        times = f", SHARD from 0 to {count - 1}" if count > 1 else ""
        file = f"{folder}/skypilot/{replica.name}.yaml"
        options = "--env BUCKET=... --env MODEL=... --env SHARD=0"
        return f"sky jobs launch {file} {options}  (read its first lines{times})"
    warning = f"  ({caution(policy)})" if caution(policy) else ""
    return f"moeplan run {folder}{checkpoint_option} --input REQUESTS.jsonl --output ANSWERS.jsonl{warning}"
