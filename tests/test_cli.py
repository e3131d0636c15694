"""The command line as a user meets it: exit codes, messages without tracebacks, files and streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ONLINE, batch_spec

CODE = "import sys; sys.argv[0] = 'moeplan'; from moeplan.planner.cli import main; main()"


def moeplan(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(batch_spec(machine="g4dn.16xlarge"))
    return path


def test_compile_then_check(spec: Path) -> None:
    done = moeplan("compile", spec)
    assert done.returncode == 0
    assert "deploy      1 × g4dn.16xlarge" in done.stdout
    assert "tokens/s generated" in done.stdout
    checked = moeplan("check", spec)
    assert checked.returncode == 0
    assert "are current" in checked.stdout
    assert "nothing changed" in moeplan("compile", spec).stdout


def test_check_tells_drift_and_shows_it(spec: Path) -> None:
    moeplan("compile", spec)
    report = spec.parent / "job.plan" / "report.md"
    report.write_text(report.read_text().replace("# job", "# my job"))
    refused = moeplan("compile", spec)
    assert refused.returncode == 2
    assert "report.md: edited by hand\n  hint: --force replaces them" in refused.stderr
    done = moeplan("check", spec, "--diff")
    assert done.returncode == 1
    assert "report.md: edited by hand" in done.stderr
    assert "-# my job\n+# job\n" in done.stdout
    spec.write_text(spec.read_text().replace("2000", "3000"))
    done = moeplan("check", spec)
    assert done.returncode == 1
    assert "plan.json: stale" in done.stderr
    assert "hint: moeplan compile" in done.stderr


def test_simulate(tmp_path: Path) -> None:
    spec, trace = tmp_path / "spec.yaml", tmp_path / "t.csv"
    spec.write_text(ONLINE + "market: {clouds: [gcp], gpus: [H100]}\n")
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,400,30\n0.5,300,20\n2,100,10\n")
    compiled = moeplan("compile", spec)
    assert "simulated   SLO kept for" in compiled.stdout
    done = moeplan("simulate", tmp_path / "chat.plan", "--requests", trace, "--rate", "3/s")
    assert done.returncode == 0
    assert "chat: 3 requests at 3/s (planned for 8/s)" in done.stdout
    refused = moeplan("simulate", tmp_path / "chat.plan", "--requests", tmp_path / "none.csv")
    assert refused.returncode == 2
    assert "No such file" in refused.stderr


def test_check_of_a_folder_that_is_not_there(spec: Path) -> None:
    done = moeplan("check", spec)
    assert done.returncode == 1
    assert "plan.json: missing" in done.stderr
    assert not (spec.parent / "job.plan").exists()


def test_bad_spec_exits_2(spec: Path) -> None:
    spec.write_text(spec.read_text().replace("requests", "request").replace("mixtral-8x7b", "mixtral-8x7c"))
    done = moeplan("compile", spec, cwd=spec.parent)
    assert done.returncode == 2
    assert "unknown key 'request' in workload.batch" in done.stderr
    assert not list(spec.parent.glob("*.plan"))


def test_unknown_names_come_with_the_nearest(spec: Path) -> None:
    spec.write_text(batch_spec(machine="g4dn.16xlrge", model="mixtral-8x7c"))
    done = moeplan("compile", spec)
    assert done.returncode == 2
    assert (
        "no model named 'mixtral-8x7c' in the catalog [unknown-model]\n  hint: did you mean 'mixtral-8x7b'?"
        in done.stderr
    )
    assert "did you mean 'g4dn.16xlarge'?" in done.stderr


def test_unknown_gpu_and_region(spec: Path) -> None:
    spec.write_text(ONLINE + "market: {gpus: [T44], regions: [aws/us-east-9], quota: {H1000: 3}}\n")
    done = moeplan("compile", spec)
    assert done.returncode == 2
    assert "spec.yaml:10:17: the catalog has no offer for gpu 'T44'" in done.stderr
    assert "no offer for region 'aws/us-east-9'" in done.stderr
    assert "no offer for gpu 'H1000'" in done.stderr


def test_more_memory_than_the_machine_has(spec: Path) -> None:
    spec.write_text(batch_spec(machine="{name: cpu-2core, memory: 100 GiB}"))
    done = moeplan("compile", spec)
    assert done.returncode == 2
    assert "100.0 GiB is more than cpu-2core has [too-much-memory]\n  hint: it has 24.0 GiB" in done.stderr


def test_infeasible_exits_3_and_names_the_constraint(spec: Path) -> None:
    spec.write_text(batch_spec(machine="g4dn.xlarge", model="deepseek-v3"))
    done = moeplan("compile", spec)
    assert done.returncode == 3
    assert "of gpu memory" in done.stderr
    assert "hint:" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["compile", "absent.yaml"], ["compile", "."], ["check", "absent.yaml"]]
)
def test_files_that_cannot_be_read(tmp_path: Path, arguments: list[str]) -> None:
    done = moeplan(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert ": " in done.stderr


def test_output_that_cannot_be_written(spec: Path) -> None:
    (spec.parent / "file").write_text("")
    done = moeplan("compile", spec, "-o", spec.parent / "file" / "plan")
    assert done.returncode == 2
    assert "Not a directory" in done.stderr


def test_json_is_the_plan(spec: Path) -> None:
    done = moeplan("compile", spec, "--json")
    assert done.stdout == (spec.parent / "job.plan" / "plan.json").read_text()
    assert json.loads(done.stdout)["format"] == 1


def test_dump_ir_and_time_passes(spec: Path) -> None:
    done = moeplan("compile", spec, "--dump-ir", spec.parent / "ir", "--time-passes")
    names = sorted(path.name for path in (spec.parent / "ir").iterdir())
    levels = [
        "spec",
        "inputs",
        "workload",
        "rooflines",
        "policies",
        "micro-batches",
        "profile",
        "fleet",
        "schedules",
        "placement",
    ]
    assert names == [f"{number}-{level}.json" for number, level in enumerate(levels)]
    assert all(json.loads(path.read_text()) is not None for path in (spec.parent / "ir").iterdir())
    assert [line.split()[-1] for line in done.stderr.splitlines()] == levels


def test_machine_option_replaces_the_machine(spec: Path) -> None:
    box = spec.parent / "box.yaml"
    box.write_text(
        "name: box\nprovenance: calibrated\n"
        "cpu: {cores: 4, flops_per_s: {float32: 4.0e+11, bf16: 4.0e+11}, launch_s: 5.0e-6}\n"
        "dram: {bytes: 64000000000, bytes_per_s: 4.0e+10}\n"
        "disk: {bytes: 500000000000, bytes_per_s: 3.0e+9}\n"
    )
    done = moeplan("compile", spec, "--machine", box)
    assert done.returncode == 0, done.stderr
    assert "1 × box (owned), from disk" in done.stdout
    assert "[calibrated]" in done.stdout
    bad = moeplan("compile", spec, "--machine", spec.parent / "absent.yaml")
    assert bad.returncode == 2
    assert "absent.yaml" in bad.stderr


def test_run_without_a_runnable_replica(spec: Path) -> None:
    spec.write_text(ONLINE)
    moeplan("compile", spec)
    plan = spec.parent / "chat.plan"
    done = moeplan("run", plan, "--input", "a", "--output", "b")
    assert done.returncode == 2
    assert "holds no replica for runtime_min\n  hint: replicas under vLLM are deployed with" in done.stderr


def test_running_a_gpu_plan_says_what_this_version_does(spec: Path) -> None:
    moeplan("compile", spec)
    options = ["--checkpoint", spec.parent, "--input", spec, "--output", spec.parent / "answers.jsonl"]
    done = moeplan("run", spec.parent / "job.plan", *options)
    assert done.returncode == 2
    assert "finds none here" in done.stderr
    assert "--rehearse" in done.stderr


@pytest.mark.parametrize("what", ["models", "gpus", "machines", "offers", "sources"])
def test_catalog_lists(what: str) -> None:
    done = moeplan("catalog", what)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 10


def test_catalog_does_not_know_other_lists() -> None:
    done = moeplan("catalog", "fruits")
    assert done.returncode == 2
    assert "models, gpus, machines, offers, sources" in done.stderr


def test_schema_is_json() -> None:
    assert json.loads(moeplan("schema").stdout)["title"] == "moeplan spec"


def test_own_catalog_entries_override(spec: Path) -> None:
    folder = spec.parent / "own"
    folder.mkdir()
    (folder / "offers.csv").write_text(
        "cloud,region,instance,on_demand_usd_per_hour,spot_usd_per_hour,date,source\n"
        "aws,us-east-1,g4dn.16xlarge,4.352,,2026-11-01,own price list\n"
    )
    spec.write_text(batch_spec() + "catalog: own\nmarket: {purchase: on-demand, clouds: [aws], gpus: [T4]}\n")
    done = moeplan("compile", spec, "--json")
    assert done.returncode == 0, done.stderr
    offered = {other["column"] for other in json.loads(done.stdout)["fleet"]["alternatives"]}
    assert "batch-g4dn-16xlarge-on-demand-offload" in offered


def test_version() -> None:
    assert moeplan("--version").stdout.startswith("moeplan 0.")


def test_a_foreign_file_is_never_replaced(spec: Path) -> None:
    folder = spec.parent / "mine"
    folder.mkdir()
    (folder / "report.md").write_text("precious\n")
    done = moeplan("compile", spec, "-o", folder)
    assert done.returncode == 2
    assert "report.md: not written by moeplan" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["report.md"]
    assert moeplan("compile", spec, "-o", folder, "--force").returncode == 0


def test_a_pinned_machine_is_one_machine(spec: Path) -> None:
    """More requests than it can serve is an answer with a figure, not a second machine."""
    spec.write_text(ONLINE.replace("rate: 8/s", "rate: 800/s") + "machine: a2-ultragpu-1g\n")
    done = moeplan("compile", spec)
    assert done.returncode == 3
    assert "the rate leaves no fleet for the online work" in done.stderr
    assert "one machine, loaded to 100%, serves" in done.stderr


def test_what_cannot_be_executed_is_not_rented(spec: Path) -> None:
    """Offloaded GPU replicas are listed with their price, and chosen only where nothing else can work."""
    spec.write_text(batch_spec() + "market: {gpus: [T4, L4]}\n")
    done = moeplan("compile", spec)
    assert ", under vLLM" in done.stdout
    report = (spec.parent / "job.plan" / "report.md").read_text()
    assert "-offload" in report
    assert "predicted only" in report


def test_compile_from_an_earlier_plan(tmp_path: Path) -> None:
    """What runs is read from a plan whose digest is in the lock; where there is none, that it is wrong."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(ONLINE + "market: {clouds: [gcp], gpus: [H100, A100-80GB], purchase: on-demand}\n")
    old, new = tmp_path / "old", tmp_path / "new"
    assert moeplan("compile", spec, "-o", old).returncode == 0
    assert moeplan("compile", spec, "-o", new, "--from", old).returncode == 0
    locks = [json.loads((folder / "moeplan.lock").read_text()) for folder in (old, new)]
    assert locks[1]["inputs"].keys() - locks[0]["inputs"].keys() == {"previous"}
    assert [lock["solver"]["gap"] for lock in locks] == [0.0, 0.0]
    fleets = [json.loads((folder / "plan.json").read_text())["fleet"]["choices"] for folder in (old, new)]
    assert fleets[0] == fleets[1]
    missing = moeplan("compile", spec, "--from", tmp_path / "nowhere")
    assert missing.returncode == 2
    assert "nowhere/plan.json: no plan can be read here: FileNotFoundError" in missing.stderr
