"""A policy's serving law: how an engine that runs as the policy says fills its steps, and what they take."""

from __future__ import annotations

from dataclasses import replace

from moeplan.planner.ir.attainment import ServingLaw
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Bucket, RequestClass, Workload
from moeplan.planner.strategies.figures import figures_at
from moeplan.planner.strategies.in_memory import in_memory_law


def serving_law(workload: Workload, roofline: Roofline, policy: Policy) -> ServingLaw:
    """Return the law of one copy of the model. Where the user's measurements changed the policy's rates, all
    its times are longer or shorter by what they did to the seconds of the class's mix of requests."""
    requests = workload.request_class(policy.serves)
    if policy.engine != "vllm":
        return _passes(requests, policy)
    law = in_memory_law(workload, requests, roofline, policy)
    if not policy.corrections:
        return law
    return slowed(law, _correction(workload, roofline, policy, requests))


def slowed(law: ServingLaw, factor: float) -> ServingLaw:
    """The same engine with all its times `factor` as long."""
    return replace(
        law,
        step_s=tuple(tuple(factor * s for s in row) for row in law.step_s),
        prefill_s=tuple(factor * s for s in law.prefill_s),
        first_token_s=tuple(factor * s for s in law.first_token_s),
    )


def _correction(workload: Workload, roofline: Roofline, policy: Policy, requests: RequestClass) -> float:
    """Seconds of the mix of requests, corrected over predicted."""
    corrected = predicted = 0.0
    for rate in policy.rates:
        bucket: Bucket = requests.buckets[rate.bucket]
        alone = figures_at(workload, roofline, policy, requests, bucket, rate.batch)
        corrected += bucket.share * policy.data_parallel / rate.requests_per_s.value
        predicted += bucket.share / alone.requests_per_s
    return corrected / predicted


def _passes(requests: RequestClass, policy: Policy) -> ServingLaw:
    """Offloaded engines: every pass takes as long as one that is full, since what streams is the weights, and
    the prompts that enter are in it; memory was made for all sequences."""
    seconds = sum(requests.buckets[rate.bucket].share * rate.itl_s for rate in policy.rates)
    most = float(requests.context_tokens_max)
    return ServingLaw(
        sequences=policy.sequences,
        step_tokens=policy.sequences * (requests.context_tokens_max + 1),
        memory_bytes=1.0,
        batch=(1, max(2, policy.sequences)),
        context_tokens=(0.0, most),
        step_s=((seconds, seconds), (seconds, seconds)),
        cache_bytes=(0.0, 0.0),
        prompt_tokens=(0.0, most),
        prefill_s=(0.0, 0.0),
        first_token_s=(0.0, 0.0),
        first_token_steps=2.0 - 1.5,
    )
