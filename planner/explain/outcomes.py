"""Fleet or refusal -> Outcome: a decision in one line, and the same decision as something to compare."""

from __future__ import annotations

from moeplan.planner.diagnostics import InfeasibleError
from moeplan.planner.ir.explanation import Outcome
from moeplan.planner.ir.fleet import Choice, Fleet
from moeplan.planner.ir.policy import Policy


def outcome_of(answer: Fleet | InfeasibleError) -> Outcome:
    """What `answer` comes to."""
    if isinstance(answer, InfeasibleError):
        return Outcome(
            fleet="", usd_per_hour=0.0, usd=0.0, hours=0.0, tokens_per_s=0.0, refusal=_reason(answer)
        )
    return Outcome(
        fleet=" + ".join(_choice(choice) for choice in answer.choices),
        usd_per_hour=answer.usd_per_hour,
        usd=sum(choice.usd for choice in answer.choices),
        hours=max(choice.hours for choice in answer.choices),
        tokens_per_s=sum(
            choice.replicas * choice.column.policy.generated_tokens_per_s.value for choice in answer.choices
        ),
    )


def _reason(error: InfeasibleError) -> str:
    """The first of its reasons, the nearest miss, without its place in the spec."""
    return error.diagnostics[0].message


def _choice(choice: Choice) -> str:
    column = choice.column
    machine = f"{choice.replicas} × {column.policy.machine.name}"
    return f"{machine}, {_shape(column.policy)}" if column.market == "owned" else f"{machine} {column.market}"


def decision(answer: Fleet | InfeasibleError) -> str:
    """What counts as the same decision: the machines and their number, and on an owned machine what lives and
    runs where and what binds; not the number of sequences, which follows every input a little."""
    if isinstance(answer, InfeasibleError):
        return ""
    return outcome_of(answer).fleet


def _shape(policy: Policy) -> str:
    """How a machine of one's own is used."""
    if policy.engine == "vllm":
        return f"vLLM on {policy.gpus} GPU{'s' * (policy.gpus > 1)} × {policy.data_parallel}"
    parts = [f"weights on {policy.weights_on}{' through a pinned ring' * policy.staged}"]
    if policy.gpus:
        parts.append(f"attention on the {_who(policy.attention_gpu_share)}")
        whole = "whole " if policy.expert_shares == "whole" else ""
        parts.append(f"{whole}experts on the {_who(1.0 - policy.experts_cpu_share)}")
    if policy.pages.places:
        parts.append("reading what routing hits")
    return f"{', '.join(parts)}, bound by {policy.bottleneck.lane} in {policy.bottleneck.phase}"


def _who(gpu_share: float) -> str:
    return "CPU" if gpu_share == 0.0 else "GPU" if gpu_share == 1.0 else "GPU and CPU"
