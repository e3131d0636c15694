"""Serving laws: engines that run by them reach what the policy's own cost law predicts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import ONLINE

from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Bucket, RequestClass, Workload
from moeplan.planner.law_grids import batch_grid, tokens_grid
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.profile import apply_profile
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.profile_file import ProfileRow
from moeplan.planner.simulate.serving import Served, serve
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.in_memory import in_memory_law
from moeplan.planner.strategies.laws import serving_law, slowed

Found = tuple[Workload, Roofline, Policy]


def found(catalog: Catalog, machine: str, bucket: Bucket, engine: str = "vllm") -> Found:
    """A policy for requests of one size."""
    spec = parse_spec(ONLINE.replace("2s", "60s").replace("100ms", "30s"), "spec.yaml")
    workload = build_workload(spec, load_inputs(spec))
    requests: RequestClass = replace(
        workload.classes[0],
        buckets=(bucket,),
        prompt_tokens_max=round(bucket.prompt_tokens),
        output_tokens_max=round(bucket.output_tokens),
    )
    workload = replace(workload, classes=(requests,))
    roofline = find_roofline(workload, catalog.machines[machine])
    policies, _ = find_policies(workload, roofline, None)
    return workload, roofline, next(policy for policy in policies if policy.engine == engine)


def flooded(policy: Policy, bucket: Bucket, law_of: Found, count: int = 3000) -> Served:
    """Requests of one size, one by one a little faster than a full engine takes them."""
    workload, roofline, _ = law_of
    rate = policy.rates[0].requests_per_s.value / policy.data_parallel
    arrival = np.arange(count) / (1.05 * rate)
    prompt, output = (np.full(count, round(n)) for n in (bucket.prompt_tokens, bucket.output_tokens))
    return serve(arrival, prompt, output, serving_law(workload, roofline, policy), 1)


@pytest.mark.parametrize(
    ("machine", "prompt", "output"),
    [("a3-highgpu-2g", 512, 128), ("a3-highgpu-2g", 2048, 512), ("a2-ultragpu-1g", 1000, 300)],
)
def test_a_full_engine_serves_what_the_policy_predicts(
    catalog: Catalog, machine: str, prompt: int, output: int
) -> None:
    """Requests/s and ITL of the closed form, within 5 %."""
    bucket = Bucket(prompt_tokens=prompt, output_tokens=output, share=1.0)
    case = found(catalog, machine, bucket)
    policy = case[2]
    served = flooded(policy, bucket, case)
    late = slice(1500, 2500)
    finish = np.sort(served.finish_s)[late]
    rate = policy.data_parallel * (len(finish) - 1) / (finish[-1] - finish[0])
    assert rate == pytest.approx(policy.rates[0].requests_per_s.value, rel=0.05)
    assert served.itl_s[late].mean() == pytest.approx(policy.rates[0].itl_s, rel=0.05)


def test_a_lone_request_waits_as_the_law_of_ttft_says(catalog: Catalog) -> None:
    """With nobody else: the closed form less the half step that it waits on average, within 10 %."""
    bucket = Bucket(prompt_tokens=2000, output_tokens=200, share=1.0)
    workload, roofline, policy = found(catalog, "a3-highgpu-1g", bucket)
    law = serving_law(workload, roofline, policy)
    served = serve(np.zeros(1), np.array([2000]), np.array([200]), law, 1)
    from moeplan.planner.strategies.figures import figures_at

    alone = figures_at(workload, roofline, policy, workload.classes[0], bucket, 1)
    assert served.ttft_s[0] == pytest.approx(alone.ttft_s - 0.5 * alone.itl_s, rel=0.10)
    assert served.itl_s[0] == pytest.approx(1 / alone.decode_tokens_per_s, rel=0.02)


def test_tables_are_near_the_law_between_their_points(catalog: Catalog) -> None:
    """Seconds of a step at batches and contexts off the grid: within 3 % of the law itself."""
    bucket = Bucket(prompt_tokens=6000, output_tokens=400, share=1.0)
    workload, roofline, policy = found(catalog, "a3-highgpu-2g", bucket)
    law = serving_law(workload, roofline, policy)
    assert policy.sequences > 41
    for batch, context in ((7, 700), (20, 1500), (41, 3000), (policy.sequences, 5000)):
        small = _resized(workload, context)
        exact = in_memory_law(small, small.classes[0], roofline, replace(policy, sequences=batch))
        rows = [np.interp(batch, law.batch, column) for column in np.array(law.step_s).T]
        between = np.interp(context, law.context_tokens, rows)
        assert between == pytest.approx(exact.step_s[-1][-1], rel=0.03)


def _resized(workload: Workload, context: int) -> Workload:
    """With requests of at most so many tokens, so that the law's last point is exact there."""
    requests = replace(workload.classes[0], prompt_tokens_max=context - 1, output_tokens_max=1)
    return replace(workload, classes=(requests,))


def test_measured_rates_slow_the_law(catalog: Catalog) -> None:
    """A profile that has requests/s at half of the prediction doubles all times."""
    bucket = Bucket(prompt_tokens=512, output_tokens=128, share=1.0)
    workload, roofline, policy = found(catalog, "a3-highgpu-1g", bucket)
    rate = policy.rates[0]
    row = ProfileRow(
        machine=policy.machine.name,
        model=workload.model.name,
        engine="vllm",
        gpus=policy.gpus,
        prompt_tokens=512,
        output_tokens=128,
        batch=rate.batch,
        figures={"requests_per_s": rate.requests_per_s.value / policy.data_parallel / 2},
    )
    (measured,) = apply_profile(workload, [roofline], [policy], [row]).policies
    plain, halved = (serving_law(workload, roofline, p) for p in (policy, measured))
    factor = rate.requests_per_s.value / measured.rates[0].requests_per_s.value
    assert factor == pytest.approx(2.0, rel=0.01)
    assert halved.step_s[0][0] == pytest.approx(factor * plain.step_s[0][0])
    assert halved.prefill_s[-1] == pytest.approx(factor * plain.prefill_s[-1])


def test_an_offloaded_engine_takes_a_pass_a_token(catalog: Catalog) -> None:
    bucket = Bucket(prompt_tokens=512, output_tokens=128, share=1.0)
    case = found(catalog, "a3-highgpu-1g", bucket, "runtime_min")
    policy = case[2]
    served = flooded(policy, bucket, case, 2000)
    assert served.itl_s == pytest.approx(np.full(2000, policy.rates[0].itl_s))
    assert served.ttft_s[0] == pytest.approx(1.5 * policy.rates[0].itl_s)  # no pass was under way
    law = serving_law(*case)
    assert slowed(law, 2.0).step_s[0][0] == 2.0 * law.step_s[0][0]


def test_grids() -> None:
    assert batch_grid(1) == (1,)
    assert batch_grid(10) == (1, 2, 3, 4, 6, 8, 10)
    assert tokens_grid(100) == (0.0, 64.0, 100.0)
    assert tokens_grid(64) == (0.0, 64.0)
