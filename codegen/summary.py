"""Plan -> the screen that `moeplan compile` ends with."""

from __future__ import annotations

from moeplan.codegen.emit.report import interval
from moeplan.planner.ir.fleet import Choice
from moeplan.planner.ir.plan import Plan, Replica


def summary(plan: Plan, folder: str, changed: int) -> str:
    """What to deploy, what it costs and reaches, what binds, where the files are, what to do next."""
    lines = [f"{plan.spec.name}: {plan.workload.model.name}"]
    for choice in plan.fleet.choices:
        lines += _choice_lines(choice)
    lines += [f"  cost        {line}" for line in _cost_lines(plan)]
    if any(site.market == "spot" for site in plan.placement.sites):
        lines.append(f"  placement   {plan.placement.statement}")
    lines += [f"  next best   {line}" for line in _alternative_lines(plan)]
    written = f"{changed} files changed" if changed else "nothing changed"
    lines.append(f"  files       {folder} ({written}); read {folder}/report.md")
    lines += [f"  next        {_next_line(replica, folder)}" for replica in plan.replicas]
    return "\n".join(lines)


def _choice_lines(choice: Choice) -> list[str]:
    column, policy = choice.column, choice.column.policy
    price = "" if column.market == "owned" else f", {choice.replicas * column.usd_per_hour:.2f} USD/h"
    engine = "offloaded under runtime_min" if policy.engine == "runtime_min" else "under vLLM"
    if policy.engine == "runtime_min" and not policy.gpus:
        engine = "from disk" if policy.weights_on == "disk" else "in memory"
    return [
        f"  deploy      {choice.replicas} × {column.policy.machine.name} ({column.market}{price}), {engine}",
        f"  batch       {policy.sequences} sequences, micro-batches of {policy.micro_batch}, {policy.dtype}",
        f"  reaches     {interval(policy.generated_tokens_per_s, '', ' tokens/s generated')} per replica"
        f" [{policy.generated_tokens_per_s.provenance}]",
        f"  bottleneck  {policy.bottleneck}",
    ]


def _cost_lines(plan: Plan) -> list[str]:
    if plan.fleet.usd_per_hour == 0:
        return ["none: the catalog has no offer for this machine, taken as yours"]
    prices = [
        f"{interval(price, '$', '')} per million generated tokens ({name})"
        for name, price in plan.fleet.usd_per_million_tokens
    ]
    return [f"{plan.fleet.usd_per_hour:.2f} USD/h while everything runs", *prices]


def _alternative_lines(plan: Plan) -> list[str]:
    return [
        f"{other.replicas} × {other.column}: {other.cost_usd:.2f} USD ({other.note})"
        for other in plan.fleet.alternatives[:3]
    ]


def _next_line(replica: Replica, folder: str) -> str:
    policy = replica.policy
    if policy.engine == "vllm":
        command = "serve up" if policy.serves == "online" else "jobs launch"
        return f"sky {command} {folder}/skypilot/{replica.name}.yaml --env MODEL=..."
    if policy.gpus:
        return "this version of runtime_min does not execute GPU plans: the figures are predictions"
    return f"moeplan run {folder} --input REQUESTS.jsonl --output ANSWERS.jsonl"
