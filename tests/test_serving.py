"""The cost of serving from GPU memory: sharing out, fixed costs, and the law of distinct experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import batch_spec
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner import costs, serving
from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.roofline import Roof
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.roofline import level_roof
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.serving import Sharding
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.in_memory import VLLM

FREE = replace(VLLM, layer_s=0.0, moe_layer_s=0.0, all_reduce_s=0.0, peer_efficiency=1e9)

# Expert FFN of Qwen3-30B-A3B on an RTX PRO 6000, 16 tokens: microseconds by activated experts
# (casys-kaist/LLMServingSim@5daddb2, MIT licence).
ACTIVATED_US = {8: 57.1, 16: 131.1, 32: 229.7, 64: 424.1, 128: 817.6}


def workload_of(model: str) -> Workload:
    spec = parse_spec(batch_spec(model=model), "spec.yaml")
    return build_workload(spec, load_inputs(spec))


def h100(catalog: Catalog) -> Roof:
    return level_roof(next(m for m in catalog.machines.values() if m.gpu == "H100").level("gpu"), "bf16")


def total(parts: dict[str, costs.Quantity]) -> float:
    return float(sum(np.asarray(seconds) for seconds in parts.values()))


def test_time_follows_activated_experts() -> None:
    """Measured: 16 times the experts take 14 times as long. A charge for k experts would stay level."""
    workload = workload_of("qwen3-30b-a3b")
    operator = workload.operator("routed_experts")
    slope = (ACTIVATED_US[128] - ACTIVATED_US[16]) / 112  # per expert
    few, many = 4.0, 64.0  # tokens
    touched = [128 * float(np.asarray(costs.touched_expert_share(workload.model, n))) for n in (few, many)]
    read = [float(np.asarray(costs.weight_bytes(workload, operator, n))) for n in (few, many)]
    seconds_per_expert_byte = slope * 1e-6 / (3 * 2048 * 768 * 2)
    predicted_us = (read[1] - read[0]) / 48 * seconds_per_expert_byte * 1e6  # one of 48 layers
    interpolated = np.interp(touched, list(ACTIVATED_US), list(ACTIVATED_US.values()))
    assert predicted_us == pytest.approx(interpolated[1] - interpolated[0], rel=0.05)


@pytest.mark.parametrize("model", ["mixtral-8x7b", "deepseek-v3", "gpt-oss-120b", "llama-3.1-70b"])
def test_shared_out_work_is_all_the_work(catalog: Catalog, model: str) -> None:
    """Without fixed costs t GPUs take 1/t of the time of one, but each reads all of an MLA cache."""
    workload, roof = workload_of(model), h100(catalog)
    one, four = (
        serving.step_parts(workload, roof, 4.5e11, Sharding(tensor=t), FREE, 16.0, 1000.0) for t in (1, 4)
    )
    for name in ("experts", "other matrices"):
        assert 4 * np.asarray(four[name]) == pytest.approx(np.asarray(one[name]))
    latent = workload.model.attention.kind == "mla"
    assert (4 * np.asarray(four["attention"]) > 1.5 * np.asarray(one["attention"])) == latent


def test_groups_share_the_experts(catalog: Catalog) -> None:
    """Four groups of one GPU read a quarter of the experts each, hit by all four groups' tokens."""
    workload, roof = workload_of("qwen3-30b-a3b"), h100(catalog)
    grouped = serving.step_parts(workload, roof, 4.5e11, Sharding(tensor=1, groups=4), FREE, 8.0, 500.0)
    whole = serving.step_parts(workload, roof, 4.5e11, Sharding(tensor=1), FREE, 32.0, 500.0)
    assert 4 * np.asarray(grouped["experts"]) == pytest.approx(np.asarray(whole["experts"]))


@given(
    batch=st.floats(1, 256),
    more=st.floats(1, 4),
    context=st.floats(16, 16384),
    tensor=st.sampled_from([1, 2, 8]),
)
def test_more_never_takes_less(batch: float, more: float, context: float, tensor: int) -> None:
    """A step grows with its batch and with the context."""
    from moeplan.planner.catalog import load_catalog
    from moeplan.planner.diagnostics import Span

    workload, roof = workload_of("mixtral-8x7b"), h100(load_catalog(None, Span("")))

    def step(b: float, c: float) -> float:
        return total(serving.step_parts(workload, roof, 4.5e11, Sharding(tensor=tensor), VLLM, b, c))

    assert step(batch, context) <= step(batch * more, context) * (1 + 1e-9)
    assert step(batch, context) <= step(batch, context * more) * (1 + 1e-9)


def test_weights_as_vllm_reports_them() -> None:
    """GiB of weights on one H100: llm-d-planner's documentation, vLLM's own figures."""
    for model, reported_gib in (("gpt-oss-20b", 13.47), ("llama-3.1-8b", 14.99)):
        assert serving.weight_bytes(workload_of(model), 1) / 2**30 == pytest.approx(reported_gib, rel=0.02)


def test_eight_bit_weights_compute_at_the_eight_bit_rate(catalog: Catalog) -> None:
    """DeepSeek-V3 is stored in fp8, whose rate on an H100 is twice that of bf16; its cache is not."""
    workload, roof = workload_of("deepseek-v3"), h100(catalog)
    rates = {op.name: costs.operator_flops_per_s(op, roof) for op in workload.operators}
    assert rates["routed_experts"] == pytest.approx(2 * roof.flops_per_s)
    assert rates["attention_core"] < roof.flops_per_s
