"""Predict, run, record, predict again: with its own profile the plan expects what the machine did."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from commands import moeplan, plain_children

EXAMPLE = Path(__file__).parents[1] / "examples" / "tinymoe"
SPEC = """\
name: tinymoe
model: {path: checkpoint, dtype: float32}
workload: {batch: {prompts: prompts.jsonl}}
machine: cpu-2core
"""
RATES = ("prefill_tokens_per_s", "decode_tokens_per_s")

pytestmark = pytest.mark.skipif(
    not (EXAMPLE / "checkpoint" / "model.safetensors").exists(), reason="no checkpoint"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint").symlink_to(EXAMPLE / "checkpoint")
    (tmp_path / "prompts.jsonl").write_bytes((EXAMPLE / "prompts.jsonl").read_bytes())
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewritten(folder: Path, row: dict[str, str]) -> dict[str, str]:
    """The row in own.csv as of a machine a tenth slower than planned, however busy this one is."""
    policy = policy_of(folder)
    (rate,) = policy["rates"]
    figures = {name: policy[name]["value"] / 1.1 for name in RATES}
    figures["requests_per_s"] = rate["requests_per_s"]["value"] / 1.1
    figures |= {name: 1.1 * rate[name] for name in ("ttft_s", "itl_s")}
    assert {name for name, cell in row.items() if cell} >= figures.keys()
    assert all(float(row[name]) > 0 for name in figures)
    row |= {name: f"{value:.4g}" for name, value in figures.items()}
    with (folder / "own.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    return row


def policy_of(folder: Path) -> dict[str, Any]:
    plan = json.loads((folder / "tinymoe.plan" / "plan.json").read_text())
    policy: dict[str, Any] = plan["replicas"][0]["policy"]
    return policy


def test_a_plan_with_its_own_profile_expects_what_was_measured(folder: Path) -> None:
    assert moeplan("compile", "spec.yaml", cwd=folder).returncode == 0
    run = ["run", "tinymoe.plan", "--input", "prompts.jsonl", "--profile", "own.csv", "--output"]
    with plain_children():
        done = moeplan(*run, "answers.jsonl", cwd=folder)
        again = moeplan(*run, "again.jsonl", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "a row in own.csv (one cold batch only)" in done.stdout
    assert again.returncode == 0, again.stderr
    (row,) = rows_of(folder / "own.csv")  # the second run replaced the first's row
    assert (row["machine"], row["engine"], row["gpus"], row["batch"]) == (
        "cpu-2core",
        "runtime_min",
        "0",
        "24",
    )
    row = rewritten(folder, row)
    (folder / "spec.yaml").write_text(SPEC + "profile: own.csv\n")
    done = moeplan("compile", "spec.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    policy = policy_of(folder)
    for name in RATES:
        assert policy[name]["provenance"] in ("measured", "calibrated")
        assert policy[name]["value"] == pytest.approx(float(row[name]), rel=0.02)
    (rate,) = policy["rates"]
    assert rate["requests_per_s"]["value"] == pytest.approx(float(row["requests_per_s"]), rel=0.02)
    assert (rate["ttft_s"], rate["itl_s"]) == (
        pytest.approx(float(row["ttft_s"]), rel=0.02),
        pytest.approx(float(row["itl_s"]), rel=0.02),
    )
    runtime = json.loads(next(folder.glob("tinymoe.plan/runtime/*/runtime.json")).read_text())
    expected = policy["decode_tokens_per_s"]["value"]
    assert runtime["predicted"]["decode_tokens_per_s"]["value"] == expected
    assert moeplan("check", "spec.yaml", cwd=folder).returncode == 0


def test_the_lock_knows_the_profile(folder: Path) -> None:
    (folder / "spec.yaml").write_text(SPEC + "profile: own.csv\n")
    header = "machine,model,engine,gpus,prompt_tokens,output_tokens,batch,itl_s\n"
    (folder / "own.csv").write_text(f"{header}cpu-2core,checkpoint,runtime_min,0,35,55,24,0.01\n")
    assert moeplan("compile", "spec.yaml", cwd=folder).returncode == 0
    (folder / "own.csv").write_text(f"{header}cpu-2core,checkpoint,runtime_min,0,35,55,24,0.02\n")
    done = moeplan("check", "spec.yaml", cwd=folder)
    assert done.returncode == 1
    assert "moeplan.lock: stale" in done.stderr


def test_problems_of_the_profile_come_with_those_of_other_files(folder: Path) -> None:
    (folder / "spec.yaml").write_text(SPEC.replace("prompts.jsonl", "absent.jsonl") + "profile: own.csv\n")
    header = "machine,model,engine,gpus,prompt_tokens,output_tokens,batch,itl_s\n"
    (folder / "own.csv").write_text(f"{header}cpu-2cores,checkpoint,runtime_min,0,35,55,24,-1\n")
    done = moeplan("compile", "spec.yaml", cwd=folder)
    assert done.returncode == 2
    assert "own.csv:2:1: no machine named 'cpu-2cores'" in done.stderr
    assert "own.csv:2:46: itl_s: '-1' is not a number above 0" in done.stderr
    assert "absent.jsonl: No such file" in done.stderr


def test_a_file_that_is_no_profile_is_refused_before_the_run(folder: Path) -> None:
    assert moeplan("compile", "spec.yaml", cwd=folder).returncode == 0
    (folder / "notes.csv").write_text("some,other,table\n")
    files = ["--input", "prompts.jsonl", "--output", "answers.jsonl", "--profile", "notes.csv"]
    done = moeplan("run", "tinymoe.plan", *files, cwd=folder)
    assert done.returncode == 2
    assert "notes.csv:1:1: the header has no column 'machine'" in done.stderr
    assert not (folder / "answers.jsonl").exists()
    assert (folder / "notes.csv").read_text() == "some,other,table\n"
