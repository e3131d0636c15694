"""Flags of engines: only those that the recorded versions have.

The records in flags/ were read out of the published packages, see tests/external/record_flags.py.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ONLINE, batch_spec

from moeplan.codegen import vllm
from moeplan.codegen.emit import emit_all, llama_cpp
from moeplan.planner.ir.plan import Plan

Compile = Callable[[str], Plan]
SPECS = {
    "online": ONLINE + "market: {clouds: [gcp], purchase: spot}\n",
    "fp8": ONLINE.replace("qwen3-30b-a3b", "{name: qwen3-30b-a3b, quantize: fp8}") + "market: {gpus: [L4]}\n",
    "fp16": batch_spec(more=", deadline: 8h") + "market: {gpus: [T4], clouds: [aws]}\n",
}


def recorded(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((Path(__file__).parent / "flags" / f"{name}.json").read_text())
    return record


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<=\s)(--?[a-z][a-z-]*)", text))


@pytest.fixture(params=SPECS)
def plan(request: pytest.FixtureRequest, compile_text: Compile) -> Plan:
    return compile_text(SPECS[request.param])


def test_files_install_the_recorded_version() -> None:
    assert recorded("vllm")["version"] == vllm.VERSION


def test_vllm_has_every_flag(plan: Plan) -> None:
    """In every generated file that starts it, however it is started."""
    record, seen = recorded("vllm"), 0
    for text in emit_all(plan).values():
        for command in re.findall(r"vllm (serve|run-batch)((?:[^\n]*\\\n)*[^\n`]*)", text):
            used = flags(command[1])
            assert used <= set(record[command[0]])
            assert {"--tensor-parallel-size", "--max-model-len"} <= used
            values = re.findall(r"--quantization (\S+)", command[1])
            assert set(values) <= set(record["quantization"])
            seen += 1
    assert seen


def test_fp8_only_where_planned(compile_text: Compile) -> None:
    """The spec allows it, the plan takes it, and the pinned vLLM knows its name."""
    for name, planned in (("fp8", True), ("online", False)):
        plan = compile_text(SPECS[name])
        assert any(c.column.policy.weights_dtype == "fp8" for c in plan.fleet.choices) == planned
        text = "".join(emit_all(plan).values())
        assert ("--quantization fp8_per_tensor" in text) == planned


def test_vllm_takes_what_the_plan_counts_with(plan: Plan) -> None:
    for replica in plan.replicas:
        policy = replica.policy
        text = " ".join(vllm.vllm_arguments(plan, policy))
        values = dict(re.findall(r"--([a-z-]+) (\S+)", text))
        longest = plan.workload.request_class(policy.serves).context_tokens_max
        assert int(values["tensor-parallel-size"]) * int(values["data-parallel-size"]) == policy.machine.gpus
        assert (int(values["max-num-seqs"]), int(values["max-model-len"])) == (policy.sequences, longest)
        assert int(values["max-num-batched-tokens"]) >= policy.sequences  # less is refused at start
        assert values["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[policy.dtype]


@pytest.mark.parametrize("machine", ["g4dn.16xlarge", "gr6.8xlarge", "n1-custom-64-425984+4xT4"])
def test_llama_cpp_has_every_flag(compile_text: Compile, machine: str) -> None:
    ((path, text),) = llama_cpp.emit(compile_text(batch_spec(machine=machine))).items()
    assert path.endswith(".sh")
    assert flags(text) <= set(recorded("llama_cpp")["flags"]) | {"--model"}
    assert len(flags(text)) > 6


def test_llama_cpp_keeps_no_more_experts_on_the_gpu_than_planned(compile_text: Compile) -> None:
    plan = compile_text(batch_spec(machine="gr6.8xlarge"))
    (replica,) = plan.replicas
    layers = plan.workload.model.layers
    cpu_layers = int(re.search(r"--n-cpu-moe (\d+)", llama_cpp.llama_arguments(plan, replica)[0])[1])  # type: ignore[index]
    assert (layers - cpu_layers) / layers <= replica.policy.resident_share
    assert (layers - cpu_layers + 1) / layers > replica.policy.resident_share


def test_llama_cpp_only_for_owned_offloaded_machines(compile_text: Compile) -> None:
    assert llama_cpp.emit(compile_text(SPECS["online"])) == {}


def test_the_script_says_how_it_is_used(compile_text: Compile, tmp_path: Path) -> None:
    (text,) = llama_cpp.emit(compile_text(batch_spec(machine="g4dn.16xlarge"))).values()
    (tmp_path / "server.sh").write_text(text)
    done = subprocess.run(["sh", tmp_path / "server.sh"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "MODEL.gguf" in done.stderr
    (tmp_path / "llama-server").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "llama-server").chmod(0o755)
    command = ["sh", tmp_path / "server.sh", "my model.gguf", "--port", "80"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    said = done.stdout.splitlines()
    assert said[:4] == ["--model", "my model.gguf", "--port", "80"]
    assert set(said[4:]) >= {"--n-cpu-moe", "--parallel", "--threads"}
