"""How uneven whole experts are: against routings that are drawn, and published order statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import batch_spec

from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.workload import ExpertPopularity, Workload
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.offload_lanes import Experts
from moeplan.planner.strategies.whole_experts import busiest_choices, busiest_hits, largest_of_normals


def workload_of(model: str, skew: float = 0.0) -> Workload:
    """With `skew`, an expert's popularity is a power of its rank."""
    spec = parse_spec(batch_spec(model=model), "spec.yaml")
    workload = build_workload(spec, load_inputs(spec))
    if not skew:
        return workload
    experts, top = workload.model.experts, workload.model.experts_per_token
    weights = (1.0 + np.arange(experts)) ** -skew
    layer = ExpertPopularity(layer=0, token_share=tuple(top * weights / weights.sum()))
    return replace(workload, popularity=(layer,))


def drawn(workload: Workload, gpus: int, tokens: int, rounds: int = 400) -> tuple[float, float]:
    """What `busiest_choices` and `busiest_hits` return, of calls drawn: the best k of E random keys a token
    (Gumbel's, so without replacement)."""
    random, model = np.random.default_rng(tokens), workload.model
    shares = np.ones(model.experts)
    if workload.popularity:
        shares = np.array(workload.popularity[0].token_share)
    owner = np.arange(model.experts) % (2 * gpus)
    owner = np.minimum(owner, 2 * gpus - 1 - owner)  # dealt forth and back
    most, even = np.zeros(2), np.zeros(2)
    for _ in range(rounds):
        keys = np.log(shares) + random.gumbel(size=(tokens, model.experts))
        chosen = np.argpartition(-keys, model.experts_per_token - 1)[:, : model.experts_per_token]
        calls = np.bincount(chosen.ravel(), minlength=model.experts)
        both = [np.bincount(owner, weights=what, minlength=gpus) for what in (calls, calls > 0)]
        most += [parts.max() for parts in both]
        even += [parts.mean() for parts in both]
    choices, hits = most / even
    return float(choices), float(hits)


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("model", ["mixtral-8x22b", "dbrx", "qwen3-30b-a3b"])
def test_alike_experts_are_as_uneven_as_when_drawn(model: str, gpus: int) -> None:
    workload = workload_of(model)
    for tokens in (1, 4, 16, 64, 512):
        called = Experts(workload).layers, gpus, np.array([float(tokens)])
        choices, hits = busiest_choices(*called), busiest_hits(*called)
        expected = drawn(workload, gpus, tokens)
        few = tokens < 64  # what falls to a GPU is not normal yet
        assert choices[0] == pytest.approx(expected[0], rel=0.08 if few else 0.02)
        assert hits[0] == pytest.approx(expected[1], rel=0.08 if few else 0.02)


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("model", ["mixtral-8x22b", "qwen3-30b-a3b"])
def test_popular_experts_make_one_gpu_busier(model: str, gpus: int) -> None:
    """The most popular of 8 experts sees twice the tokens of the least: above the truth, but not by much."""
    workload = workload_of(model, skew=0.4)
    for tokens in (1, 16, 512):
        called = Experts(workload).layers, gpus, np.array([float(tokens)])
        choices, hits = busiest_choices(*called), busiest_hits(*called)
        expected = drawn(workload, gpus, tokens)
        assert expected[0] * 0.98 <= choices[0] <= expected[0] * 1.12
        assert expected[1] * 0.98 <= hits[0] <= expected[1] * 1.12


def test_many_tokens_are_even_and_a_part_is_no_more_than_all() -> None:
    workload = workload_of("dbrx")
    tokens = np.array([1.0, 10.0, 100.0, 1e6])
    for busiest in (busiest_choices, busiest_hits):
        parts = busiest(Experts(workload).layers, 4, tokens)
        assert (np.diff(parts) < 1e-12).all()
        assert (parts >= 1.0 - 1e-12).all()
        assert (parts <= 4.0).all()
        assert parts[-1] < 1.001


@pytest.mark.parametrize(("count", "expected"), [(1, 0.0), (2, 0.56419), (3, 0.84628), (4, 1.02938)])
def test_the_largest_of_normals(count: int, expected: float) -> None:
    """1/sqrt(pi), 3/(2 sqrt(pi)) and the tabulated value of four (Teichroew 1956)."""
    assert largest_of_normals(count) == pytest.approx(expected, abs=1e-5)
