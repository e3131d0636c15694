"""Offload plans, the CPU in the accelerator's place: by any schedule transformers' tokens and scores."""

import itertools
import os
import queue
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralForCausalLM

from moeplan.runtime_min.checksums import write_checksums
from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.lanes import Lanes
from moeplan.runtime_min.offload import Offload
from moeplan.runtime_min.pages import ReadError
from moeplan.runtime_min.plan_file import PlanFileError, RuntimePlan, load

from .folders import GREEDY, VOCAB, Shape, make_offload_plan, offload_schedule, save_checkpoint, write_plan

SHAPE = Shape(layers=3, experts=5)
LENGTHS = (5, 48, 1, 7, 7, 30, 2)
NEW = 6
PLANS: dict[str, dict[str, Any]] = {
    "pinned": {},
    "staged": {"slots": 6},
    "one slot": {"slots": 1},
    "from disk": {"slots": 6, "disk_experts": 2},
    "resident, by popularity": {
        "resident_experts": 2,
        "ranking": ((4, 2, 0, 1, 3), (3, 0, 1, 2, 4), (0, 1, 2, 3, 4)),
    },
    "CPU experts in decode": {"cpu_experts": 2},
    "all kinds of experts": {"slots": 5, "disk_experts": 1, "cpu_experts": 1, "resident_experts": 1},
    "nothing streamed": {"pages_per_layer": 0, "cpu_experts": 3, "resident_experts": 2},
    "all resident": {"pages_per_layer": 0, "resident_experts": 5},
}
SCHEDULES: dict[str, dict[str, int]] = {
    "sequential": {"barrier": 2, "lookahead": 0, "wrap": 0, "interleave": 0, "across": 0},
    "FlexGen": {"barrier": 1, "lookahead": 0, "wrap": 0, "interleave": 0, "across": 0},
    "FastDecode-like": {"wrap": 0, "interleave": 0},
    "CGOPipe": {},
    "CGOPipe without lean waits": {"lean": 0},
    "attention across": {"across": 2},
    "looking far ahead, across": {"across": 2, "lookahead": 3},
}
ATTENTION = {"on the CPU": (4, 0), "copied up": (0, 4), "on the GPU": (0, 0), "mixed": (1, 2)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MixtralForCausalLM]:
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_checkpoint(folder, SHAPE)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=source).tolist() for length in lengths]


class Rehearsal(Offload):
    """Keeps the scores that every token was taken from."""

    def __init__(self, folder: Path, checkpoint: Path, plan: RuntimePlan, **schedule: Any) -> None:
        runtime_dir = write_plan(folder, plan, offload_schedule(plan, **schedule))
        self.scores: dict[int, list[torch.Tensor]] = {}
        super().__init__(runtime_dir, load(runtime_dir), checkpoint, torch.device("cpu"))

    def _accept(self, scores, active):
        for row, (_, generation) in zip(scores, active, strict=True):
            self.scores.setdefault(id(generation), []).append(row.clone())
        super()._accept(scores, active)


def check(
    engine: Rehearsal, reference: LlamaForCausalLM | MixtralForCausalLM, generations: Sequence[Generation]
) -> None:
    """Each token is the reference's best after those before it, by the same scores."""
    for generation in generations:
        tokens = generation.tokens
        with torch.inference_mode():
            context = torch.tensor([[*generation.prompt, *tokens[:-1]]])
            expected = reference(context).logits[0, len(generation.prompt) - 1 :]
        assert tokens == expected.argmax(-1).tolist()
        torch.testing.assert_close(torch.stack(engine.scores[id(generation)]), expected, atol=1e-4, rtol=1e-5)


def generations(lengths: Sequence[int], seed: int = 0, new: int = NEW) -> list[Generation]:
    return [Generation(text, new, GREEDY) for text in prompts(lengths, seed)]


def in_pairs(*lists: Iterable[Any]) -> list[Any]:
    """All combinations of three lists: any two values meet in a quick case, any three in a slow one.

    That holds where the first list is the shortest.
    """
    shortest, *others = (list(enumerate(values)) for values in lists)
    return [
        pytest.param(*(value for _, value in case), marks=() if quick else pytest.mark.slow)
        for case in itertools.product(shortest, *others)
        for quick in [sum(at for at, _ in case[1:]) % len(shortest) == case[0][0]]
    ]


@pytest.mark.parametrize(("attention", "plan", "schedule"), in_pairs(ATTENTION, PLANS, SCHEDULES))
def test_tokens_and_scores_equal_transformers(model, tmp_path, plan, attention, schedule):
    folder, reference = model
    changes = SCHEDULES[schedule]
    made = make_offload_plan(SHAPE, **PLANS[plan])
    from_disk = 2 if made.offload.disk_experts else 0
    with Rehearsal(
        tmp_path, folder, made, attend=ATTENTION[attention], pages_from_disk=from_disk, **changes
    ) as engine:
        batch = generations(LENGTHS)
        engine.run(batch)
        check(engine, reference, batch)


DENSE = Shape(kind="llama", layers=3, experts=1, top=1, inner=53)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    folder = tmp_path_factory.mktemp("dense")
    return folder, save_checkpoint(folder, DENSE)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"slots": 6, "disk_experts": 1},
        {"pages_per_layer": 0, "cpu_experts": 1},
        {"pages_per_layer": 0, "resident_experts": 1},
    ],
    ids=["pinned", "from disk", "on the CPU", "resident"],
)
def test_a_dense_model(dense, tmp_path, changes, attention):
    """Its MLP is one expert: moved in pages, or computed by the CPU."""
    folder, reference = dense
    plan = make_offload_plan(DENSE, **changes)
    pages = 4 if plan.offload.disk_experts else 0
    with Rehearsal(tmp_path, folder, plan, attend=ATTENTION[attention], pages_from_disk=pages) as engine:
        batch = generations(LENGTHS)
        engine.run(batch)
        check(engine, reference, batch)


@pytest.mark.parametrize("micro_batch", [7, 4, 3, 2, 1])
@pytest.mark.parametrize("across", [0, 1, 2])
def test_batches_end_and_follow_each_other(model, tmp_path, micro_batch, across):
    """One to seven micro-batches; answers of many lengths, some cut by an end token; batches of all sizes."""
    folder, reference = model
    plan = make_offload_plan(
        SHAPE, micro_batch=micro_batch, cpu_experts=1, disk_experts=1, slots=3, pages_per_layer=3
    )
    count = -(-7 // micro_batch)
    attend = (count // 2, count - count // 2 - count // 4)
    with Rehearsal(tmp_path, folder, plan, attend=attend, pages_from_disk=1, across=across) as engine:
        for number, lengths in enumerate([LENGTHS, (3, 9), (20,), LENGTHS[:5], LENGTHS]):
            batch = [
                Generation(g.prompt, 1 + 5 * at % 7, GREEDY) for at, g in enumerate(generations(lengths))
            ]
            if number == 3:
                batch[0].ends = batch[1].ends = frozenset(range(0, VOCAB, 2))
                batch[0].max_tokens = batch[1].max_tokens = 12
            done: list[Generation] = []
            engine.scores.clear()
            engine.run(batch, done.append)
            assert sorted(map(id, done)) == sorted(map(id, batch))
            assert all(g.finish == "stop" or len(g.tokens) == g.max_tokens for g in batch)
            check(engine, reference, batch)


def slow_lanes(monkeypatch: pytest.MonkeyPatch, pace: random.Random) -> None:
    """Hold up one lane always, the others now and then."""
    slow = pace.choice(["gpu", "h2d", "d2h", "cpu", "copier", "disk"])

    def dawdling(lanes, lane, begun, block, do=Lanes._do):
        if lane is lanes.lanes[slow] or pace.random() < 0.1:
            time.sleep(0.001 * pace.random())
        do(lanes, lane, begun, block)

    monkeypatch.setattr(Lanes, "_do", dawdling)


@pytest.mark.parametrize(
    ("attention", "across", "micro_batch"), in_pairs(("cpu", "copied", "device"), (0, 1, 2), (7, 3, 2))
)
def test_sequences_enter_as_others_leave(model, tmp_path, attention, micro_batch, across, monkeypatch):
    """Twenty requests for seven places, answers of many lengths, lanes held up at random: prompts are read
    beside decoding, and the answers are those of the sequences alone."""
    folder, reference = model
    slow_lanes(monkeypatch, random.Random(micro_batch))
    plan = make_offload_plan(
        SHAPE, micro_batch=micro_batch, cpu_experts=1, disk_experts=1, slots=3, pages_per_layer=3
    )
    count = -(-7 // micro_batch)
    attend = {"cpu": (count, 0), "copied": (0, count), "device": (0, 0)}[attention]
    with Rehearsal(tmp_path, folder, plan, attend=attend, pages_from_disk=1, across=across) as engine:
        some = generations([1 + 7 * at % 20 for at in range(20)])
        batch = [Generation(g.prompt, 1 + 5 * at % 7, GREEDY) for at, g in enumerate(some)]
        for at in (3, 11, 12):
            batch[at].ends, batch[at].max_tokens = frozenset(range(0, VOCAB, 2)), 12
        done: list[Generation] = []
        engine.run(iter(batch), done.append)
        assert sorted(map(id, done)) == sorted(map(id, batch))
        assert all(g.finish == "stop" or len(g.tokens) == g.max_tokens for g in batch)
        check(engine, reference, batch)
        assert engine.stats.mixed_s > 0
        assert engine.stats.requests == len(batch)


@pytest.mark.parametrize("seed", range(6))
def test_any_pace_of_any_lane_gives_the_same(model, tmp_path, seed, monkeypatch):
    """Lanes are held up at random: order comes from what rows wait for, not from how fast lanes are."""
    folder, reference = model
    slow_lanes(monkeypatch, random.Random(seed))
    plan = make_offload_plan(SHAPE, cpu_experts=1, disk_experts=1, slots=3, pages_per_layer=3)
    with Rehearsal(tmp_path, folder, plan, attend=(1, 2), pages_from_disk=1, across=2) as engine:
        batch = generations(LENGTHS, seed)
        engine.run(batch)
        check(engine, reference, batch)


class Behind:
    """A stand-in for an accelerator's stream: a thread that does in order, late, what is enqueued."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        with torch.inference_mode():
            while (work := self.queue.get()) is not None:
                time.sleep(0.0003)
                work()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def record_event(self) -> "Mark":
        mark = Mark()
        self.queue.put(mark.done.set)
        return mark

    def wait_event(self, mark: "Mark") -> None:
        self.queue.put(mark.synchronize)

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Mark:
    def __init__(self) -> None:
        self.done = threading.Event()

    def query(self) -> bool:
        return self.done.is_set()

    def synchronize(self) -> None:
        assert self.done.wait(120)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("across", [1, 2])
def test_copies_that_are_only_enqueued(model, tmp_path, monkeypatch, attention, across):
    """Both directions of the link work behind their lanes, as an accelerator's streams do: who needs a copy
    waits for its event."""
    folder, reference = model

    def enqueued(lanes, lane, begun, block, do=Lanes._do):
        if isinstance(lane.stream, Behind):
            later, block = block, lambda: lane.stream.queue.put(later)
        do(lanes, lane, begun, block)

    monkeypatch.setattr(Lanes, "_do", enqueued)
    plan = make_offload_plan(SHAPE, cpu_experts=1, disk_experts=1, slots=2, pages_per_layer=3)
    attend = ATTENTION[attention]
    with Rehearsal(tmp_path, folder, plan, attend=attend, pages_from_disk=1, across=across) as engine:
        for name in ("h2d", "d2h"):
            engine.lanes.lanes[name].stream = Behind()
        batch = generations(LENGTHS)
        engine.run(batch)
        check(engine, reference, batch)
    for name in ("h2d", "d2h"):
        engine.lanes.lanes[name].stream.queue.put(None)


def test_decode_moves_no_expert_that_the_cpu_computes(model, tmp_path):
    """Bytes copied by decode passes are those of the streamed experts; of the next pass's first layer all."""
    folder, _ = model
    plan = make_offload_plan(SHAPE, cpu_experts=2, pages_per_layer=4)
    moved: list[int] = []
    with Rehearsal(tmp_path, folder, plan) as engine:
        copy = engine._memory.copy_page

        def counted(layer, page, half, slot, whole):
            _, first, end = engine._memory.experts.page(page, whole)
            moved.append(end - first)
            copy(layer, page, half, slot, whole)

        engine._memory.copy_page = counted
        engine.run(generations(LENGTHS, new=1))
        prefill = sum(moved)
        engine.run(generations(LENGTHS, new=3))
    layer = engine._memory.experts.layer_bytes
    assert prefill == (SHAPE.layers + 1) * layer
    each_decode = (SHAPE.layers - 1) * layer * 3 // 5 + layer
    assert sum(moved) == prefill + SHAPE.layers * layer + 2 * each_decode


@pytest.mark.parametrize(("stored", "dtype"), [(torch.bfloat16, "float32"), (torch.float32, "bf16")])
def test_other_dtypes_stay_near_float32(tmp_path, stored, dtype):
    """Experts are converted on their way from disk and to memory. The first token's scores are close, less so
    in half precision than a stream plan's: there hidden states wait between layers in float32."""
    folder = tmp_path / "checkpoint"
    shape = Shape(layers=3, experts=5, stored=stored)
    reference = save_checkpoint(folder, shape)
    plan = make_offload_plan(shape, compute_dtype=dtype, slots=6, disk_experts=2, cpu_experts=1)
    with Rehearsal(tmp_path, folder, plan, attend=(2, 1), pages_from_disk=2) as engine:
        batch = generations(LENGTHS)
        engine.run(batch)
    for generation in batch:
        with torch.inference_mode():
            expected = reference(torch.tensor([generation.prompt])).logits[0, -1]
        found = engine.scores[id(generation)][0]
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_shard_cut_short_ends_the_run(model, tmp_path):
    """The disk lane's error reaches the caller, by file and tensor, and the threads end."""
    folder, _ = model
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder, copy)
    plan = make_offload_plan(SHAPE, slots=6, disk_experts=3)
    with Rehearsal(tmp_path, copy, plan, pages_from_disk=3) as engine:
        os.truncate(copy / "model.safetensors", 20_000)
        with pytest.raises(ReadError, match=r"model\.safetensors: .*w[123]\.weight: cannot be read"):
            engine.run(generations(LENGTHS))
    assert not any(thread.is_alive() for threads in engine.lanes._threads.values() for thread in threads)


@pytest.mark.parametrize("slots", [0, 6])
def test_a_corrupt_tensor_ends_the_run(model, tmp_path, slots):
    """A tensor that is loaded, or read in pieces by the disk lane, which cuts it where its pages end."""
    folder, _ = model
    copy = tmp_path / "checkpoint"
    shutil.copytree(folder, copy)
    write_checksums(copy)
    plan = make_offload_plan(SHAPE, slots=slots, disk_experts=3 if slots else 0)
    pages = 3 if slots else 0
    with Rehearsal(tmp_path / "whole", copy, plan, pages_from_disk=pages) as engine:
        engine.run(generations(LENGTHS))
    ref = engine._memory._refs["model.layers.2.block_sparse_moe.experts.4.w3.weight"]
    data = bytearray(ref.path.read_bytes())
    data[ref.offset + ref.nbytes - 1] ^= 1
    ref.path.write_bytes(data)
    with (
        pytest.raises(RunError, match=rf"model\.safetensors: {ref.name}: is corrupt"),
        Rehearsal(tmp_path / "corrupt", copy, plan, pages_from_disk=pages) as engine,
    ):
        engine.run(generations(LENGTHS))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cpu_experts": 6}, "experts are not all somewhere, once"),
        ({"pages_per_layer": 0}, "no pages for experts that are streamed"),
        ({"disk_experts": 1}, "no slots for pages from disk"),
        ({"disk_experts": 6, "slots": 2}, "disk_experts are not among those streamed"),
        ({"ranking": ((0, 1, 2, 3, 3),) * 3}, "ranking does not rank the experts of each layer"),
        ({"budget_bytes": 1000}, r"more memory than the plan allows: device \(weights .* of 1,000 bytes"),
    ],
)
def test_what_cannot_be_executed(model, tmp_path, change, says):
    with pytest.raises(PlanFileError, match=says):
        Rehearsal(tmp_path, model[0], make_offload_plan(SHAPE, **change))


def test_experts_from_disk_in_pages_from_memory(model, tmp_path):
    plan = make_offload_plan(SHAPE, disk_experts=3, slots=6)
    with pytest.raises(PlanFileError, match="2 of 4 pages from disk do not hold its 3 experts"):
        Rehearsal(tmp_path, model[0], plan, pages_from_disk=2)


def test_a_schedule_of_another_plan(model, tmp_path):
    with pytest.raises(PlanFileError, match=r"schedule\.py: pages is 2, runtime\.json has 4"):
        Rehearsal(tmp_path, model[0], make_offload_plan(SHAPE), pages=2)
