"""The command line as a user meets it: exit codes, messages without tracebacks, files and streams."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import moeplan
from conftest import ONLINE, batch_spec


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
        "analysis",
    ]
    assert names == sorted(f"{number}-{level}.json" for number, level in enumerate(levels))
    assert all(json.loads(path.read_text()) is not None for path in (spec.parent / "ir").iterdir())
    assert [line.split()[-1] for line in done.stderr.splitlines()] == [*levels, "report.html"]


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
    assert "No such command 'fruits'" in done.stderr


def test_new_prices_and_the_plans_made_before(spec: Path) -> None:
    """Prices elsewhere leave the plan: told, and exit code 1 only if --strict. Prices here change it."""
    offers = "cloud,region,instance,on_demand_usd_per_hour,spot_usd_per_hour,date,source\n"
    row = "aws,{},g4dn.metal,{},,{},own price list\n"
    own, new = spec.parent / "own" / "offers.csv", spec.parent / "new.csv"
    own.parent.mkdir()
    own.write_text(offers + row.format("us-east-1", 7.8, "2026-11-01"))
    market = "market: {purchase: on-demand, gpus: [T4], regions: [aws/us-east-1]}\n"
    spec.write_text(batch_spec() + "catalog: own\n" + market)
    assert moeplan("compile", spec).returncode == 0
    for region, price, plain in (("us-west-2", 1, 0), ("us-east-1", 5, 1)):
        new.write_text(offers + row.format(region, price, "2026-11-29"))
        done = moeplan("catalog", "update", "--from", new, "--folder", own.parent)
        assert done.returncode == 0, done.stderr
        checked, strict = moeplan("check", spec), moeplan("check", spec, "--strict")
        assert (checked.returncode, strict.returncode) == (plain, 1)
        older = "older catalog: prices up to 2026-11-01, now up to 2026-11-29"
        assert older in checked.stderr
        assert older in strict.stderr
    assert moeplan("compile", spec).returncode == 0
    assert moeplan("check", spec, "--strict").returncode == 0


def test_prices_that_are_not_there(tmp_path: Path) -> None:
    done = moeplan("catalog", "update", "--from", tmp_path / "none", "--folder", tmp_path / "own")
    assert done.returncode == 2
    assert "hint: SkyPilot writes its folder" in done.stderr
    assert not (tmp_path / "own").exists()


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


def test_diff_of_two_plans(spec: Path) -> None:
    """Markdown for people, JSON for machines, the same numbers in both."""
    moeplan("compile", spec, "-o", spec.parent / "before")
    spec.write_text(spec.read_text().replace("requests: 2000", "requests: 3000"))
    moeplan("compile", spec, "-o", spec.parent / "after")
    done = moeplan("diff", spec.parent / "before", spec.parent / "after" / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "| **work** | batch requests | 2,000 | 3,000 | +50 % |" in done.stdout
    told = json.loads(moeplan("diff", spec.parent / "before", spec.parent / "after", "--json").stdout)
    requests = next(change for change in told["changes"] if change["what"] == "batch requests")
    assert (requests["before"], requests["after"], requests["ratio"]) == (2000, 3000, 1.5)


def test_diff_of_what_is_no_plan(spec: Path) -> None:
    done = moeplan("diff", spec.parent, spec)
    assert done.returncode == 2
    assert "hint: give a plan folder, or a plan.json" in done.stderr


def test_explain_what_if_and_why_not(spec: Path) -> None:
    """Text names the setting, JSON holds the figures of both plans, a bad setting is told by its option."""
    spec.write_text(ONLINE + "market: {gpus: [H100], clouds: [gcp], purchase: spot}\n")
    done = moeplan("explain", spec, "--what-if", "workload.online.rate=80/s")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("what if: workload.online.rate=80/s\nUSD per hour ")
    told = json.loads(moeplan("explain", spec, "--why-not", "A100", "--why-not", "V100", "--json").stdout)
    assert [answer["settings"] for answer in told] == [["market.gpus=[A100]"], ["market.gpus=[V100]"]]
    assert any(change["what"] == "USD per hour" for change in told[0]["changes"])
    bad = moeplan("explain", spec, "--what-if", "workload.online.rate=80")
    assert bad.returncode == 2
    assert bad.stderr.startswith("--what-if 'workload.online.rate=80':1:22: ")


def test_explain_alone(spec: Path) -> None:
    spec.write_text(ONLINE + "market: {machines: [a3-highgpu-1g, a2-ultragpu-1g], purchase: spot}\n")
    done = moeplan("explain", spec)
    assert done.returncode == 0, done.stderr
    for part in (
        "bottleneck of online-",
        "why this GPU",
        "in flight on each copy",
        "what binds",
        "sensitivity",
    ):
        assert part in done.stdout
    assert "a2-ultragpu-1g spot" in done.stdout


def test_explain_without_a_plan(spec: Path) -> None:
    spec.write_text(batch_spec(machine="g4dn.xlarge", model="deepseek-v3"))
    done = moeplan("explain", spec)
    assert done.returncode == 3
    assert "of gpu memory" in done.stderr


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}


def checkpoint_spec(folder: Path, machine: str, **changes: object) -> Path:
    """A spec for a checkpoint of Mixtral's architecture, `changes` made to its config.json."""
    (folder / "ours").mkdir()
    (folder / "ours" / "config.json").write_text(json.dumps(MIXTRAL | changes))
    text = batch_spec(machine=machine).replace("model: mixtral-8x7b", "model: {path: ours}")
    (folder / "spec.yaml").write_text(text)
    return folder / "spec.yaml"


def test_a_checkpoint_that_the_runtime_would_refuse_is_refused_at_once(tmp_path: Path) -> None:
    done = moeplan("compile", checkpoint_spec(tmp_path, "cpu-2core", hidden_act="gelu", rope_theta=-1))
    assert done.returncode == 3
    assert done.stderr.startswith(f"{tmp_path / 'spec.yaml'}:")
    assert "the bundled runtime does not run ours: " in done.stderr
    assert "ours/config.json: hidden_act is 'gelu'" in done.stderr
    assert "ours/config.json: rope_theta is -1, expected a positive number" in done.stderr
    assert not (tmp_path / "job.plan").exists()


def test_a_checkpoint_that_only_vllm_runs_is_planned_for_vllm(tmp_path: Path) -> None:
    done = moeplan("compile", checkpoint_spec(tmp_path, "g4dn.16xlarge", hidden_act="gelu"))
    assert done.returncode == 0
    plan = json.loads((tmp_path / "job.plan" / "plan.json").read_text())
    assert [replica["policy"]["engine"] for replica in plan["replicas"]] == ["vllm"]
    assert [refused["constraint"] for refused in plan["rejections"]] == ["engine"]
    assert not (tmp_path / "job.plan" / "runtime").exists()


def test_a_checkpoint_that_the_runtime_runs(tmp_path: Path) -> None:
    done = moeplan("compile", checkpoint_spec(tmp_path, "cpu-2core"))
    assert done.returncode == 0
    assert (tmp_path / "job.plan" / "runtime").is_dir()


def test_compile_from_an_earlier_plan(tmp_path: Path) -> None:
    """The fleet of an earlier plan is read and its digest locked; a folder without a plan is bad input."""
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
