"""Several ranks, gloo on CPUs in the accelerators' place: the tokens and scores of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.offload import Offload
from moeplan.runtime_min.plan_file import RuntimePlan, load
from moeplan.runtime_min.ranks import started

from .folders import GREEDY, Shape, make_offload_plan, offload_schedule, save_checkpoint, write_plan
from .test_offload import LENGTHS, NEW, check, generations

MODELS = {
    "mixtral": Shape(layers=3, heads=8, kv_heads=4, experts=5, inner=37),
    "qwen3_moe": Shape(kind="qwen3_moe", layers=3, hidden=27, heads=4, kv_heads=2, experts=7, top=3, inner=19),
    "one key head": Shape(layers=2, heads=4, kv_heads=1, experts=4, inner=36, vocab=301, tied=True),
    "olmoe": Shape(kind="olmoe", hidden=48, heads=4, kv_heads=4, head_dim=12, experts=4),
    "dense": Shape(kind="llama", layers=3, heads=4, kv_heads=2, experts=1, top=1, inner=53),
}


class Several(Offload):
    """Rank 0 of several; keeps the scores that every token was taken from."""

    def __init__(self, *given: Any) -> None:
        self.scores: dict[int, list[torch.Tensor]] = {}
        super().__init__(*given)

    def _draw(self, scores, active):
        for row, (_, generation) in zip(scores, active, strict=True):
            self.scores.setdefault(id(generation), []).append(row.clone())
        super()._draw(scores, active)


@contextmanager
def several(folder: Path, checkpoint: Path, plan: RuntimePlan, **schedule: Any) -> Iterator[Several]:
    runtime_dir = write_plan(folder, plan, offload_schedule(plan, **schedule))
    made = load(runtime_dir)
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    with started(runtime_dir, made, checkpoint, rehearse=True) as ranks:
        with Several(runtime_dir, made, checkpoint, torch.device("cpu"), ranks) as engine:
            yield engine


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = MODELS[request.param]
    return folder, shape, save_checkpoint(folder, shape)


@pytest.mark.parametrize("gpus", [2, 4])
def test_scores_are_transformers(model, tmp_path, gpus):
    folder, shape, reference = model
    plan = make_offload_plan(shape, gpus=gpus, micro_batch=2)
    with several(tmp_path, folder, plan, attend=(1, 2)) as engine:
        batch = generations(LENGTHS)
        engine.run(batch)
        check(engine, reference, batch)
