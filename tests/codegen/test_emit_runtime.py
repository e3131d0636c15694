"""runtime.json: the planner's memory items against the runtime's own count, digests, and refusals."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import batch_spec

from moeplan.codegen.emit import runtime
from moeplan.planner.ir.plan import Plan
from moeplan.planner.pipeline import compile_plan
from moeplan.planner.strategies import offload
from moeplan.planner.strategies.offload_search import Sharing, sharings
from moeplan.runtime_min import plan_file
from moeplan.runtime_min.checkpoint import TensorRef
from moeplan.runtime_min.lanes import load_schedule
from moeplan.runtime_min.limits import check_offload, check_supported
from moeplan.runtime_min.model_config import Latent, ModelConfig
from moeplan.runtime_min.models.tensors import tensor_parts
from moeplan.runtime_min.offload_memory import Buffers, Experts, check_device_and_host
from moeplan.runtime_min.shares import Share, parts_of, plan_of

Compile = Callable[[str], Plan]

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "vocab_size": 333,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def emitted(
    tmp_path: Path,
    compile_text: Compile,
    dtype: str,
    memory: str,
    requests: int = 300,
    **changes: int | str,
) -> Path:
    """Compile a small Mixtral for a two-core box and write its runtime folder."""
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, "torch_dtype": "bfloat16", **changes}))
    text = (
        f"name: small\nmodel: {{path: config.json, dtype: {dtype}}}\n"
        f"workload: {{batch: {{requests: {requests}, prompt: 50, output: 20}}}}\n"
        f"machine: {{name: cpu-2core, memory: {memory}}}\n"
    )
    for path, content in runtime.emit(compile_text(text)).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content)
    return tmp_path / "runtime" / "batch-cpu-2core-owned"


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("memory", ["2 GiB", "700 MiB"])
@pytest.mark.parametrize("inner", [136, 7000])
def test_memory_items_cover_what_the_runtime_counts(
    tmp_path: Path, compile_text: Compile, dtype: str, memory: str, inner: int
) -> None:
    """plan_file's own functions, written for the runtime, never exceed the planner's items."""
    plan = plan_file.load(emitted(tmp_path, compile_text, dtype, memory, intermediate_size=inner))
    held = plan.memory
    assert plan_file.weights_bytes(plan.model, plan.pages) == held.weights_bytes
    assert plan_file.kv_bytes(plan.model, plan.batch) == held.kv_bytes
    assert plan_file.workspace_bytes(plan.model, plan.batch, plan.pages) == held.workspace_bytes
    assert plan_file.slot_bytes(plan.model, plan.pages, 2) <= plan.pages.slot_bytes or not plan.pages.slots
    assert plan.pages.slots * plan.pages.slot_bytes == held.slots_bytes
    items = asdict(held)
    assert sum(items.values()) - items["budget_bytes"] <= items["budget_bytes"]


def test_a_changed_schedule_is_refused(tmp_path: Path, compile_text: Compile) -> None:
    folder = emitted(tmp_path, compile_text, "float32", "2 GiB")
    with (folder / "schedule.py").open("a") as file:
        file.write("# edited\n")
    with pytest.raises(plan_file.PlanFileError, match=r"schedule\.py: is not the schedule"):
        plan_file.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "has format 1"),
        ({"schedule": {"kind": "stream", "format": 9, "sha256": "0"}}, "has format 9"),
        ({"threads": "two"}, "threads is 'two'"),
        ({"threads": True}, "threads is True"),
        ({"extra": 1}, "extra is unknown"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"model": []}, "expected an object"),
    ],
)
def test_a_broken_plan_file_is_named(
    tmp_path: Path, compile_text: Compile, change: dict[str, object], message: str
) -> None:
    folder = emitted(tmp_path, compile_text, "float32", "2 GiB")
    data = json.loads((folder / "runtime.json").read_text())
    (folder / "runtime.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(plan_file.PlanFileError, match=message):
        plan_file.load(folder)


def test_gpu_plans_say_accelerator(compile_text: Compile) -> None:
    files = runtime.emit(compile_text(batch_spec(machine="g4dn.16xlarge")))
    data = json.loads(next(text for path, text in files.items() if path.endswith("runtime.json")))
    assert (data["device"], data["schedule"]["kind"]) == ("accelerator", "offload")


PLAIN = ModelConfig(norm_eps=1e-5, rope_theta=1e4, tied=False, eos=frozenset())
_SIZES = Latent(query=0, kv=512, plain=128, rotated=64, value=128, score_scale=1.0)
LATENT = replace(PLAIN, latent=_SIZES, dense=frozenset({0}))


HOSTS = [
    ("mixtral-8x7b", "g4dn.16xlarge", 1, PLAIN),
    ("mixtral-8x7b", "gr6.8xlarge", 1, PLAIN),
    # The hosts of MoE-Lightning's settings S6 and S7 (arXiv 2411.11217, section 5) with its models.
    ("mixtral-8x22b", "n1-custom-64-425984+2xT4", 2, PLAIN),
    ("mixtral-8x22b", "n1-custom-64-425984+4xT4", 4, PLAIN),
    ("dbrx", "n1-custom-64-425984+2xT4", 2, PLAIN),
    ("dbrx", "n1-custom-64-425984+4xT4", 4, PLAIN),
    ("qwen3-30b-a3b", "g2-standard-24", 2, PLAIN),
    ("deepseek-v2-lite", "g4dn.16xlarge", 1, LATENT),
    ("deepseek-v2-lite", "gr6.8xlarge", 1, LATENT),
]


@pytest.mark.parametrize(("model", "machine", "gpus", "config"), HOSTS)
@pytest.mark.parametrize("form", ["width", "whole"])
def test_the_runtime_counts_no_more_than_an_offload_plan_has(
    tmp_path: Path,
    form: str,
    model: str,
    machine: str,
    gpus: int,
    config: ModelConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights and cache to the byte; with all else that a rank allocates, within its part of the budget."""
    if gpus == 1 and form == "whole":
        pytest.skip("one GPU has all of every expert")

    def allowed(*given: Any) -> list[Sharing]:
        return [way for way in sharings(*given) if way == Sharing(gpus, form == "whole")]

    monkeypatch.setattr(offload, "sharings", allowed)
    found = compile_plan(batch_spec(model=model, machine=machine), "spec.yaml")
    for path, content in runtime.emit(found).items():
        (tmp_path / Path(path).name).write_text(content)
    plan = plan_file.load(tmp_path)
    assert (plan.offload.gpus, plan.offload.expert_shares) == (gpus, form)
    check_supported(tmp_path, plan)
    check_offload(tmp_path, plan)
    monkeypatch.setitem(sys.modules, "numba", None)  # of the schedule only the constants are looked at
    constants = load_schedule(tmp_path, plan).SCHEDULE
    parts = tensor_parts(plan.model, config)
    refs = {n: TensorRef(n, Path(), 0, 2 * math.prod(p.shape), "BF16", p.shape) for n, p in parts.items()}
    weights = cache = 0
    for rank in range(gpus):
        share = Share(rank, gpus)
        shapes = {name: ref.shape for name, ref in parts_of(refs, plan, config, share).items()}
        own = plan_of(plan, share)
        experts, buffers = Experts(own, constants.pages), Buffers(own, constants)
        check_device_and_host(tmp_path, own, experts, buffers, shapes)
        weights += plan.model.moe_layers * experts.host_bytes
        cache += math.prod(buffers.cache(plan.model.layers, buffers.host_places))
    assert weights == plan.memory.weights_bytes
    assert plan_file.ITEM_BYTES[plan.model.compute_dtype] * cache == plan.memory.kv_bytes


@pytest.mark.parametrize(("inner", "requests", "threads"), [(136, 1, 1), (14336, 300, 2)])
def test_tiny_operators_run_on_one_thread(
    tmp_path: Path, compile_text: Compile, inner: int, requests: int, threads: int
) -> None:
    """Sharing them saves too little to depend on a second core that may be busy."""
    folder = emitted(tmp_path, compile_text, "float32", "2 GiB", requests, intermediate_size=inner)
    assert plan_file.load(folder).threads == threads
