"""Plan -> the decisions that mattered most: each undone by itself, and what that would have come to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moeplan.planner.diagnostics import InfeasibleError
from moeplan.planner.explain.batches import batch_points
from moeplan.planner.explain.case import Case, Held, decide
from moeplan.planner.explain.outcomes import outcome_of
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.analysis import Decision
from moeplan.planner.ir.model import Model
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.policy import NO_PAGES, ExpertShares, Policy
from moeplan.planner.ir.spec import MarketSpec, Purchase
from moeplan.planner.ir.workload import Bucket, RequestClass, Workload
from moeplan.planner.strategies.figures import figures_at, fits_at
from moeplan.planner.strategies.offload_search import Sharing, can_share

_MOST = 3
_MATTERS = 1.005  # times worse, at least


def decisions(plan: Plan, inputs: Inputs, held: Held = ()) -> tuple[Decision, ...]:
    """The three whose alternatives are worst, the worst first; fewer where fewer matter.

    `held` is what holds the model in GPU memory, where that is known (`case.holding`).
    """
    found = [*_of_the_market(plan, inputs, held)]
    for replica in plan.replicas:
        found += _of_a_replica(plan.workload, replica)
    found.sort(key=lambda decision: -decision.times_worse)
    return tuple(decision for decision in found[:_MOST] if decision.times_worse >= _MATTERS)


# On the market: another GPU, the other way to buy


def _of_the_market(plan: Plan, inputs: Inputs, held: Held) -> Iterator[Decision]:
    if not plan.fleet.usd_per_hour:
        return
    market, catalog = plan.spec.market, inputs.catalog
    used = sorted({choice.column.policy.machine.gpu for choice in plan.fleet.choices})
    offered = {catalog.machines[offer.machine].gpu for offer in catalog.offers} - {""}
    others = tuple(sorted((set(market.gpus) or offered) - set(used)))
    if others and not market.machines:
        yield from _bought(plan, inputs, held, " and ".join(used), "other GPUs", replace(market, gpus=others))
    kinds = {choice.column.market for choice in plan.fleet.choices}
    if market.purchase == "any" and len(kinds) == 1:
        (kind,) = kinds
        other: Purchase = "on-demand" if kind == "spot" else "spot"
        yield from _bought(plan, inputs, held, kind, f"{other} only", replace(market, purchase=other))


def _bought(
    plan: Plan, inputs: Inputs, held: Held, chosen: str, alternative: str, market: MarketSpec
) -> Iterator[Decision]:
    """The fleet of another market: what the work costs there."""
    answer = decide(Case(spec=replace(plan.spec, market=market), inputs=inputs), held)
    if isinstance(answer, InfeasibleError):
        return
    outcome, before = outcome_of(answer), outcome_of(plan.fleet)
    in_all = before.usd > 0.0
    yield Decision(
        chosen=chosen,
        alternative=f"{alternative} ({outcome.fleet})",
        unit="USD" if in_all else "USD/h",
        value=before.usd if in_all else before.usd_per_hour,
        other=outcome.usd if in_all else outcome.usd_per_hour,
    )


# On a machine: the batch, the schedule, where attention and experts are


def _of_a_replica(workload: Workload, replica: Replica) -> Iterator[Decision]:
    policy = replica.policy
    if policy.sequences > 1:
        half, whole = batch_points(workload, replica, (policy.sequences // 2, policy.sequences))
        yield Decision(
            chosen=f"{whole.batch} in flight",
            alternative=f"{half.batch}",
            unit="tokens/s",
            value=whole.tokens_per_s,
            other=half.tokens_per_s,
        )
    for chosen, alternative, other in (
        *_placements(policy),
        *_sharings(workload.as_one_expert().model, policy),
    ):
        if fits_at(workload, replica.roofline, other, *_mean(workload, other), policy.sequences):
            value, rate = (_tokens_per_s(workload, replica, p) for p in (policy, other))
            yield Decision(chosen=chosen, alternative=alternative, unit="tokens/s", value=value, other=rate)
    yield from _dtypes(policy)
    if replica.pipeline and replica.pipeline.others:
        fastest = min(replica.pipeline.others, key=lambda other: other.pass_s)
        yield Decision(
            chosen=replica.pipeline.schedule.name,
            alternative=fastest.name,
            unit="s per decode pass",
            value=replica.pipeline.pass_s,
            other=fastest.pass_s,
        )


def _dtypes(policy: Policy) -> Iterator[Decision]:
    """Experts as the checkpoint stores them, the cache in the dtype of the arithmetic, where they are not but
    could be."""
    of_weights = "experts", policy.weights_dtype, "as the checkpoint stores them", policy.weights_options
    of_cache = "KV cache", policy.kv_dtype, f"in {policy.dtype}", policy.kv_options
    for what, dtype, alternative, options in (of_weights, of_cache):
        chosen = next((option for option in options if option.dtype == dtype), None)
        if not chosen or chosen is options[0] or not options[0].generated_tokens_per_s:
            continue
        worse = ", ".join(f"{quality.change:+.2%} on {quality.model}" for quality in chosen.quality)
        yield Decision(
            chosen=f"{what} in {dtype}" + (f" (perplexity {worse})" if worse else ""),
            alternative=alternative,
            unit="tokens/s",
            value=chosen.generated_tokens_per_s,
            other=options[0].generated_tokens_per_s,
        )


def _placements(policy: Policy) -> Iterator[tuple[str, str, Policy]]:
    """(chosen, alternative, the policy with it) where the GPU shares the work with its host."""
    if policy.engine != "runtime_min" or not policy.gpus:
        return
    if policy.attention_gpu_share == 0.0:
        up = replace(policy, attention_gpu_share=1.0, kv_gpu_share=0.0)
        yield "attention on the CPU", "on the GPU, its cache copied up", up
    else:
        down = replace(policy, attention_gpu_share=0.0, kv_gpu_share=0.0)
        yield "attention on the GPU", "on the CPU", down
    if policy.pages != NO_PAGES and policy.weights_on == "dram":
        cpu = replace(policy, experts_cpu_share=1.0 - policy.resident_share, pages=NO_PAGES)
        yield "experts streamed to the GPU", "computed by the CPU", cpu


def _sharings(model: Model, policy: Policy) -> Iterator[tuple[str, str, Policy]]:
    """The same of how several GPUs share experts."""
    forms: dict[ExpertShares, str] = {"width": "a part of every expert", "whole": "whole experts"}
    other: ExpertShares = "width" if policy.expert_shares == "whole" else "whole"
    ours = policy.engine == "runtime_min" and policy.gpus > 1
    if ours and can_share(model, Sharing(policy.gpus, other == "whole")):
        chosen, alternative = (f"{forms[form]} on each GPU" for form in (policy.expert_shares, other))
        yield chosen, alternative, replace(policy, expert_shares=other)


def _tokens_per_s(workload: Workload, replica: Replica, policy: Policy) -> float:
    """What the replica generates when it is run as `policy` says."""
    requests, bucket = _mean(workload, policy)
    figures = figures_at(workload, replica.roofline, policy, requests, bucket, policy.sequences)
    return figures.requests_per_s * requests.mean_output_tokens() * policy.data_parallel


def _mean(workload: Workload, policy: Policy) -> tuple[RequestClass, Bucket]:
    requests = workload.request_class(policy.serves)
    return requests, requests.mean_bucket()
