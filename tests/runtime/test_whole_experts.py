"""Ranks that each have whole experts: the tokens and scores of one, and what each of them holds."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from commands import plain_children

from moeplan.runtime_min import ranks
from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.limits import check_offload
from moeplan.runtime_min.model_config import read_config
from moeplan.runtime_min.models.tensors import find_parts
from moeplan.runtime_min.offload_memory import Experts
from moeplan.runtime_min.plan_file import ITEM_BYTES, PlanFileError, RuntimePlan
from moeplan.runtime_min.shares import Share, own_experts, parts_of, plan_of

from . import architectures
from .architectures import MODELS, Small, save
from .folders import Shape, make_offload_plan, save_checkpoint
from .test_offload import LENGTHS, generations
from .test_ranks import SOON_S, checked, several

SHAPES = {
    "mixtral": Shape(layers=3, heads=8, kv_heads=4, experts=8, inner=37),
    "qwen3_moe": Shape("qwen3_moe", hidden=27, heads=4, kv_heads=2, experts=12, top=3, inner=19, vocab=301),
    "narrower than there are ranks": Shape(layers=2, heads=4, kv_heads=1, experts=4, inner=3, tied=True),
    "olmoe": Shape("olmoe", hidden=48, heads=4, kv_heads=4, head_dim=12, experts=4),
}
_ORDERS = tuple(tuple(random.Random(layer).sample(range(8), 8)) for layer in range(3))
PLANS: dict[str, dict[str, Any]] = {
    "staged, from disk": {"slots": 6, "disk_experts": 2, "resident_experts": 2},
    "CPU experts in decode, by popularity": {"cpu_experts": 2, "resident_experts": 2, "ranking": _ORDERS},
    "nothing streamed": {"pages_per_layer": 0, "cpu_experts": 6, "resident_experts": 2},
    "all resident": {"pages_per_layer": 0, "resident_experts": 8},
}


@pytest.fixture(autouse=True)
def plain_schedules_of_others() -> Iterator[None]:
    """The other ranks, too, run schedules as plain Python."""
    with plain_children():
        yield


def whole(shape: Shape, gpus: int, **changes: Any) -> RuntimePlan:
    return make_offload_plan(shape, gpus=gpus, expert_shares="whole", **changes)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    return folder, save_checkpoint(folder, SHAPES["mixtral"])


@pytest.mark.parametrize("kind", SHAPES)
def test_scores_are_transformers(tmp_path, kind):
    """On two ranks and on four."""
    (tmp_path / "checkpoint").mkdir()
    reference = save_checkpoint(tmp_path / "checkpoint", SHAPES[kind])
    for gpus in (2, 4):
        plan = whole(SHAPES[kind], gpus)
        reports = checked(tmp_path / str(gpus), tmp_path / "checkpoint", reference, plan, attend=(1, 2))
        assert len(reports) == gpus


@pytest.mark.parametrize("name", PLANS)
def test_wherever_experts_lie(mixtral, tmp_path, name):
    """In memory or streamed, from the host or the disk, computed by the devices or by the CPU."""
    folder, reference = mixtral
    plan = whole(SHAPES["mixtral"], 2, **PLANS[name])
    from_disk = 3 if plan.offload.disk_experts else 0
    reports = checked(tmp_path, folder, reference, plan, attend=(2, 1), pages_from_disk=from_disk)
    assert (min(report.bytes_read for report in reports) > 0) == bool(from_disk)


def six_experts(small: Small) -> Small:
    """`small` with so many that three ranks have two each."""
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    keys = {**small.keys, **{key: 6 for key in counts if key in small.keys}}
    if "ffn_config" in keys:
        keys["ffn_config"] = {**keys["ffn_config"], "moe_num_experts": 6}
    return replace(small, keys=keys)


@pytest.mark.parametrize("name", ["dbrx", "gpt_oss", "glm4_moe", "phimoe", "qwen2_moe", "llama4_text"])
def test_every_form_of_a_model(tmp_path, name):
    """Fused experts and their biases, which are added once, beside shared and dense MLPs, which are cut."""
    (tmp_path / "checkpoint").mkdir()
    reference = save(tmp_path / "checkpoint", six_experts(MODELS[name]))
    model = architectures.plan_of(tmp_path / "checkpoint")
    assert model.experts == 6
    plan = whole(Shape(), 3, model=model, cpu_experts=3)
    checked(tmp_path, tmp_path / "checkpoint", reference, plan, attend=(1, 2))


def test_each_rank_has_its_experts_to_the_byte(mixtral, tmp_path):
    """Every expert is one rank's, whole; at each place all have as many, and files are read once."""
    folder, _ = mixtral
    changes = {"slots": 6, "disk_experts": 4, "cpu_experts": 0, "resident_experts": 4, "ranking": _ORDERS}
    plan = whole(SHAPES["mixtral"], 4, **changes)
    config = read_config(folder, plan.model, plan.batch.context_tokens)
    refs = find_parts(folder, plan.model, config)
    owners, sizes = Counter[str](), []
    for rank in range(4):
        own, parts = plan_of(plan, Share(rank, 4)), parts_of(refs, plan, config, Share(rank, 4))
        experts = [name for name in parts if ".experts." in name]
        assert all(parts[name] == refs[name] for name in experts)
        assert len(experts) == 3 * 2 * plan.model.layers
        owners.update(experts)
        held = Experts(own, pages=4)
        assert held.expert_bytes == 3 * 24 * 37 * ITEM_BYTES["float32"]
        assert [len(held.resident(layer)) for layer in range(3)] == [1, 1, 1]
        assert held.layer_bytes == held.expert_bytes == held.layer_bytes - held.host_bytes
        sizes.append(sum(ref.nbytes for ref in parts.values()) - 3 * held.layer_bytes)
    assert set(owners.values()) == {1}
    assert set(owners) == {name for name in refs if ".experts." in name}
    with several(tmp_path, folder, plan, attend=(1, 2), pages_from_disk=4) as engine:
        engine.run(generations((3, 5)))
        reports = engine.ranks.reports
    # Matrices cut by column are read whole where what lies between two of their runs is short.
    columns = [n for n in refs if n.endswith("o_proj.weight")]
    between = sum(refs[n].nbytes for n in columns)
    assert all(size <= r.loaded_bytes <= size + between for r, size in zip(reports, sizes, strict=True))
    assert len({r.bytes_read for r in reports}) == 1


def test_popular_experts_are_dealt_forth_and_back():
    """Whatever falls from rank to rank by steps falls evenly on all ranks."""
    plan = whole(SHAPES["mixtral"], 2, ranking=_ORDERS)
    for layer, order in enumerate(_ORDERS):
        dealt = [own_experts(plan, Share(rank, 2), layer) for rank in range(2)]
        places = [[order.index(expert) for expert in own] for own in dealt]
        assert places == [[0, 3, 4, 7], [1, 2, 5, 6]]
        assert sum(places[0]) == sum(places[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": 7}, "7 experts are not shared"),
        ({"resident_experts": 3}, "3 resident experts"),
        ({"cpu_experts": 5}, "5 CPU experts"),
        ({"slots": 3, "disk_experts": 1}, "1 disk experts"),
    ],
)
def test_experts_that_cannot_be_dealt_evenly_are_refused(tmp_path, changes, said):
    shape = replace(SHAPES["mixtral"], experts=changes.pop("experts", 8))
    with pytest.raises(PlanFileError, match=f"{said}.* whole and evenly by 2 GPUs"):
        check_offload(tmp_path, whole(shape, 2, **changes))


def test_a_rank_that_is_killed(mixtral, tmp_path, monkeypatch):
    """The others' sums fail, and rank 0 says which is lost."""
    monkeypatch.setattr(ranks, "_GRACE_S", SOON_S)  # it would end this process where it took longer to notice
    folder, _ = mixtral
    plan = whole(SHAPES["mixtral"], 2, cpu_experts=2)
    with (
        pytest.raises(ranks.RankError, match="rank 1 of 2 is lost: it was killed by SIGKILL"),
        several(tmp_path, folder, plan, attend=(1, 2)) as engine,
    ):
        engine.run(killing(engine, generations(LENGTHS)))


def killing(engine: Any, batch: list[Generation]) -> Iterator[Generation]:
    """`batch`, and at its end rank 1 is killed."""
    yield from batch
    (other,) = engine.ranks._others
    os.kill(other.pid, signal.SIGKILL)
    time.sleep(0.1)
