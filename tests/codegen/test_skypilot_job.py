"""The jobs' scripts, run here: a folder in the bucket's place, stand-ins for engines and metadata services.

tests/runtime/test_job.py runs one with the real runtime. None has run on a cloud.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from conftest import batch_spec
from test_emit_skypilot import LONG, OFFERS, OFFLOADED

from moeplan.codegen.emit import skypilot
from moeplan.planner.ir.plan import Plan
from moeplan.planner.pipeline import compile_plan
from moeplan.runtime_min.shards import merge, split

# Answers every request, and prints its arguments.
VLLM = """\
#!{python}
import json, os, sys
arguments = dict(zip(sys.argv[2::2], sys.argv[3::2]))
print(*sys.argv[1:], flush=True)
if os.environ.get("FAILS"):
    sys.exit(3)
with open(arguments["--output-file"], "w") as out:
    for line in open(arguments["--input-file"]):
        out.write(json.dumps({{"custom_id": json.loads(line)["custom_id"], "error": None}}) + "\\n")
"""
# Like runtime_min: appends to OUT.partial, goes on from it, renames it when done, ends at SIGTERM with 0.
# After as many requests as it is told it stops, to be ended.
RUNTIME = """\
#!{python}
import json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
arguments = dict(zip(sys.argv[3::2], sys.argv[4::2]))
output = arguments["--output"]
partial = output + ".partial"
done = {{json.loads(l)["custom_id"] for l in open(partial)}} if os.path.exists(partial) else set()
with open(partial, "a") as out:
    for line in open(arguments["--input"]):
        name = json.loads(line)["custom_id"]
        if name not in done:
            if len(done) == int(os.environ.get("HOLDS_AT", -1)):
                signal.pause()
            done.add(name)
            print("answers", name, flush=True)
            out.write(json.dumps({{"custom_id": name, "error": None}}) + "\\n")
            out.flush()
os.rename(partial, output)
"""
# The metadata services of three clouds; the machine is taken back once there is a file {flag}.
CURL = """\
#!/bin/sh
taken() {{ [ -e {flag} ]; }}
case "$*" in
  *api/token) echo t;;
  *"token: t "*/spot/instance-action) taken || exit 22;;
  *"Google "*/instance/preempted) taken && echo TRUE || echo FALSE;;
  *"true "*scheduledevents*) taken && echo '{{"EventType": "Preempt"}}' || echo '{{"Events": []}}';;
  *) exit 6;;
esac
"""
SOON_S = 300  # on the busiest machine


@dataclass
class Cloud:
    """A bucket and machines, each with a home of its own."""

    root: Path
    script: str

    @property
    def bucket(self) -> Path:
        return self.root / "bucket"

    def machine(self, name: str, **env: str) -> subprocess.Popen[str]:
        """Start the job's `run` on a machine; the engine is in its home, as `setup` would have left it."""
        home = self.root / name
        (home / "engine" / "bin").mkdir(parents=True, exist_ok=True)
        program(home / "engine" / "bin" / "vllm", VLLM.format(python=sys.executable))
        program(home / "engine" / "bin" / "runtime_min", RUNTIME.format(python=sys.executable))
        program(home / "bin" / "curl", CURL.format(flag=home / "taken"))
        path = f"{home / 'bin'}:{os.environ['PATH']}"
        needed = {
            "HOME": str(home),
            "PATH": path,
            "BUCKET": "s3://b",
            "MODEL": "m",
            "SHARD": "0",
        }
        return subprocess.Popen(
            ["bash", "-c", self.script],
            env=needed | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def answers(self) -> list[str]:
        return sorted(path.name for path in (self.bucket / "answers").iterdir())


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    folder = tmp_path_factory.mktemp("specs")
    (folder / "own").mkdir()
    (folder / "own" / "offers.csv").write_text(OFFERS)
    specs = {
        "runtime": batch_spec() + OFFLOADED,
        "vllm": LONG + "market: {gpus: [L4], purchase: on-demand}\n",
    }
    return {name: compile_plan(text, str(folder / "spec.yaml")) for name, text in specs.items()}


@pytest.fixture
def cloud(plans: dict[str, Plan], tmp_path: Path) -> Callable[..., Cloud]:
    def make(kind: str, requests: int, parts: int, cloud: str = "aws") -> Cloud:
        (choice,) = plans[kind].fleet.choices
        choice = replace(choice, column=replace(choice.column, cloud=cloud))  # type: ignore[arg-type]
        fleet = replace(plans[kind].fleet, choices=(choice,))
        (text,) = skypilot.emit(replace(plans[kind], fleet=fleet)).values()
        bucket = tmp_path / "bucket"
        script = yaml.safe_load(text)["run"].replace("/bucket", str(bucket)).replace("sleep 5", "sleep 0.05")
        (bucket / "runtime" / plans[kind].replicas[0].name).mkdir(parents=True)
        lines = [json.dumps({"custom_id": f"r{n}"}) + "\n" for n in range(requests)]
        (tmp_path / "in.jsonl").write_text("".join(lines))
        split(tmp_path / "in.jsonl", bucket / "parts", parts)
        return Cloud(tmp_path, script)

    return make


def ended(machine: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = machine.communicate(timeout=SOON_S)
    return machine.returncode, said


def test_machines_share_the_parts(
    cloud: Callable[..., Cloud], plans: dict[str, Plan], tmp_path: Path
) -> None:
    """All shards together answer every request once; a shard started again has nothing left to do."""
    sky, shards = cloud("vllm", 200, 12), plans["vllm"].placement.sites[0].replicas
    assert shards > 1
    for shard in range(shards):
        status, said = ended(sky.machine(f"m{shard}", SHARD=str(shard)))
        assert (status, said.count("run-batch")) == (0, 12 // shards)
    assert len(sky.answers()) == 12
    assert merge(tmp_path / "in.jsonl", sky.bucket / "answers", tmp_path / "out.jsonl") == 0
    assert ended(sky.machine("again")) == (0, "")


def test_an_engine_that_fails_fails_the_job(cloud: Callable[..., Cloud]) -> None:
    """And leaves nothing that counts as done."""
    sky = cloud("vllm", 20, 3)
    status, _ = ended(sky.machine("m", FAILS="1"))
    assert status == 3
    assert sky.answers() == []


@pytest.mark.parametrize("missing", [{"MODEL": ""}, {"BUCKET": ""}, {"SHARD": "99"}, {"SHARD": "x"}])
def test_what_is_not_given_is_named(cloud: Callable[..., Cloud], missing: dict[str, str]) -> None:
    status, said = ended(cloud("vllm", 5, 1).machine("m", **missing))
    assert status != 0
    assert next(iter(missing)) in said


def test_a_bucket_without_parts_fails(cloud: Callable[..., Cloud]) -> None:
    sky = cloud("vllm", 5, 1)
    next((sky.bucket / "parts").iterdir()).unlink()
    assert ended(sky.machine("m"))[0] != 0


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def records(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.parametrize("how", ["aws", "gcp", "azure", "SIGTERM", "SIGKILL"])
def test_a_preempted_machine_loses_little(cloud: Callable[..., Cloud], tmp_path: Path, how: str) -> None:
    """Another machine goes on from what is in the bucket: nothing twice in the merge, at most the last
    moments computed again. Stopped in order, a job ends with the code that has it recovered."""
    notice = how in ("aws", "gcp", "azure")
    sky = cloud("runtime", 60, 1, how if notice else "aws")
    machine = sky.machine("one", HOLDS_AT="10")
    copy = sky.bucket / "partial" / "part-00000.jsonl"
    wait_for(lambda: records(copy) >= 5)
    if notice:
        (tmp_path / "one" / "taken").touch()
    elif how == "SIGTERM":
        machine.send_signal(signal.SIGTERM)
    else:
        os.killpg(machine.pid, signal.SIGKILL)
    status, said = ended(machine)
    assert status == (-9 if how == "SIGKILL" else 75)
    kept = records(copy)
    if how != "SIGKILL":
        assert kept == said.count("answers")  # every record that the engine wrote
    status, said = ended(sky.machine("two"))
    assert (status, said.count("answers")) == (0, 60 - kept)
    assert merge(tmp_path / "in.jsonl", sky.bucket / "answers", tmp_path / "out.jsonl") == 0
    assert records(tmp_path / "out.jsonl") == 60
    assert not copy.exists()
