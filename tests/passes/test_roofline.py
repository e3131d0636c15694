"""The roofline pass against the figures that the HRM paper's plots are made of."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner.catalog import Catalog
from moeplan.planner.ir.roofline import Roof
from moeplan.planner.passes.roofline import expert_intensity, turning_point


def roof(level: str, flops_per_s: float, bytes_per_s: float, up_bytes_per_s: float = 0.0) -> Roof:
    return Roof(
        level=level,  # type: ignore[arg-type]
        bytes=1,
        bytes_per_s=bytes_per_s,
        expert_bytes_per_s=bytes_per_s,
        attention_bytes_per_s=bytes_per_s,
        flops_per_s=flops_per_s,
        flops_8bit_per_s=flops_per_s,
        flops_4bit_per_s=flops_per_s,
        prefill_flops_per_s=flops_per_s,
        offload_prefill_flops_per_s=flops_per_s,
        up_bytes_per_s=up_bytes_per_s,
        up_pageable_bytes_per_s=up_bytes_per_s,
    )


# MoE-Lightning's plotting constants: an L4 (sparse peak) and its host.
GPU = roof("gpu", 242e12, 300e9)
CPU = roof("dram", 1.3e12, 100e9, up_bytes_per_s=16e9)


def test_expert_intensity_of_mixtral(catalog: Catalog) -> None:
    """MoE-Lightning (arXiv 2411.11217), figures 4 and 5: 8.0, 31.95, 252.6 and 3373 FLOP/byte."""
    model = catalog.models["mixtral-8x7b"]
    published = {32: 8.0, 128: 31.95, 1024: 252.6, 16384: 3373.0}
    for tokens, intensity in published.items():
        assert expert_intensity(model, tokens, "fp16") == pytest.approx(intensity, rel=2e-3)


def test_turning_points_of_mixtral(catalog: Catalog) -> None:
    """The same figures: P1 = 81.25, P2 = 599 FLOP/byte at micro-batch 128, reached at N = 2,474."""
    point = turning_point(catalog.models["mixtral-8x7b"], GPU, CPU, "fp16", 128)
    assert point.p1_flops_per_byte == pytest.approx(81.25)
    assert point.p2_flops_per_byte == pytest.approx(599, rel=1e-3)
    assert point.tokens_at_p2 == pytest.approx(2474, rel=1e-3)


def test_balance_is_where_both_memories_are_the_roof(catalog: Catalog) -> None:
    """B_gpu · I(μ) = B_link · I(N) at N = N(P2): the search's balance point (Eq. 11)."""
    model = catalog.models["mixtral-8x7b"]
    point = turning_point(model, GPU, CPU, "fp16", 128)
    link = CPU.up_bytes_per_s * expert_intensity(model, point.tokens_at_p2, "fp16")
    assert link == pytest.approx(GPU.bytes_per_s * expert_intensity(model, 128, "fp16"), rel=1e-6)


@given(faster=st.floats(1.0, 100.0), micro_batch=st.integers(1, 4096))
def test_a_faster_link_never_raises_the_turning_points(faster: float, micro_batch: int) -> None:
    from moeplan.planner.catalog import load_catalog
    from moeplan.planner.diagnostics import Span

    model = load_catalog(None, Span("")).models["mixtral-8x7b"]
    slow = turning_point(model, GPU, CPU, "fp16", micro_batch)
    quick = turning_point(model, GPU, roof("dram", 1.3e12, 100e9, 16e9 * faster), "fp16", micro_batch)
    assert quick.p1_flops_per_byte <= slow.p1_flops_per_byte
    assert quick.p2_flops_per_byte <= slow.p2_flops_per_byte


def test_an_intensity_that_is_never_reached_needs_infinite_tokens(catalog: Catalog) -> None:
    """OLMoE's narrow experts stay below 16,384 FLOP/byte at any batch."""
    point = turning_point(
        catalog.models["olmoe-1b-7b"], roof("gpu", 1e15, 1e15), roof("dram", 1e12, 1e11, 5e10), "fp16", 4096
    )
    assert point.tokens_at_p2 == math.inf
