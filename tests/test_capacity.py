"""The capacity bound: MoE-Lens's formula by hand, and no policy's prediction above it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from conftest import batch_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.codegen.emit import emit_all
from moeplan.planner.capacity import capacity_bound
from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import MemoryLimit, Policy
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.offload import offload_policy_at

HOSTS = ("g4dn.8xlarge", "g4dn.16xlarge", "gr6.8xlarge", "g5.16xlarge", "cpu-2core")
MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "olmoe-1b-7b", "deepseek-v2-lite")


def workload_of(model: str, prompt: int, output: int, requests: int) -> Workload:
    text = batch_spec(model=model).replace("2000", str(requests))
    text = text.replace("prompt: 77, output: 128", f"prompt: {prompt}, output: {output}")
    spec = parse_spec(text, "spec.yaml")
    return build_workload(spec, load_inputs(spec))


@settings(max_examples=60)
@given(
    host=st.sampled_from(HOSTS),
    model=st.sampled_from(MODELS),
    prompt=st.integers(1, 2000),
    output=st.integers(1, 1000),
    requests=st.sampled_from([1, 3, 100, 5000, 100_000]),
    gib=st.sampled_from([None, 6, 12, 24, 110]),
)
def test_no_prediction_exceeds_the_bound(
    catalog: Catalog, host: str, model: str, prompt: int, output: int, requests: int, gib: int | None
) -> None:
    machine = catalog.machines[host]
    limit = gib * 2**30 if gib and gib * 2**30 < machine.level("dram").bytes else None
    workload = workload_of(model, prompt, output, requests)
    roofline = find_roofline(workload, machine)
    policies, _ = find_policies(workload, roofline, limit)
    for policy in policies:
        bound = capacity_bound(workload, roofline, policy) if policy.engine == "runtime_min" else None
        if bound:
            assert policy.generated_tokens_per_s.value <= bound.generated_tokens_per_s * (1 + 1e-9)


def offloaded(catalog: Catalog, prompt: int, output: int) -> tuple[Workload, Policy]:
    """Attention and cache on the host, all experts through the GPU, in 80 % of 128 GiB."""
    workload = workload_of("mixtral-8x7b", prompt, output, 5000)
    roofline = find_roofline(workload, catalog.machines["g4dn.8xlarge"])
    policy = offload_policy_at(workload, workload.classes[0], roofline, 64, 8)
    return workload, replace(policy, limits=within(policy, round(0.8 * 128 * 2**30)))


def within(policy: Policy, host_bytes: int) -> tuple[MemoryLimit, ...]:
    return tuple(replace(m, bytes=host_bytes) if m.level == "dram" else m for m in policy.limits)


@pytest.mark.parametrize(("prompt", "output"), [(77, 128), (512, 32), (100, 1)])
def test_the_papers_formula(catalog: Catalog, prompt: int, output: int) -> None:
    """min(PME·M/δ, T_GPU)·g/(p + g) with Mixtral's published sizes, one resident expert in eight or none."""
    workload, policy = offloaded(catalog, prompt, output)
    roofline = find_roofline(workload, policy.machine)
    bound = capacity_bound(workload, roofline, policy)
    assert bound is not None
    expert_bytes = 3 * 4096 * 14336 * 2 * 32  # of one expert in all layers
    streamed = expert_bytes * 8 * (1 - policy.resident_share)
    kv_bytes_per_token = 32 * 2 * 8 * 128 * 2
    cache_tokens = (0.8 * 128 * 2**30 - streamed) / kv_bytes_per_token
    pme = 2 * (prompt + output) / ((2 * prompt + output) * output)
    delta_s = streamed / roofline.roof("dram").up_bytes_per_s
    expected = pme * cache_tokens / delta_s * output / (prompt + output)
    assert bound.sequences / bound.pass_s == pytest.approx(expected, rel=1e-6)
    if bound.binds == "memory":
        assert bound.generated_tokens_per_s == pytest.approx(expected, rel=1e-6)
    else:
        assert bound.generated_tokens_per_s < expected


def test_memory_binds_long_contexts(catalog: Catalog) -> None:
    """With less host memory the bound falls, and at last memory is what binds."""
    workload, policy = offloaded(catalog, 77, 2000)
    roofline = find_roofline(workload, policy.machine)
    tight = within(policy, 100 * 2**30)
    wide, narrow = (capacity_bound(workload, roofline, p) for p in (policy, replace(policy, limits=tight)))
    assert wide is not None
    assert narrow is not None
    assert narrow.binds == "memory"
    assert narrow.generated_tokens_per_s < wide.generated_tokens_per_s


def test_weights_that_stay_have_none(catalog: Catalog) -> None:
    workload = workload_of("olmoe-1b-7b", 77, 128, 100)
    roofline = find_roofline(workload, catalog.machines["cpu-2core"])
    policies, _ = find_policies(workload, roofline, None)
    assert policies[0].weights_on == "dram"
    assert capacity_bound(workload, roofline, policies[0]) is None


def test_it_is_printed(compile_text: Callable[[str], Plan]) -> None:
    plan = compile_text(batch_spec("g4dn.16xlarge"))
    files = emit_all(plan)
    assert plan.replicas[0].bound is not None
    assert "No schedule exceeds" in files["report.md"]
    assert '"bound": {' in files["plan.json"]
