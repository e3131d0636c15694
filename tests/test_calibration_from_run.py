"""A run that went otherwise than planned gives a machine on which the next plan expects what it measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import moeplan

EXAMPLE = Path(__file__).parents[1] / "examples" / "tinymoe"
SPEC = """\
name: tinymoe
model: {path: checkpoint, dtype: float32}
workload: {batch: {requests: 500, prompt: 40, output: 60}}
machine: cpu-2core
"""
KERNELS = """\
name: own
provenance: calibrated
cpu:
  cores: 2
  flops_per_s: {float32: 2.0e+11, bf16: 1.0e+11}
  launch_s: 4.0e-06
  while_reading: 0.9
dram: {bytes: 16000000000, bytes_per_s: 2.0e+10}
disk: {bytes: 200000000000, bytes_per_s: 1.5e+9, while_computing: 0.8}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").symlink_to(EXAMPLE / "checkpoint")
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "own.yaml").write_text(KERNELS)
    return tmp_path


def compiled(folder: Path, *options: str) -> dict[str, Any]:
    """The policy of the plan, compiled now."""
    done = moeplan("compile", "spec.yaml", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    plan = json.loads((folder / "tinymoe.plan" / "plan.json").read_text())
    policy: dict[str, Any] = plan["replicas"][0]["policy"]
    return policy


def write_report(folder: Path, policy: dict[str, Any], slower: float, **changes: Any) -> None:
    """The report of a run whose cores took `slower` times as long as the plan expects."""
    (runtime,) = folder.glob("tinymoe.plan/runtime/*/runtime.json")
    prompts, decoded = 20000, 29500
    seconds = {
        "prefill_s": slower * prompts / policy["prefill_tokens_per_s"]["value"],
        "decode_s": slower * decoded / policy["decode_tokens_per_s"]["value"],
    }
    elapsed_s = sum(seconds.values())
    measured = {
        "prefilled_tokens": prompts,
        "decode_tokens": decoded,
        "decode_passes": decoded // policy["sequences"],
        "elapsed_s": elapsed_s,
        "rehearsed": False,
        "lanes": [{"name": "compute", "busy_s": elapsed_s, "stall_s": 0.0, "bytes_read": 0}],
        **seconds,
        **changes,
    }
    report = {
        "format": 1,
        "plan": "tinymoe/replica",
        "runtime_dir": str(runtime.parent),
        "runtime_sha256": hashlib.sha256(runtime.read_bytes()).hexdigest(),
        "sequences": policy["sequences"],
        "measured": measured,
    }
    (folder / "run.json").write_text(json.dumps(report))


def calibrated(folder: Path) -> dict[str, Any]:
    done = moeplan("calibrate", "--from", "run.json", "-o", "machine2.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    machine: dict[str, Any] = yaml.safe_load((folder / "machine2.yaml").read_text())
    return machine


@pytest.mark.parametrize("machine", [(), ("--machine", "own.yaml")])
@pytest.mark.parametrize("slower", [0.7, 1.0, 3.0])
def test_the_next_plan_expects_what_was_measured(
    folder: Path, machine: tuple[str, ...], slower: float
) -> None:
    before = compiled(folder, *machine)
    write_report(folder, before, slower)
    calibrated(folder)
    after = compiled(folder, "--machine", "machine2.yaml")
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "generated_tokens_per_s"):
        assert after[name]["value"] == pytest.approx(before[name]["value"] / slower, rel=0.05)
        assert after[name]["provenance"] == "calibrated"


def test_the_disk_is_as_fast_as_it_streamed(folder: Path) -> None:
    """2 GB in 4 busy seconds beside cores that never wait: at 0.8 of its own rate, so 0.625 GB/s."""
    policy = compiled(folder, "--machine", "own.yaml")
    lanes = [
        {"name": "compute", "busy_s": 5.0, "stall_s": 0.0, "bytes_read": 0},
        {"name": "disk", "busy_s": 4.0, "stall_s": 1.0, "bytes_read": 2_000_000_000},
    ]
    write_report(folder, policy, 1.0, lanes=lanes)
    machine = calibrated(folder)
    assert machine["disk"]["bytes_per_s"] == pytest.approx(0.625e9, rel=0.01)
    assert machine["disk"]["while_computing"] == 0.8
    assert machine["cpu"]["flops_per_s"]["float32"] == pytest.approx(2e11, rel=0.01)


def test_the_file_says_where_its_figures_come_from(folder: Path) -> None:
    write_report(folder, compiled(folder), 2.0)
    calibrated(folder)
    first = (folder / "machine2.yaml").read_text().splitlines()[0]
    assert first == (
        "# Measured by a run of tinymoe/replica, starting from cpu-2core. "
        "The cores took 2.00 times as long as predicted."
    )


def test_operators_that_were_measured_scale_with_the_cores(folder: Path) -> None:
    from moeplan.planner.calibration_from_run import figures_from_run

    write_report(folder, compiled(folder), 1.0)
    report = json.loads((folder / "run.json").read_text())
    plan_file = folder / "tinymoe.plan" / "plan.json"
    plan = json.loads(plan_file.read_text())
    kernels = {"dtype": "float32", "threads": 2, "attention_s": 1e-3, "kv_bytes_per_s": 1e10}
    kernels["product_flops_per_s"] = [[1, 1e9], [16, 1e10]]
    plan["replicas"][0]["policy"]["machine"]["kernels"] = [kernels]
    plan_file.write_text(json.dumps(plan))
    report["measured"] |= {name: 2 * report["measured"][name] for name in ("prefill_s", "decode_s")}
    (folder / "run.json").write_text(json.dumps(report))
    figures = figures_from_run(folder / "run.json").figures
    found = figures["cpu"]["kernels"]["float32"][2]
    assert found["attention_s"] == pytest.approx(2e-3)
    assert found["kv_bytes_per_s"] == pytest.approx(5e9)
    assert found["product_flops_per_s"] == pytest.approx({1: 5e8, 16: 5e9})
    assert figures["dram"]["bytes_per_s"] == 2.2e10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rehearsed": True}, "the plan is for a GPU"),
        ({"decode_passes": 10**6}, "the batch was not full: 0 of "),
        ({"lanes": []}, "the batch was not full"),
    ],
)
def test_runs_that_tell_nothing_are_refused(folder: Path, change: dict[str, Any], says: str) -> None:
    write_report(folder, compiled(folder), 1.0, **change)
    done = moeplan("calibrate", "--from", "run.json", "-o", "machine2.yaml", cwd=folder)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (folder / "machine2.yaml").exists()


def test_reports_of_another_plan_are_refused(folder: Path) -> None:
    write_report(folder, compiled(folder), 1.0)
    (runtime,) = folder.glob("tinymoe.plan/runtime/*/runtime.json")
    runtime.write_text(runtime.read_text() + " ")
    done = moeplan("calibrate", "--from", "run.json", "-o", "machine2.yaml", cwd=folder)
    assert (done.returncode, "its plan is no longer in" in done.stderr) == (2, True)
    (folder / "run.json").write_text("{}")
    done = moeplan("calibrate", "--from", "run.json", "-o", "machine2.yaml", cwd=folder)
    assert "run.json: is no run report of this version" in done.stderr
    done = moeplan("calibrate", "--from", "absent.json", "-o", "machine2.yaml", cwd=folder)
    assert (done.returncode, "absent.json: No such file" in done.stderr) == (2, True)
