"""The command line: exit codes, messages without traceback, and help without torch."""

import json
from signal import SIGKILL

import pytest

from moeplan.runtime_min import __main__ as command
from moeplan.runtime_min import run

from .folders import (
    Shape,
    make_offload_plan,
    make_plan,
    offload_schedule,
    save_checkpoint,
    write_plan,
)
from .signals import signalled

SHAPE = Shape(layers=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "checkpoint", SHAPE)
    body = {"prompt": "Once", "max_tokens": 3, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (folder / "in.jsonl").write_text(json.dumps(line) + "\n{\n")
    return folder, write_plan(folder, make_plan(SHAPE))


def arguments(folders, *more: str) -> list[str]:
    folder, runtime_dir = folders
    return ["run", str(runtime_dir), "--input", str(folder / "in.jsonl"), *more]


def test_run(folders, capsys):
    """Error records are counted, not an exit code; nothing on stderr when it is no terminal."""
    output = folders[0] / "out.jsonl"
    assert command.main(arguments(folders, "--output", str(output), "--show", "2")) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a: Once >>> ")
    assert "2 requests, 1 with an error record" in out
    assert "decode" in out
    assert err == ""
    assert len(output.read_text().splitlines()) == 2


@pytest.fixture(scope="module")
def for_an_accelerator(folders):
    plan = make_offload_plan(SHAPE, sequences=4)
    folder = folders[0] / "accelerator"
    folder.mkdir()
    return write_plan(folder, plan, offload_schedule(plan, attend=(1, 1)))


def test_an_accelerator_plan_needs_one(folders, for_an_accelerator, capsys, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    runtime_dir, options = for_an_accelerator, arguments(folders, "--output", "out.jsonl")[2:]
    assert command.main(["run", str(runtime_dir), *options]) == 2
    err = capsys.readouterr().err
    assert "the plan is for an accelerator, and torch finds none here" in err
    assert "--rehearse" in err


def test_rehearsal(folders, for_an_accelerator, capsys, tmp_path):
    """The same answers as the plan for the CPU, and no word of a speed that was planned for."""
    options = ["--checkpoint", str(folders[0] / "checkpoint"), "--rehearse"]
    runtime_dir, output = str(for_an_accelerator), tmp_path / "out.jsonl"
    assert command.main(["run", runtime_dir, *arguments(folders, "--output", str(output))[2:], *options]) == 0
    assert "the CPU took the accelerator's place" in capsys.readouterr().out
    assert command.main(arguments(folders, "--output", str(tmp_path / "plain.jsonl"))) == 0
    assert output.read_bytes() == (tmp_path / "plain.jsonl").read_bytes()
    assert command.main(["bench", runtime_dir, "--prompt-tokens", "4", "--tokens", "3", *options]) == 0


def test_bench(folders, capsys):
    assert command.main(["bench", str(folders[1]), "--prompt-tokens", "4", "--tokens", "3"]) == 0
    assert "tokens/s, the plan expected " in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["runtime", "checkpoint", "input", "output"])
def test_what_cannot_be_used_exits_2(folders, capsys, tmp_path, wrong):
    folder, runtime_dir = folders
    paths = {
        "runtime": runtime_dir,
        "checkpoint": folder / "checkpoint",
        "input": folder / "in.jsonl",
        "output": tmp_path / "out.jsonl",
    }
    paths[wrong] = tmp_path / "missing" / "thing"
    options = [f"--{name}={paths[name]}" for name in ("checkpoint", "input", "output")]
    assert command.main(["run", str(paths["runtime"]), *options]) == 2
    _, err = capsys.readouterr()
    assert str(paths[wrong]) in err
    assert "Traceback" not in err


def test_interruption_says_how_to_go_on(folders, capsys, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Results, "finish", interrupt)
    output = tmp_path / "out.jsonl"
    assert command.main(arguments(folders, "--output", str(output))) == 130
    assert "goes on from what is done" in capsys.readouterr().err
    monkeypatch.undo()
    assert command.main(arguments(folders, "--output", str(output))) == 0
    assert "2 requests (2 from the interrupted run)" in capsys.readouterr().out


def test_a_killed_run_goes_on(folders, tmp_path):
    """A real process, ended without warning while it works; the same bytes as in one go."""
    _, runtime_dir = folders
    lines = [
        {
            "custom_id": str(n),
            "url": "/v1/completions",
            "body": {"prompt": f"Tale {n}", "max_tokens": 12, "seed": n},
        }
        for n in range(24)
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    options = [str(runtime_dir), "--input", str(source), "--output"]
    done = 6
    assert signalled(["run", *options, str(output)], done, SIGKILL).returncode == -SIGKILL
    assert not output.exists()
    assert (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") == 1 + done
    report = run.run_plan(runtime_dir, None, source, output)
    assert (report.resumed, report.answered) == (done, len(lines) - done)
    run.run_plan(runtime_dir, None, source, tmp_path / "whole.jsonl")
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_progress_bar(capsys):
    """Requests that an earlier run did say nothing about how long the others take."""
    times = iter([100.0, 110.0, 120.0])
    bar = command.ProgressBar(lambda: next(times))
    bar(10, 40, 0)
    bar(20, 40, 500)
    bar(40, 40, 1500)
    first, second, last = capsys.readouterr().err.replace("\x1b[K", "").split("\r")[1:]
    assert first == f"[{'#' * 7}{'-' * 23}] 10/40 requests, 0 tokens"
    assert second == f"[{'#' * 15}{'-' * 15}] 20/40 requests, 500 tokens, 50/s, 0:00:20 left"
    assert last == f"[{'#' * 30}] 40/40 requests, 1,500 tokens, 75/s"


def test_what_follows_a_run(folders, tmp_path):
    """A trace, metrics and a report of one run agree."""
    files = {name: tmp_path / name for name in ("trace", "metrics", "report")}
    options = [f"--{name}={path}" for name, path in files.items()]
    assert command.main(["bench", str(folders[1]), "--prompt-tokens", "4", "--tokens", "3", *options]) == 0
    report = json.loads(files["report"].read_text())
    measured = report["measured"]
    assert (measured["requests"], measured["answered"], measured["generated_tokens"]) == (4, 4, 12)
    assert (
        f'moeplan_read_bytes_total{{plan="small"}} {measured["bytes_read"]}\n' in files["metrics"].read_text()
    )
    events = json.loads(files["trace"].read_text())
    assert sum(event["args"].get("bytes", 0) for event in events) == measured["bytes_read"]
    lanes = {lane["name"]: lane for lane in measured["lanes"]}
    for lane in lanes.values():
        assert lane["busy_s"] > 0
    busy = lanes["compute"]["busy_s"] + lanes["compute"]["stall_s"]
    assert busy <= measured["elapsed_s"]
    for row in report["predicted_and_measured"]:
        assert row["ratio"] == pytest.approx(row["measured"] / row["predicted"])
        assert row["within"] == (row["low"] <= row["measured"] <= row["high"])
    rate = {row["figure"]: row["measured"] for row in report["predicted_and_measured"]}
    assert rate["generated_tokens_per_s"] == pytest.approx(12 / measured["elapsed_s"])
