"""NVIDIA AIConfigurator's table of measured serving runs -> groups of rows that moeplan can predict.

Labels are repaired by two rules that look at labels only, never at the measured times:
- The table's parallel degrees often count one set of GPUs twice: a run named `tp4_ep4` (four GPUs that share
  attention and hold a quarter of the experts each) carries 16 GPUs, as tp 16 with moe_tp 4 x moe_ep 4 or as
  tp 4 x attention_dp 4. Where the degrees are a square of this kind, one factor is dropped.
- Rows on more than eight GPUs of one box, and rows whose weights do not fit the labelled GPUs, are left out.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tables import read_rows
from workloads import workload_of

from moeplan.planner import costs
from moeplan.planner.catalog import Catalog, load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.machine import Level
from moeplan.planner.ir.model import Model
from moeplan.planner.ir.workload import Workload
from moeplan.planner.model_config import model_from_config
from moeplan.planner.serving import Sharding, kv_copies

MOST_GPUS = 8

# Shapes that the catalog lacks, from the published config.json files, in the words of a type it has.
_GQA = {"model_type": "glm4_moe", "first_k_dense_replace": 0, "n_shared_experts": 0}
_CONFIGS: dict[str, dict[str, object]] = {
    "MiniMaxAI/MiniMax-M2.5": _GQA
    | {"hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8}
    | {"head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 1536}
    | {"vocab_size": 200064},
    "Qwen/Qwen3.5-397B-A17B": _GQA
    | {"hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32, "num_key_value_heads": 2}
    | {"head_dim": 256, "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1024}
    | {"n_shared_experts": 1, "vocab_size": 248320},
    "zhipuai/GLM-5": {"model_type": "deepseek_v3", "first_k_dense_replace": 3, "n_shared_experts": 1}
    | {"hidden_size": 6144, "num_hidden_layers": 78, "num_attention_heads": 64, "q_lora_rank": 2048}
    | {"kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256}
    | {"intermediate_size": 12288, "moe_intermediate_size": 2048, "n_routed_experts": 256}
    | {"num_experts_per_tok": 8, "vocab_size": 154880},
    "nvidia/Qwen3-32B-NVFP4": {"model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64}
    | {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    | {"intermediate_size": 25600, "vocab_size": 151936, "tie_word_embeddings": False},
}
_CATALOG = {
    "Qwen/Qwen3-235B-A22B-FP8": "qwen3-235b-a22b",
    "deepseek-ai/DeepSeek-R1": "deepseek-v3",
    "deepseek-ai/DeepSeek-V3": "deepseek-v3",
    "nvidia/DeepSeek-R1-NVFP4": "deepseek-v3",
    "nvidia/DeepSeek-V3.1-NVFP4": "deepseek-v3",
    "moonshotai/Kimi-K2.5": "kimi-k2",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
    "openai/gpt-oss-120b": "gpt-oss-120b",
}
_STORED_BYTES = {"": 2.0, "bf16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625}
_QUANTISED = ("fp8", "nvfp4")
_GPUS = {"h100_sxm": "H100", "h200_sxm": "H200", "b200_sxm": "B200"}
# Boxes that the catalog lacks, as B200 with more memory (and no other difference).
_LARGER_B200 = {"b300_sxm": 288e9, "gb200": 186e9, "gb300": 288e9}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows that differ in load only: arrays of one element per row."""

    model_path: str
    system: str
    engine: str
    workload: Workload
    gpu: Level
    peer_bytes_per_s: float
    sharding: Sharding
    rows: tuple[str, ...]
    batch: NDArray[np.float64]
    prompt: NDArray[np.float64]
    output: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    itl_s: NDArray[np.float64]

    @property
    def family(self) -> str:
        """Models of one architecture are left out together."""
        return "deepseek-v3" if "DeepSeek" in self.model_path else self.model_path

    @property
    def dense(self) -> bool:
        return not self.workload.model.experts


def read_groups(path: Path) -> tuple[list[Group], int]:
    """The aggregated (one pool) rows of the table, grouped, and how many were left out by the rules."""
    catalog = load_catalog(None, Span("catalog"))
    bins: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in read_rows(path):
        if row["mode"] == "agg" and float(row["silicon_tpot_ms"] or 0) > 0 and row["pp_size"] in ("", "1"):
            sharding = shards(row)
            quant = row["gemm_quant_mode"], row["moe_quant_mode"]
            cut = str(sharding.tensor), str(sharding.groups)
            bins[row["model_path"], row["system"], row["backend"], *quant, *cut].append(row)
    groups = [_group(catalog, key, rows) for key, rows in sorted(bins.items())]
    kept = [group for group in groups if group.sharding.gpus <= MOST_GPUS and _room(group) > 0]
    dropped = sum(len(group.rows) for group in groups) - sum(len(group.rows) for group in kept)
    return kept, dropped


def shards(row: dict[str, str]) -> Sharding:
    """The row's parallel degrees, a set of GPUs that is counted twice counted once."""
    tensor, groups, moe_tensor, experts = (
        int(float(row[key] or 1)) for key in ("tp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
    )
    if moe_tensor == experts > 1 and tensor * groups == experts * experts:
        return Sharding(tensor=experts) if groups == 1 else Sharding(tensor=1, groups=experts)
    if tensor == groups > 1 and experts == tensor * groups:
        return Sharding(tensor=tensor)
    return Sharding(tensor=tensor, groups=groups)


def _group(catalog: Catalog, key: tuple[str, ...], rows: list[dict[str, str]]) -> Group:
    model_path, system, engine, other, experts, tensor, groups = key
    machine = catalog.machines[f"{_machine(catalog, _GPUS.get(system, 'B200'))}"]
    gpu = machine.level("gpu")
    sharding = Sharding(tensor=int(tensor), groups=int(groups))

    def column(name: str) -> NDArray[np.float64]:
        return np.array([float(row[name]) for row in rows])

    concurrency = column("batch_size") * np.array([int(float(r["attention_dp_size"] or 1)) for r in rows])
    return Group(
        model_path=model_path,
        system=system,
        engine=engine,
        workload=_workload(
            catalog, _model(catalog, model_path, other, experts), engine == "trtllm" and other in _QUANTISED
        ),
        gpu=replace(gpu, bytes=int(_LARGER_B200.get(system, gpu.bytes))),
        peer_bytes_per_s=machine.peer_bytes_per_s,
        sharding=sharding,
        rows=tuple(row["id"] for row in rows),
        batch=concurrency / sharding.groups,
        prompt=column("isl"),
        output=column("osl"),
        ttft_s=column("silicon_ttft_ms") / 1e3,
        itl_s=column("silicon_tpot_ms") / 1e3,
    )


def _machine(catalog: Catalog, gpu: str) -> str:
    return min(name for name, machine in catalog.machines.items() if machine.gpu == gpu and machine.gpus == 8)


def _model(catalog: Catalog, path: str, other: str, experts: str) -> Model:
    """The model as its row stores it. gpt-oss is MXFP4 whatever its label says (bf16 outside experts)."""
    if path in _CATALOG:
        model = catalog.models[_CATALOG[path]]
    else:
        model = model_from_config(
            _CONFIGS[path] | {"max_position_embeddings": 2**18, "torch_dtype": "bfloat16"},
            path,
            path,
            Span(path),
        )
    if path == "openai/gpt-oss-120b":
        return model
    if "Qwen3.5" in path:
        model = _linear_attention(model, layers=45, state_values=64 * 128 * 128)
    return replace(
        model,
        stored_bytes_per_other_parameter=_STORED_BYTES[other],
        stored_bytes_per_expert_parameter=_STORED_BYTES[experts or other],
    )


def _linear_attention(model: Model, layers: int, state_values: int) -> Model:
    """Layers with a fixed state count as windowed ones whose window holds as many values."""
    window = state_values // model.attention.kv_values_per_token()
    return replace(model, attention=replace(model.attention, windowed_layers=layers, window_tokens=window))


def _workload(catalog: Catalog, model: Model, cache_8bit: bool) -> Workload:
    """TensorRT-LLM keeps an 8-bit cache for the quantised checkpoints made for it: half as many values."""
    workload = workload_of(catalog, model)
    if not cache_8bit:
        return workload
    halved = tuple(
        replace(op, kv_values_per_context_token=op.kv_values_per_context_token / 2)
        for op in workload.operators
    )
    return replace(workload, operators=halved)


def _room(group: Group) -> float:
    """Bytes of each GPU that weights leave to the cache, within what engines use by default."""
    return 0.92 * group.gpu.bytes - costs.held_weight_bytes(group.workload) / group.sharding.gpus - 2e9


def batch_in_memory(group: Group) -> NDArray[np.float64]:
    """Sequences per group that run at once: all, or as many as the cache holds; the rest waits."""
    model = group.workload.model
    context = group.prompt + group.output / 2
    held = kv_copies(model.attention, group.sharding.tensor) / group.sharding.tensor
    each = held * np.asarray(costs.kv_bytes_held(group.workload, 1.0 + 0 * context, context))
    return np.clip(np.floor(_room(group) / each), 1.0, group.batch)
