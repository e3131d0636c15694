"""Whatever ends a run - a signal, a full disk, a broken shard - the same command completes it."""

import json
import os
import re
import resource
import signal
import time
from pathlib import Path

import durability
import pytest

from moeplan.runtime_min import __main__ as command
from moeplan.runtime_min import results
from moeplan.runtime_min.checkpoint import find_tensors
from moeplan.runtime_min.checksums import write_checksums
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.run import run_plan

from .folders import Shape, make_plan, save_checkpoint, write_plan
from .signals import signalled

SHAPE = Shape(layers=1)
PROMPTS = ["Once", "It was", "The end of the file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint with checksums whose pages are streamed, its plan, 60 requests, and their answers."""
    folder = tmp_path_factory.mktemp("durable")
    save_checkpoint(folder / "checkpoint", SHAPE)
    write_checksums(folder / "checkpoint")
    runtime_dir = write_plan(folder, make_plan(SHAPE))
    durability.write_requests(folder / "in.jsonl", PROMPTS, 60)
    run_plan(runtime_dir, None, folder / "in.jsonl", folder / "whole.jsonl")
    return folder


def plan_of(folder: Path) -> Path:
    return folder / "small.plan" / "runtime" / "replica"


def arguments(folder: Path, output: Path) -> list[str]:
    files = ["--input", str(folder / "in.jsonl"), "--output", str(output)]
    return ["run", str(plan_of(folder)), *files]


def resumed(folder: Path, output: Path, capsys) -> str:
    """What the second call prints; its output is that of an uninterrupted run."""
    assert command.main(arguments(folder, output)) == 0
    assert output.read_bytes() == (folder / "whole.jsonl").read_bytes()
    assert sorted(path.name for path in output.parent.iterdir()) == [output.name]
    return capsys.readouterr().out


def test_killed_at_random_moments(folder, tmp_path):
    source = folder / "in.jsonl"
    outcome = durability.torture(plan_of(folder), folder / "checkpoint", source, tmp_path, kills=2, seed=1)
    assert outcome.kills.total() == 2
    assert (outcome.lost, outcome.duplicated, outcome.different) == (0, 0, 0)


@pytest.fixture
def no_more_than():
    """A limit on file sizes, which a write meets as it meets a full disk: in part, then with an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [50, 5000])
def test_a_full_disk_while_records_are_added(folder, tmp_path, no_more_than, capsys, size):
    """In the first line, or within a record; what lies there is continued once there is room."""
    output = tmp_path / "out.jsonl"
    no_more_than(size)
    try:
        assert command.main(arguments(folder, output)) == 2
    finally:
        no_more_than(resource.RLIM_INFINITY)
    err = capsys.readouterr().err
    assert "out.jsonl.partial: cannot be written: File too large" in err
    assert "hint: make room there; the same command goes on from what is done" in err
    torn = (tmp_path / "out.jsonl.partial").read_bytes()
    assert len(torn) == size
    assert not torn.endswith(b"\n")
    kept = torn.count(b"\n") - 1
    assert (f"({kept} from the interrupted run)" in resumed(folder, output, capsys)) == (kept > 0)


def test_a_full_disk_at_the_end(folder, tmp_path, no_more_than, capsys, monkeypatch):
    """All records are there, their final order finds no room: nothing is computed again."""
    output = tmp_path / "out.jsonl"
    finish = results.Results.finish

    def without_room(self):
        no_more_than(1000)
        finish(self)

    monkeypatch.setattr(results.Results, "finish", without_room)
    try:
        assert command.main(arguments(folder, output)) == 2
    finally:
        no_more_than(resource.RLIM_INFINITY)
    assert "out.jsonl: cannot be written: File too large" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl.partial"]
    monkeypatch.undo()
    assert "60 requests (60 from the interrupted run); 0 tokens" in resumed(folder, output, capsys)


def test_a_shard_that_shrinks_during_the_run(folder, tmp_path, capsys, monkeypatch):
    """The error names file and tensor; the answers so far are kept and continued."""
    output, shard = tmp_path / "out.jsonl", folder / "checkpoint" / "model.safetensors"
    whole = shard.read_bytes()
    add = results.Results.add

    def shrinking(self, record):
        add(self, record)
        if len(self.done) == 8:
            os.truncate(shard, 8192)

    monkeypatch.setattr(results.Results, "add", shrinking)
    try:
        assert command.main(arguments(folder, output)) == 2
    finally:
        shard.write_bytes(whole)
    err = capsys.readouterr().err
    assert f"{shard}: model.layers.0." in err
    assert re.search(r"\.weight: cannot be read: ends at byte \d+, had \d+\n", err)
    assert "hint: the same command goes on" in err
    monkeypatch.undo()
    assert "from the interrupted run)" in resumed(folder, output, capsys)


def test_a_corrupt_page(folder, tmp_path, capsys, monkeypatch):
    """The run that goes on names file and tensor, and keeps the answers until the file is restored."""
    output, shard = tmp_path / "out.jsonl", folder / "checkpoint" / "model.safetensors"
    whole = shard.read_bytes()
    add = results.Results.add

    def interrupted(self, record):
        add(self, record)
        if len(self.done) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.Results, "add", interrupted)
        assert command.main(arguments(folder, output)) == 130
    expert = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    shapes = {expert: (SHAPE.hidden, SHAPE.inner)}
    ref = find_tensors(folder / "checkpoint", shapes, unused=lambda name: True)[expert]
    shard.write_bytes(whole[: ref.offset] + bytes([whole[ref.offset] ^ 1]) + whole[ref.offset + 1 :])
    try:
        assert command.main(arguments(folder, output)) == 2
    finally:
        shard.write_bytes(whole)
    err = capsys.readouterr().err
    assert f"{shard}: {expert}: is corrupt: its bytes do not have the checksum in checksums.json" in err
    assert "hint: restore the file; records already written are good; the same command goes on" in err
    assert "(8 from the interrupted run)" in resumed(folder, output, capsys)


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGTERM, 0, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_within_a_pass(folder, tmp_path, capsys, monkeypatch, number, code, says):
    """It comes while a block is computed; the rest of the pass is not waited for."""
    from moeplan.runtime_min.stream import StreamModel

    output = tmp_path / "out.jsonl"
    execute, rows = StreamModel.execute, []

    def signalled(self, row):
        rows.append(row)
        if len(rows) == 400:
            os.kill(os.getpid(), number)
        execute(self, row)

    monkeypatch.setattr(StreamModel, "execute", signalled)
    assert command.main(arguments(folder, output)) == code
    assert len(rows) == 400
    err = capsys.readouterr().err
    assert err == f"\n{says}\n  hint: the same command goes on from what is done\n"
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "from the interrupted run)" in resumed(folder, output, capsys)


def test_a_signal_that_surfaces_as_another_error(folder, tmp_path, capsys, monkeypatch):
    """As within Numba's import, which makes a RecursionError of it."""

    def importing(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RunError("schedule.py: cannot be run: RecursionError") from None

    monkeypatch.setattr("moeplan.runtime_min.stream.load_schedule", importing)
    assert command.main(arguments(folder, tmp_path / "out.jsonl")) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_signal_that_is_swallowed_ends_the_run_after_the_pass(folder, tmp_path, monkeypatch):
    from moeplan.runtime_min.stream import StreamModel

    execute, rows = StreamModel.execute, []

    def swallowing(self, row):
        rows.append(row)
        try:
            if len(rows) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pass
        execute(self, row)

    monkeypatch.setattr(StreamModel, "execute", swallowing)
    assert command.main(arguments(folder, tmp_path / "out.jsonl")) == 0
    assert not (tmp_path / "out.jsonl").exists()


def test_a_terminated_process_exits_0(folder, tmp_path):
    """A real one; SIGTERM twice, as some senders do."""
    output = tmp_path / "out.jsonl"
    done = signalled(arguments(folder, output), 9, signal.SIGTERM, signal.SIGTERM)
    assert done.returncode == 0
    assert done.stderr == "\nterminated\n  hint: the same command goes on from what is done\n"
    records = results.partial_path(output).read_bytes().splitlines()[1:]
    assert len(records) == 9
    assert all(json.loads(record)["error"] is None for record in records)
