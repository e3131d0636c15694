"""A SkyPilot job's script with the real runtime as its engine: two machines give what one run gives."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import durability
import pytest

from moeplan.codegen.render import render
from moeplan.runtime_min.run import run_plan
from moeplan.runtime_min.shards import merge, split

from .folders import Shape, make_plan, save_checkpoint, write_plan

SHAPE = Shape(layers=1)
# As in the other tests here, schedules run as plain Python. It stops where told, to be ended.
ENGINE = """\
#!{python}
import os, signal, sys
sys.modules["numba"] = None
from moeplan.runtime_min import __main__ as command, results
add = results.Results.add

def adding(self, record):
    add(self, record)
    if len(self.done) == int(os.environ.get("HOLDS_AT", 0)):
        signal.pause()

results.Results.add = adding
sys.exit(command.main())
"""
SOON_S = 300  # on the busiest machine


@pytest.mark.slow
def test_stopped_and_started_elsewhere(tmp_path: Path) -> None:
    """The same texts, in the order of the batch file, whatever the part files' own line numbers."""
    save_checkpoint(tmp_path / "checkpoint", SHAPE)
    runtime_dir = write_plan(tmp_path, make_plan(SHAPE))
    source = tmp_path / "in.jsonl"
    durability.write_requests(source, ["Once", "It was", "The end of the file"], 40)
    run_plan(runtime_dir, None, source, tmp_path / "whole.jsonl")
    bucket = tmp_path / "bucket"
    split(source, bucket / "parts", 2)
    (bucket / "runtime").mkdir()
    (bucket / "runtime" / "replica").symlink_to(runtime_dir)

    first = start(tmp_path, "one", HOLDS_AT="5")
    partial = tmp_path / "one" / "work" / "part-00000.jsonl.partial"
    until = time.monotonic() + SOON_S
    while not partial.exists() or partial.read_bytes().count(b"\n") < 1 + 5:
        assert time.monotonic() < until
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    assert first.wait(SOON_S) == 75
    assert start(tmp_path, "two").wait(SOON_S) == 0
    assert merge(source, bucket / "answers", tmp_path / "out.jsonl") == 0
    assert texts(tmp_path / "out.jsonl") == texts(tmp_path / "whole.jsonl")


def texts(path: Path) -> list[tuple[str, str]]:
    """Each request's name and answer, in order."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["custom_id"], r["response"]["body"]["choices"][0]["text"]) for r in records]


def start(root: Path, machine: str, **env: str) -> subprocess.Popen[bytes]:
    """Run the script on a machine with a home of its own, its engine and checkpoint in place."""
    home = root / machine
    (home / "engine" / "bin").mkdir(parents=True)
    program = home / "engine" / "bin" / "runtime_min"
    program.write_text(ENGINE.format(python=sys.executable))
    program.chmod(0o755)
    (home / "checkpoint").symlink_to(root / "checkpoint")
    script = render("skypilot/_runtime_batch.sh.j2", cloud="gcp", column="replica", replicas=1, notice_s=0.05)
    script = "set -eu\n" + script.replace("/bucket", str(root / "bucket")).replace("curl", "false")
    env |= {"HOME": str(home), "PATH": "/usr/bin:/bin", "SHARD": "0"}
    return subprocess.Popen(["bash", "-c", script], env=env)
