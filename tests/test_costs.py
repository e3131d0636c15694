"""The arithmetic of operators: distinct experts, conservation of FLOPs and bytes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from conftest import ONLINE, batch_spec

from moeplan.planner import costs
from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec

# Distinct experts of 8 (top-2) that n tokens hit, counted on Mixtral-8x7B's real routing of 35 MT-Bench
# queries: 7,305 decode tokens in 32 layers.
OBSERVED = {1: 2.00, 2: 3.49, 4: 5.45, 8: 7.14, 16: 7.90, 32: 8.00}

MODELS = ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v2-lite", "gpt-oss-20b", "llama-3.1-8b", "llama-4-scout"]


def workload_of(model: str) -> Workload:
    spec = parse_spec(batch_spec(model=model), "spec.yaml")
    return build_workload(spec, load_inputs(spec))


def test_distinct_experts_on_real_routing(catalog: Catalog) -> None:
    model = catalog.models["mixtral-8x7b"]
    for tokens, seen in OBSERVED.items():
        assert 8 * float(costs.touched_expert_share(model, tokens)) == pytest.approx(seen, rel=0.01)


def test_distinct_experts_by_counting(catalog: Catalog) -> None:
    """The law against a draw of top-8 of 128 experts."""
    model, draw = catalog.models["qwen3-30b-a3b"], random.Random(0)
    for tokens in (1, 3, 20):
        counts = [len({e for _ in range(tokens) for e in draw.sample(range(128), 8)}) for _ in range(300)]
        law = 128 * float(costs.touched_expert_share(model, tokens))
        assert np.mean(counts) == pytest.approx(law, rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_decode_flops_are_twice_the_active_parameters(name: str) -> None:
    """With an empty context one token costs two FLOPs per active weight, embedding and norms excepted."""
    workload = workload_of(name)
    model, p = workload.model, workload.model.parameters
    used = model.active_parameters() - p.norms - (p.embedding if p.lm_head else 0)
    total = sum(float(np.asarray(costs.flops(op, 1.0, 0.0))) for op in workload.operators)
    assert total == pytest.approx(2 * used, rel=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_many_tokens_read_every_weight_once(name: str) -> None:
    workload = workload_of(name)
    p = workload.model.parameters
    read = sum(float(np.asarray(costs.weight_bytes(workload, op, 1e6))) for op in workload.operators)
    norms = p.norms + (p.embedding if p.lm_head else 0)
    rest = norms * workload.model.stored_bytes_per_other_parameter
    assert read == pytest.approx(workload.model.weight_bytes() - rest, rel=1e-6)


def test_windowed_layers_hold_only_their_window() -> None:
    """Half of gpt-oss's layers look back 128 tokens: a longer context adds cache in the other half only."""
    workload = workload_of("gpt-oss-20b")
    short, long = (float(np.asarray(costs.kv_bytes_held(workload, 1.0, c))) for c in (128, 256))
    assert long == pytest.approx(1.5 * short)


def test_latent_attention_caches_576_values() -> None:
    """DeepSeek-V2-Lite: 512 latent and 64 rope values a token and layer, 27 layers, two bytes each."""
    workload = workload_of("deepseek-v2-lite")
    assert float(np.asarray(costs.kv_bytes_held(workload, 1.0, 1.0))) == 27 * 576 * 2


def test_knee_lies_between_max_and_sum() -> None:
    assert max(1.0, 1.0) < costs.knee(1.0, 1.0) < 2.0
    assert costs.knee(1.0, 1e-9) == pytest.approx(1.0)


def test_online_sizes_become_buckets() -> None:
    spec = parse_spec(ONLINE, "spec.yaml")
    (requests,) = build_workload(spec, load_inputs(spec)).classes
    assert [bucket.share for bucket in requests.buckets] == [0.7, 0.3]
    assert requests.mean_prompt_tokens() == pytest.approx(0.7 * 512 + 0.3 * 2048)
    assert requests.context_tokens_max == 2304
