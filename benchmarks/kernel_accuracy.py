"""Predicted against measured: fused-MoE kernels, activated experts, bytes of weights.

usage: python benchmarks/kernel_accuracy.py PATH/accuracy

The folder holds moe_kernel_bf16.csv (kernel tables of ai-dynamo/aiconfigurator 0.12, Apache-2.0),
moe_kernel_activated_experts_rtxpro6000.csv (casys-kaist/LLMServingSim@5daddb2, MIT) and vllm_memory_h100.csv
(llm-d-planner's documentation, Apache-2.0).

Kernels: three constants per GPU (memory and compute efficiency of experts, a cost per call) are fitted to all
shapes but one and tested on that one. Kernels whose weights fit the GPU's last-level cache are timed out of
the cache in a loop, which no serving step does: they are counted and left out. "top-k only" charges each call
the k experts of one token, as some planners do; it is fitted the same way.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fitting import Array, fit
from tables import read_rows
from workloads import workload_of

from moeplan.planner import costs, serving
from moeplan.planner.catalog import Catalog, load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.workload import Workload
from moeplan.planner.model_config import model_from_config
from moeplan.planner.passes.roofline import level_roof

MOST_TOKENS = 256
_GPUS = {"a100_sxm": "A100-80GB", "h100_sxm": "H100", "l40s": "L40S"}
_CACHE_BYTES = {"a100_sxm": 40 << 20, "h100_sxm": 50 << 20, "l40s": 96 << 20}  # L2, NVIDIA's white papers
_START, _LOW, _HIGH = np.array([0.7, 0.4, 3e-5]), np.array([0.1, 0.02, 0.0]), np.array([1.0, 1.0, 2e-4])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The measured calls of one layer's experts of one shape on one GPU."""

    system: str
    name: str
    workload: Workload
    tokens: Array
    seconds: Array


def read_shapes(folder: Path) -> tuple[list[Shape], int]:
    """Shapes held by one GPU (EP = 1), and the number of calls left out as cached."""
    catalog = load_catalog(None, Span("catalog"))
    bins: dict[tuple[str, str, int], list[dict[str, str]]] = defaultdict(list)
    cached = 0
    for row in read_rows(folder / "moe_kernel_bf16.csv"):
        if row["moe_ep_size"] != "1" or int(row["num_tokens"]) > MOST_TOKENS:
            continue
        inner = int(row["inter_size"]) // int(row["moe_tp_size"])
        key = (row["system"], row["model"], inner)
        if _touched_bytes(row, inner) < _CACHE_BYTES[row["system"]]:
            cached += 1
        else:
            bins[key].append(row)
    return [_shape(catalog, key, rows) for key, rows in sorted(bins.items())], cached


def _touched_bytes(row: dict[str, str], inner: int) -> float:
    experts, k = int(row["num_experts"]), int(row["topk"])
    touched = experts * (1 - (1 - k / experts) ** int(row["num_tokens"]))
    return touched * 3 * int(row["hidden_size"]) * inner * 2


def _shape(catalog: Catalog, key: tuple[str, str, int], rows: list[dict[str, str]]) -> Shape:
    system, model, inner = key
    return Shape(
        system=system,
        name=f"{model}, inner {inner}",
        workload=_layer(catalog, rows[0], inner),
        tokens=np.array([float(row["num_tokens"]) for row in rows]),
        seconds=np.array([float(row["latency_ms"]) / 1e3 for row in rows]),
    )


def _layer(catalog: Catalog, row: dict[str, str], inner: int) -> Workload:
    """One layer of Qwen3-MoE's form with the row's experts."""
    config: dict[str, object] = {"model_type": "qwen3_moe", "hidden_size": int(row["hidden_size"])}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128}
    config |= {"num_experts": int(row["num_experts"]), "num_experts_per_tok": int(row["topk"])}
    config |= {"moe_intermediate_size": inner, "vocab_size": 1000, "max_position_embeddings": 4096}
    return workload_of(catalog, model_from_config(config | {"torch_dtype": "bfloat16"}, "x", "x", Span("x")))


def predict(catalog: Catalog, shape: Shape, constants: Array, topk_only: bool = False) -> Array:
    """Seconds of each call."""
    gpu = next(m for m in catalog.machines.values() if m.gpu == _GPUS[shape.system]).level("gpu")
    reached = {"expert_memory_efficiency": constants[0], "compute_efficiency": constants[1]}
    roof = level_roof(replace(gpu, **reached), "bf16")
    operator = shape.workload.operator("routed_experts")
    if topk_only:
        touched = np.asarray(costs.weight_bytes(shape.workload, operator, 1.0))
        moved = touched + costs.activation_bytes(shape.workload, operator, shape.tokens)
        work = costs.flops(operator, shape.tokens, 0.0)
        return np.asarray(costs.knee(moved / roof.expert_bytes_per_s, work / roof.flops_per_s)) + constants[2]
    seconds = costs.operator_seconds(shape.workload, operator, roof, shape.tokens, 0.0)
    return np.asarray(seconds) + constants[2]


def left_out(catalog: Catalog, shapes: list[Shape], topk_only: bool) -> dict[str, Array]:
    """Relative errors of each shape with constants fitted to the GPU's other shapes."""

    def errors(some: list[Shape], constants: Array) -> Array:
        return np.concatenate([np.log(predict(catalog, s, constants, topk_only) / s.seconds) for s in some])

    found = {}
    for shape in shapes:
        others = [s for s in shapes if s.system == shape.system and s is not shape]
        constants = fit(lambda c, others=others: errors(others, c), _START, _LOW, _HIGH)  # type: ignore[misc]
        found[f"{shape.system} {shape.name}"] = np.abs(np.expm1(errors([shape], constants)))
    return found


def show_kernels(folder: Path) -> None:
    catalog = load_catalog(None, Span("catalog"))
    shapes, cached = read_shapes(folder)
    print(
        f"fused-MoE kernels up to {MOST_TOKENS} tokens, shape left out; {cached} calls out of cache left out"
    )
    distinct, topk = (left_out(catalog, shapes, topk_only) for topk_only in (False, True))
    print(f"{'shape':40} calls  distinct experts: mean, median   top-k only: mean, median")
    for name, e in distinct.items():
        print(f"{name:40} {len(e):5}  {_stats(e):>30}   {_stats(topk[name]):>24}")
    for system in _GPUS:
        ours, theirs = (
            np.concatenate([e for name, e in found.items() if name.startswith(system)])
            for found in (distinct, topk)
        )
        print(f"{system:40} {len(ours):5}  {_stats(ours):>30}   {_stats(theirs):>24}")


def show_activated(folder: Path) -> None:
    """Time by activated experts: fitted to every second count of experts, tested on the others."""
    rows = read_rows(folder / "moe_kernel_activated_experts_rtxpro6000.csv")
    tokens, active, measured = (
        np.array([float(row[key]) for row in rows]) for key in ("tokens", "activated_experts", "time_us")
    )
    expert = 3 * 2048 * 768

    def seconds(constants: Array) -> Array:
        memory = active * expert * 2 / (1597e9 * constants[0])
        compute = 2 * tokens * 8 * expert / (503.8e12 * constants[1])
        return np.asarray(costs.knee(memory, compute)) + constants[2]

    test = np.isin(active, [16, 64])
    constants = fit(lambda c: np.log(seconds(c) / measured * 1e6)[~test], _START, _LOW, _HIGH)
    e = np.abs(seconds(constants) / measured * 1e6 - 1)
    print(
        f"\nactivated experts, RTX PRO 6000: {test.sum()} calls with 16 or 64 experts: mean {_stats(e[test])}"
    )


def show_weights(folder: Path) -> None:
    """Bytes of weights per GPU as vLLM reports them."""
    catalog = load_catalog(None, Span("catalog"))
    known = {"gpt-oss-20b (MoE)": "gpt-oss-20b", "Llama-3.1-8B": "llama-3.1-8b"}
    print("\nweights per GPU          vLLM GiB   ours GiB   error")
    for row in read_rows(folder / "vllm_memory_h100.csv"):
        model = catalog.models.get(known.get(row["model"], ""))
        config = _QWEN3.get(row["model"])
        if model is None and config is not None:
            model = model_from_config(config, row["model"], "x", Span("x"))
        if model is None:
            print(f"{row['model']:24} no shape in the catalog")
            continue
        tensor = int(row["tp"])
        ours = serving.weight_bytes(workload_of(catalog, model), tensor) / tensor / 2**30
        theirs = float(row["weights_gib"])
        print(f"{row['model']:24} {theirs:8.2f} {ours:10.2f} {ours / theirs - 1:+8.1%}")


_QWEN3 = {
    name: {"model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "head_dim": 128}
    | {"num_attention_heads": heads, "num_key_value_heads": 8, "intermediate_size": inner}
    | {"vocab_size": 151936, "tie_word_embeddings": tied, "max_position_embeddings": 40960}
    | {"torch_dtype": "bfloat16"}
    for name, hidden, layers, heads, inner, tied in (
        ("Qwen3-0.6B", 1024, 28, 16, 3072, True),
        ("Qwen3-32B", 5120, 64, 64, 25600, False),
    )
}


def _stats(e: Array) -> str:
    return f"{e.mean():.1%}, {np.median(e):.1%}"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    show_kernels(folder)
    show_activated(folder)
    show_weights(folder)


if __name__ == "__main__":
    main()
