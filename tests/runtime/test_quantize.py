"""Checkpoints in fewer bits: written, resumed, planned, run; the answers are those of what they stand for."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import moeplan
from safetensors import safe_open
from safetensors.torch import save_file

from moeplan.codegen.emit.runtime import model_plan
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.model import PACKED_BYTES
from moeplan.planner.model_config import load_model
from moeplan.runtime_min import quantize as quantizing
from moeplan.runtime_min.__main__ import main
from moeplan.runtime_min.checkpoint import CheckpointError
from moeplan.runtime_min.engine import Generation
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.formats import PACKINGS
from moeplan.runtime_min.model_config import read_config
from moeplan.runtime_min.packing import Packed, _packer, packed, plain
from moeplan.runtime_min.plan_file import STORED_BYTES, load
from moeplan.runtime_min.quantize import quantize
from moeplan.runtime_min.stream import Engine

from .folders import GREEDY, Shape, make_plan, save_checkpoint, write_plan

_packer()  # compiled, though schedules here run as plain Python
SHAPES = {
    "mixtral": Shape(hidden=64, inner=128, heads=4, kv_heads=2),
    "llama": Shape(kind="llama", experts=1, top=1, hidden=64, inner=128),
}
SPEC = """\
name: job
model: {path: checkpoint, dtype: bf16}
workload: {batch: {requests: 4, prompt: 40, output: 8}}
machine: cpu-2core
"""


def tensors(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def make(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    folder.mkdir()
    save_checkpoint(folder, SHAPES[name])
    path = folder / "model.safetensors"
    save_file({key: value.to(dtype) for key, value in tensors(folder).items()}, path)
    return folder


def experts(found: dict[str, Any]) -> set[str]:
    return {name for name, value in found.items() if value.dtype == torch.uint8}


def test_planner_and_runtime_count_the_same_bytes() -> None:
    assert STORED_BYTES == PACKED_BYTES == {name: STORED_BYTES[name] for name in PACKINGS}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", PACKINGS)
def test_experts_are_packed_and_the_rest_is_as_it_was(kind: str, name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "a", kind)
    assert main(["quantize", str(source), str(tmp_path / "b"), "--to", name]) == 0
    before, after = tensors(source), tensors(tmp_path / "b")
    assert before.keys() == after.keys()
    shape = SHAPES[kind]
    assert len(experts(after)) == 3 * shape.layers * shape.experts
    for key, value in before.items():
        if key in experts(after):
            assert torch.equal(after[key], packed(value, PACKINGS[name]).data)
        else:
            assert torch.equal(after[key], value)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "moeplan", "format": name}
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is stopped at every point where progress is told, several shards and several chunks a tensor."""
    monkeypatch.setattr(quantizing, "_SHARD_BYTES", 60_000)
    monkeypatch.setattr(quantizing, "_CHUNK_BYTES", 5_000)
    monkeypatch.setattr(quantizing, "_PACKED_BYTES", 3_000)
    source = make(tmp_path / "a", "mixtral")
    calls: list[int] = []
    quantize(source, tmp_path / "whole", "int4", lambda done, total: calls.append(done))
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3

    class KilledError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError

    attempts = 0
    while not (tmp_path / "killed" / "config.json").exists():
        attempts += 1
        left = attempts % 7 + 20
        with suppress(KilledError):
            quantize(source, tmp_path / "killed", "int4", stop)
    assert attempts > 3
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == files
    for name in files:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("name", PACKINGS)
def test_tensors_may_lie_anywhere_in_their_file(name: str, tmp_path: Path) -> None:
    """A header of odd length puts all values across their size."""
    source = make(tmp_path / "a", "mixtral")
    quantize(source, tmp_path / "b", name)
    file = source / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    odd = header + b" " * (1 + len(header) % 2)
    file.write_bytes(len(odd).to_bytes(8, "little") + odd + data[8 + size :])
    quantize(source, tmp_path / "c", name)
    assert tensors(tmp_path / "b").keys() == tensors(tmp_path / "c").keys()
    for key, value in tensors(tmp_path / "b").items():
        assert torch.equal(value, tensors(tmp_path / "c")[key])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PACKINGS)
def test_a_plan_for_it_answers_as_the_unpacked_checkpoint(name: str, compiled: bool, tmp_path: Path) -> None:
    """The weights it stands for, written plainly, give the same text; compiled, in processes of their own."""
    source = make(tmp_path / "plain", "mixtral")
    (tmp_path / "packed").mkdir()
    quantize(source, tmp_path / "packed" / "checkpoint", name)
    shapes = {key: value.shape for key, value in tensors(source).items()}
    stand = {
        key: plain(Packed(value, tuple(shapes[key]), PACKINGS[name])) if value.dtype == torch.uint8 else value
        for key, value in tensors(tmp_path / "packed" / "checkpoint").items()
    }
    (tmp_path / "unpacked").mkdir()
    source.rename(tmp_path / "unpacked" / "checkpoint")
    save_file(stand, tmp_path / "unpacked" / "checkpoint" / "model.safetensors")
    answers = [answered(tmp_path / which, compiled) for which in ("packed", "unpacked")]
    assert answers[0] == answers[1]


def answered(folder: Path, compiled: bool) -> str:
    body = {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    lines = [
        json.dumps(
            {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": {**body, "seed": i}}
        )
        for i in range(4)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "spec.yaml").write_text(SPEC)
    done = moeplan("compile", "spec.yaml", "--no-html", cwd=folder)
    assert done.returncode == 0, done.stderr
    files = [f"--input={folder / 'prompts.jsonl'}", f"--output={folder / 'answers.jsonl'}"]
    if compiled:
        done = moeplan("run", folder / "job.plan", *files)
        assert done.returncode == 0, done.stderr
    else:
        (runtime_dir,) = (folder / "job.plan" / "runtime").iterdir()
        assert main(["run", str(runtime_dir), *files]) == 0
    texts = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    return "\n".join(t["response"]["body"]["choices"][0]["text"] for t in texts)


def test_what_cannot_be_packed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    save_checkpoint(odd, Shape(hidden=24, inner=53))
    assert main(["quantize", str(odd), str(tmp_path / "out"), "--to", "int8"]) == 2
    assert "experts.0.w1.weight: has shape [53, 24]; rows must be multiples of 64" in capsys.readouterr().err
    floats = make(tmp_path / "floats", "mixtral", torch.float32)
    with pytest.raises(CheckpointError, match="F32, which bf12 does not take"):
        quantize(floats, tmp_path / "out", "bf12")
    assert not (tmp_path / "out").exists()
    done = make(tmp_path / "bf16", "mixtral")
    quantize(done, tmp_path / "int8", "int8")
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantize(tmp_path / "int8", tmp_path / "again", "int4")
    with pytest.raises(RunError, match="holds something else"):
        quantize(done, tmp_path / "int8", "int4")


def test_values_too_far_apart_for_bf12_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "mixtral")
    found = tensors(folder)
    name = next(key for key in found if ".experts." in key)
    found[name] = torch.where(
        torch.arange(found[name].numel()).view_as(found[name]) % 2 == 0, 1e-30, 1.0
    ).bfloat16()
    save_file(found, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: its values differ too much in size for bf12"):
        quantize(folder, tmp_path / "out", "bf12")


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", PACKINGS)
@pytest.mark.parametrize("resident", [0, 1, 3])
def test_streamed_it_says_what_it_stands_for(kind: str, name: str, resident: int, tmp_path: Path) -> None:
    """No page resident, attention, attention and some experts; in float32, so that scores can be equal."""
    source = make(tmp_path / "plain", kind)
    quantize(source, tmp_path / "packed", name)
    found, small = tensors(source), experts(tensors(tmp_path / "packed"))
    stand = {
        key: plain(packed(value, PACKINGS[name])) if key in small else value for key, value in found.items()
    }
    save_file(stand, source / "model.safetensors")
    model = model_plan(load_model(source, Span("config.json")), "", "float32")
    resident = min(resident, 1 + model.experts - 1)
    said = []
    for folder, packing in ((source, "none"), (tmp_path / "packed", name)):
        plan = make_plan(
            SHAPES[kind], model=replace(model, packing=packing), resident_pages=resident, slots=2, sequences=3
        )
        runtime_dir = write_plan(tmp_path / f"plan-{packing}", plan)
        batch = [Generation([5, 6, 7 + i], 5, GREEDY, top_scored=1) for i in range(3)]
        with Engine(runtime_dir, load(runtime_dir), folder) as engine:
            engine.run(batch)
        said.append([(g.tokens, [scored.logprob for scored in g.scored]) for g in batch])
    assert said[0] == said[1]


def test_a_plan_refuses_a_checkpoint_that_is_packed_otherwise(tmp_path: Path) -> None:
    """By name; and where it is not packed yet, with the command."""
    source = make(tmp_path / "plain", "mixtral")
    quantize(source, tmp_path / "packed", "int4")
    model = model_plan(load_model(source, Span("config.json")), "", "bf16")
    with pytest.raises(
        CheckpointError, match=r"is None, the plan has int8.*`runtime_min quantize --to int8`"
    ):
        read_config(source, replace(model, packing="int8"), 64)
    with pytest.raises(CheckpointError, match=r"'format': 'int4'.*, the plan has int8"):
        read_config(tmp_path / "packed", replace(model, packing="int8"), 64)
    with pytest.raises(CheckpointError, match=r"'format': 'int4'.*, the plan has none"):
        read_config(tmp_path / "packed", model, 64)
