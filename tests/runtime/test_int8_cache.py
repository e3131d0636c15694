"""Keys and values in int8: in plans, in memory, and in what a model answers."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.limits import check_supported
from moeplan.runtime_min.paged import PagedBatch, PagedCache, whole_numbers
from moeplan.runtime_min.plan_file import PlanFileError, kv_bytes, load
from moeplan.runtime_min.stream import Engine

from .folders import GREEDY, Shape, make_plan, save_checkpoint, write_plan

SHAPE = Shape(hidden=64, heads=2, kv_heads=1, head_dim=64, inner=64)


def answers(folder: Path, cache: str, pass_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [4, 8] and the logarithms of their probabilities, with keys and values kept so."""
    plan = make_plan(SHAPE, kv_cache=cache, pass_tokens=pass_tokens, slots=2)
    runtime_dir = write_plan(Path(tempfile.mkdtemp(dir=folder)), plan)
    batch = [Generation(list(range(5 + i, 45 + i)), 8, GREEDY, top_scored=1) for i in range(4)]
    with Engine(runtime_dir, load(runtime_dir), folder) as engine:
        engine.run(batch)
    scored = [[s.logprob for s in g.scored] for g in batch]
    return torch.tensor([g.tokens for g in batch]), torch.tensor(scored)


@pytest.mark.parametrize("pass_tokens", [48, 192])
def test_answers_are_those_of_the_values_it_stands_for(
    pass_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 cache in which keys and values were rounded before gives the same scores; also where later
    parts of a prompt attend to earlier ones out of the cache."""
    save_checkpoint(tmp_path, SHAPE)
    exact, exactly = answers(tmp_path, "same", pass_tokens)
    tokens, scores = answers(tmp_path, "int8", pass_tokens)
    store = PagedCache.store

    def rounding(cache: PagedCache, layer: int, batch: PagedBatch, *kinds: torch.Tensor) -> None:
        parts = [whole_numbers(values) for values in kinds]
        store(cache, layer, batch, *(whole * scales[..., None] for whole, scales in parts))

    monkeypatch.setattr(PagedCache, "store", rounding)
    same, alike = answers(tmp_path, "same", pass_tokens)
    assert torch.equal(tokens, same)
    torch.testing.assert_close(scores, alike, rtol=0, atol=2e-3)
    assert (tokens == exact).float().mean() > 0.7
    assert not torch.equal(scores, exactly)


def test_a_plan_counts_what_the_cache_takes() -> None:
    plan = make_plan(SHAPE, kv_cache="int8")
    cache = PagedCache(2, 1, 64, plan.batch.kv_tokens, torch.bfloat16, 2, int8=True)
    scales = cache.scales(0)
    assert scales is not None
    held = cache.tensor.nbytes + 2 * sum(s.nbytes for s in scales)  # two layers
    assert kv_bytes(plan.model, plan.batch) == held
    exact = make_plan(SHAPE, compute_dtype="bf16")
    assert kv_bytes(exact.model, exact.batch) / held == pytest.approx(128 / 68)


def test_offload_plans_and_latents_keep_none() -> None:
    plan = make_plan(SHAPE, kv_cache="int8")
    check_supported(Path("plan"), plan)
    with pytest.raises(PlanFileError, match="int8 is kept by stream plans only, and not of latents"):
        check_supported(Path("plan"), replace(plan, model=replace(plan.model, latent_dim=8)))
