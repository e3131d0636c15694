"""Several ranks, gloo on CPUs in the accelerators' place: the tokens and scores of one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import durability
import pytest
import torch
from commands import plain_children

from moeplan.runtime_min import __main__ as command
from moeplan.runtime_min import ranks, results
from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.model_config import read_config
from moeplan.runtime_min.models.tensors import expert_names, find_parts
from moeplan.runtime_min.offload import Offload
from moeplan.runtime_min.plan_file import RuntimePlan, load
from moeplan.runtime_min.run import run_plan
from moeplan.runtime_min.shares import Share, parts_of, whole_heads

from .architectures import MODELS, plan_of, save
from .folders import VOCAB, Shape, make_offload_plan, offload_schedule, save_checkpoint, write_plan
from .test_offload import LENGTHS, check, generations

SHAPES = {
    "mixtral": Shape(layers=3, heads=8, kv_heads=4, experts=5, inner=37),
    "qwen3_moe": Shape("qwen3_moe", hidden=27, heads=4, kv_heads=2, experts=7, top=3, inner=19, vocab=301),
    "one key head": Shape(layers=2, heads=4, kv_heads=1, experts=4, inner=36, vocab=301, tied=True),
    "olmoe": Shape("olmoe", hidden=48, heads=4, kv_heads=4, head_dim=12, experts=4),
    "dense": Shape("llama", layers=3, heads=4, kv_heads=2, experts=1, top=1, inner=53),
}
PLANS: dict[str, dict[str, Any]] = {
    "staged, from disk": {"slots": 6, "disk_experts": 2, "resident_experts": 1},
    "CPU experts in decode": {"cpu_experts": 2},
    "nothing streamed": {"pages_per_layer": 0, "cpu_experts": 3, "resident_experts": 2},
    "all resident": {"pages_per_layer": 0, "resident_experts": 5},
}


@pytest.fixture(autouse=True)
def plain_schedules_of_others() -> Iterator[None]:
    """The other ranks, too, run schedules as plain Python."""
    with plain_children():
        yield


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 would end this process where it took longer to notice that another is lost."""
    monkeypatch.setattr(ranks, "_GRACE_S", SOON_S)


# Within which ranks end on the busiest machine; gloo alone would wait for half an hour.
SOON_S = 120.0


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
    with (
        ranks.started(runtime_dir, made, checkpoint, rehearse=True) as own,
        Several(runtime_dir, made, checkpoint, own.device, own) as engine,
    ):
        yield engine


def checked(folder: Path, checkpoint: Path, reference: Any, plan: RuntimePlan, **schedule: Any) -> list[Any]:
    """Tokens and scores of several ranks are those of `reference`; what each rank reports."""
    with several(folder, checkpoint, plan, **schedule) as engine:
        batch = generations(LENGTHS)
        engine.run(batch)
        check(engine, reference, batch)
        return list(engine.ranks.reports)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    return folder, save_checkpoint(folder, SHAPES["mixtral"])


@pytest.mark.parametrize("kind", SHAPES)
def test_scores_are_transformers(tmp_path, kind):
    """On two ranks and on four: odd widths, fewer heads of keys than ranks, norms over all heads."""
    (tmp_path / "checkpoint").mkdir()
    reference = save_checkpoint(tmp_path / "checkpoint", SHAPES[kind])
    for gpus in (2, 4):
        plan = make_offload_plan(SHAPES[kind], gpus=gpus)
        reports = checked(tmp_path / str(gpus), tmp_path / "checkpoint", reference, plan, attend=(1, 2))
        assert len(reports) == gpus


@pytest.mark.parametrize("name", PLANS)
def test_wherever_experts_lie(mixtral, tmp_path, name):
    """In memory or streamed, from the host or the disk, computed by the devices or by the CPU."""
    folder, reference = mixtral
    plan = make_offload_plan(SHAPES["mixtral"], gpus=2, **PLANS[name])
    from_disk = 3 if plan.offload.disk_experts else 0
    reports = checked(tmp_path, folder, reference, plan, attend=(2, 1), pages_from_disk=from_disk)
    assert (min(report.bytes_read for report in reports) > 0) == bool(from_disk)


@pytest.mark.parametrize(
    "name", ["dbrx", "gpt_oss", "glm4_moe", "phimoe", "qwen2_moe", "llama4_text", "llama, biases"]
)
def test_every_form_of_a_model(tmp_path, name):
    """Fused queries, keys and values, fused experts, sinks, shared and dense MLPs, biases: on three ranks."""
    (tmp_path / "checkpoint").mkdir()
    reference = save(tmp_path / "checkpoint", MODELS[name])
    model = plan_of(tmp_path / "checkpoint")
    cpu_experts = min(2, model.experts - 1)
    plan = make_offload_plan(Shape(), model=model, gpus=3, cpu_experts=cpu_experts)
    checked(tmp_path, tmp_path / "checkpoint", reference, plan, attend=(1, 2))


def test_sequences_enter_as_others_leave(mixtral, tmp_path):
    """Twenty requests for seven places, some cut by an end that rank 0 alone knows; then a batch more."""
    folder, reference = mixtral
    plan = make_offload_plan(SHAPES["mixtral"], gpus=2, cpu_experts=1, disk_experts=1, slots=3)
    with several(tmp_path, folder, plan, attend=(1, 2), pages_from_disk=2, across=2) as engine:
        some = generations([1 + 7 * at % 20 for at in range(20)])
        batch = [Generation(g.prompt, 1 + 5 * at % 7, g.sampling) for at, g in enumerate(some)]
        for at in (3, 11, 12):
            batch[at].ends, batch[at].max_tokens = frozenset(range(0, VOCAB, 2)), 12
        engine.run(iter(batch))
        engine.run(more := generations((3, 9)))
        assert any(g.finish == "stop" for g in batch)
        check(engine, reference, [*batch, *more])


def test_each_rank_reads_its_own_part(tmp_path):
    """Of each shared matrix a quarter, to the byte; norms and routers whole."""
    shape = Shape(heads=8, kv_heads=4, hidden=64, head_dim=512, inner=4096, experts=2, layers=1)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    save_checkpoint(checkpoint, shape)
    plan = make_offload_plan(shape, gpus=4, pages_per_layer=0, resident_experts=2)
    config = read_config(checkpoint, plan.model, plan.batch.context_tokens)
    refs = find_parts(checkpoint, plan.model, config)
    sizes = []
    for rank in range(4):
        parts = parts_of(refs, plan, config, Share(rank, 4)).values()
        sizes.append(sum(ref.nbytes for ref in parts))
        for ref in parts:
            whole = refs[ref.name]
            kept = "norm" in ref.name or ".gate." in ref.name
            assert ref.nbytes == (whole.nbytes if kept else whole.nbytes // 4), ref.name
            assert whole.offset <= ref.offset < ref.offset + ref.nbytes <= whole.offset + whole.nbytes
    with several(tmp_path, checkpoint, plan) as engine:
        engine.run(generations((3, 5)))
        loaded = [report.loaded_bytes for report in engine.ranks.reports]
    assert loaded == sizes  # what lies between the runs of a part is longer than a block: none is read


def test_parts_of_all_ranks_are_the_tensor(tmp_path):
    """Each element of each shared tensor is in one rank's part, for every form of an expert's tensors."""
    for name in ("dbrx", "gpt_oss", "llama4_text", "qwen2_moe"):
        folder = tmp_path / name
        folder.mkdir()
        save(folder, MODELS[name])
        model = plan_of(folder)
        config = read_config(folder, model, 64)
        refs = find_parts(folder, model, config)
        plan = make_offload_plan(Shape(), model=model, gpus=3)
        shares = [parts_of(refs, plan, config, Share(rank, 3)) for rank in range(3)]
        for ref in refs.values():
            parts = [part[ref.name] for part in shares]
            if parts[0].nbytes < ref.nbytes:
                places = [at for part in parts for at in _places(part)]
                assert sorted(places) == list(range(ref.offset, ref.offset + ref.nbytes)), ref.name
        experts = {n for e in range(model.experts) for n in expert_names(model, model.layers - 1, e)}
        assert experts <= {n for n, ref in shares[0].items() if ref.nbytes < refs[n].nbytes or "bias" in n}


def _places(ref):
    run = ref.run_bytes or ref.nbytes
    starts = range(
        ref.offset, ref.offset + ref.nbytes // run * max(1, ref.stride_bytes), ref.stride_bytes or 1
    )
    return [start + at for start in starts[: ref.nbytes // run] for at in range(run)]


def test_heads_are_shared_evenly_or_not_at_all():
    for heads, kv_heads, count in ((8, 4, 2), (8, 4, 4), (8, 2, 4), (32, 8, 4), (6, 3, 3)):
        assert whole_heads(heads, kv_heads, count)
        for rank in range(count):
            share = Share(rank, count)
            group = heads // kv_heads
            keys = sorted({head // group for head in share.part(heads)})
            assert keys == list(share.key_heads(kv_heads))
    assert not whole_heads(12, 3, 4)
    assert not whole_heads(6, 6, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint, plans for one device and two that read experts from disk, 40 requests, their answers."""
    folder = tmp_path_factory.mktemp("job")
    shape = Shape(layers=1)
    save_checkpoint(folder / "checkpoint", shape)
    durability.write_requests(folder / "in.jsonl", ["Once", "It was", "The end of the file"], 40)
    plan = make_offload_plan(shape, slots=3, disk_experts=2)
    schedule = offload_schedule(plan, attend=(1, 2), pages_from_disk=3)
    for gpus in (1, 2):
        made = replace(plan, offload=replace(plan.offload, gpus=gpus))
        runtime_dir = write_plan(folder / str(gpus), made, schedule)
        given = folder / "checkpoint", folder / "in.jsonl", folder / f"{gpus}.jsonl"
        with plain_children():
            run_plan(runtime_dir, *given, rehearse=True)
    assert (folder / "1.jsonl").read_bytes() == (folder / "2.jsonl").read_bytes()
    return folder


def arguments(folder: Path, output: Path) -> list[str]:
    runtime_dir = folder / "2" / "small.plan" / "runtime" / "replica"
    files = {"checkpoint": folder / "checkpoint", "input": folder / "in.jsonl", "output": output}
    return ["run", str(runtime_dir), "--rehearse", *(f"--{name}={path}" for name, path in files.items())]


def when_some_are_done(monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    add = results.Results.add

    def adding(self, record):
        add(self, record)
        if len(self.done) == 8:
            happens()

    monkeypatch.setattr(results.Results, "add", adding)


def goes_on(folder: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command completes the run; what was done is not done again."""
    assert command.main(arguments(folder, output)) == 0
    assert output.read_bytes() == (folder / "2.jsonl").read_bytes()
    said = capsys.readouterr().out
    assert "from the interrupted run)" in said
    assert "ranks      2, which loaded" in said
    assert not multiprocessing.active_children()


def test_a_rank_that_is_killed(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    killed: list[float] = []

    def kill() -> None:
        (process,) = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGKILL)
        killed.append(time.monotonic())

    with monkeypatch.context() as patch:
        when_some_are_done(patch, kill)
        assert command.main(arguments(folder, output)) == 2
    assert time.monotonic() - killed[0] < SOON_S
    said = capsys.readouterr().err
    assert "rank 1 of 2 is lost: it was killed by SIGKILL" in said
    assert "the same command goes on from what is done" in said
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) >= 9
    goes_on(folder, output, capsys)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_all_ranks(folder, tmp_path, monkeypatch, capsys, number, code):
    """As a terminal or a machine that is taken back sends it; the other rank leaves the end to rank 0."""
    output = tmp_path / "out.jsonl"

    def signalled() -> None:
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        when_some_are_done(patch, signalled)
        assert command.main(arguments(folder, output)) == code
    assert not multiprocessing.active_children()
    goes_on(folder, output, capsys)


def test_a_shard_that_one_rank_cannot_read(folder, tmp_path, monkeypatch, capsys):
    """Whichever meets it first, rank 0 says what."""
    output, shard = tmp_path / "out.jsonl", folder / "checkpoint" / "model.safetensors"
    whole = shard.read_bytes()
    with monkeypatch.context() as patch:
        when_some_are_done(patch, lambda: os.truncate(shard, 8192))
        try:
            assert command.main(arguments(folder, output)) == 2
        finally:
            shard.write_bytes(whole)
    assert "cannot be read: ends at byte" in capsys.readouterr().err
    goes_on(folder, output, capsys)


def test_others_leave_with_rank_0(folder, tmp_path):
    """Killed, it can end nobody."""
    output = tmp_path / "out.jsonl"
    code = (
        "import multiprocessing, os, signal\n"
        "from moeplan.runtime_min import __main__ as command, results\n"
        "def dies(self, record):\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "results.Results.add = dies\n"
        f"command.main({arguments(folder, output)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + SOON_S
    while runs(int(done.stdout)):
        assert time.monotonic() < end
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """False also for what has ended and that nobody waits for, as in containers without an init."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_a_backend_that_waits_forever_for_a_lost_rank(tmp_path, monkeypatch, capsys):
    process = multiprocessing.get_context("forkserver").Process(target=os._exit, args=(7,), name="rank 1")
    process.start()
    codes: list[int] = []
    monkeypatch.setattr(ranks, "_GRACE_S", 0.01)
    monkeypatch.setattr(os, "_exit", codes.append)
    ranks._watch([process], tmp_path / "refusal", threading.Event())
    assert codes == [2]
    assert "rank 1 of 2 is lost: it ended with 7\n  hint: " in capsys.readouterr().err


def test_the_report_has_every_rank(folder, tmp_path):
    report = tmp_path / "report.json"
    assert command.main([*arguments(folder, tmp_path / "out.jsonl"), f"--report={report}"]) == 0
    measured = json.loads(report.read_text())["measured"]
    assert len(measured["ranks"]) == 2
    assert measured["bytes_read"] == sum(rank["bytes_read"] for rank in measured["ranks"])
