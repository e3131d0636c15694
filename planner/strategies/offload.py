"""Experts streamed from host memory through the GPU, decode attention on the CPU: CGOPipe's home ground.

One pass over the layers keeps the lanes busy; it takes as long as the busiest, and longer near balance. The
search maximises generated tokens per second, prefill included, over N = μ·n_ub sequences and whole resident
experts.
Source: MoE-Lightning (ASPLOS'25), section 4 and its released optimiser, with its known faults mended:
prefill counts, residency is in whole experts, FLOPs of PV count, attention is charged at mean length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.planner import costs
from moeplan.planner.ir.machine import LevelName
from moeplan.planner.ir.policy import NO_PAGES, MemoryLimit, Pages, PassTime, Policy, Rejection
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.roofline import Roof, Roofline
from moeplan.planner.ir.workload import OperatorName, RequestClass, Workload
from moeplan.planner.strategies.common import (
    GPU_SHARE,
    HOST_SHARE,
    Slower,
    batch_figures,
    batch_rates,
    bottleneck,
    estimate,
    host_threads,
    lanes,
    run_seconds,
    smallest_of_best,
    too_small,
    uses,
)

Array = NDArray[np.float64]

# All weights are pinned when they take at most this share of host memory; otherwise pages are staged
# through a pinned ring, which touches DRAM three times and reaches 0.72 of the pinned link rate
# (8.4-9.1 against 11.9-12.3 GB/s in MoE-Lightning's runs on an L4 host).
_PINNED_SHARE = 0.6
_STAGED_LINK_SHARE = 0.72
_STAGED_DRAM_TOUCHES = 3
# Lanes wait for each other's micro-batches and share DRAM, so near the balance point they do not overlap
# fully: t = (sum of t_lane^p)^(1/p). p was chosen on MoE-Lightning's runs (1.5 to 6 tried): with 2 the link
# that fits the L4's is about the 12.3 GB/s measured on its own (Fig. 9), with the maximum 8.4
# (benchmarks/published_runs.py).
_OVERLAP = 2.0
_WORKSPACE_MARGIN = 1.2  # MoE-Lightning's released optimiser
_CALLS_PER_MICRO_BATCH = 30  # operator launches per layer and micro-batch
_HOST_PROCESS_BYTES = 4 << 30  # interpreter, CUDA context's host part, file cache the kernel insists on
_PREFILL_TOKENS = 4096
_SPARE_SLOTS = 2  # pinned pages beside those of one layer, for what is staged ahead
_MICRO_BATCHES = np.arange(1.0, 65.0)
_MICRO_BATCH_SIZES = np.array([1, 2, 4, 8, 16, *range(32, 513, 32)], dtype=float)
_ON_CPU: tuple[OperatorName, ...] = ("attention_core", "windowed_attention_core")


def offload_policy(
    workload: Workload, requests: RequestClass, roofline: Roofline, memory_limit_bytes: int | None
) -> Policy | Rejection:
    """Return the fastest offloading policy for a batch class, or what memory is short."""
    if not workload.model.experts:
        return Rejection(
            machine=roofline.machine.name,
            serves=requests.name,
            constraint="model",
            message=f"{workload.model.name} has no experts to offload",
            hint="GPUs that hold the whole model",
            excess=math.inf,
        )
    host = min(roofline.roof("dram").bytes * HOST_SHARE, memory_limit_bytes or np.inf)
    search = _Search(workload, requests, roofline, float(host))
    micro_batch, micro_batches = (grid.ravel() for grid in np.meshgrid(_MICRO_BATCH_SIZES, _MICRO_BATCHES))
    small_enough = micro_batch * micro_batches <= max(requests.requests, 1)
    point = search.evaluate(micro_batch[small_enough], micro_batches[small_enough])
    if not point.feasible.any():
        return search.refusal(point)
    speed = np.where(point.feasible, point.generated_tokens_per_s, 0.0)
    best = smallest_of_best(speed, point.sequences)
    return search.policy(point.at(best))


def offload_policy_at(
    workload: Workload, requests: RequestClass, roofline: Roofline, micro_batch: int, micro_batches: int
) -> Policy:
    """The policy with a given μ and n_ub, whether it fits or not: to compare with what others chose."""
    search = _Search(workload, requests, roofline, float(roofline.roof("dram").bytes))
    return search.policy(search.evaluate(np.array([float(micro_batch)]), np.array([float(micro_batches)])))


def offload_figures(
    workload: Workload,
    requests: RequestClass,
    roofline: Roofline,
    policy: Policy,
    sequences: int,
    slower: Slower,
) -> Figures:
    """What the machine does with `sequences` of `requests` in flight, in micro-batches like the policy's."""
    limit = next(limit.bytes for limit in policy.limits if limit.level == "dram")
    search = _Search(workload, requests, roofline, float(limit))
    micro_batches = math.ceil(sequences / policy.micro_batch)
    point = search.evaluate(np.array([sequences / micro_batches]), np.array([float(micro_batches)]))
    prefill_s, decode_s = _pass_time(point.prefill).seconds, _pass_time(point.decode).seconds
    return batch_figures(requests, sequences, prefill_s * slower.prefill, decode_s * slower.decode)


@dataclass(frozen=True)
class _Point:
    """Candidate policies, one array element each."""

    micro_batch: Array
    micro_batches: Array
    resident_experts: Array
    gpu_bytes: Array
    host_bytes: Array
    feasible: NDArray[np.bool_]
    decode: dict[str, Array]
    prefill: dict[str, Array]
    generated_tokens_per_s: Array

    @property
    def sequences(self) -> Array:
        return self.micro_batch * self.micro_batches

    def at(self, index: int) -> _Point:
        """The one candidate at `index`, still as arrays of one element."""
        one = slice(index, index + 1)
        return _Point(
            micro_batch=self.micro_batch[one],
            micro_batches=self.micro_batches[one],
            resident_experts=self.resident_experts[one],
            gpu_bytes=self.gpu_bytes[one],
            host_bytes=self.host_bytes[one],
            feasible=self.feasible[one],
            decode={lane: seconds[one] for lane, seconds in self.decode.items()},
            prefill={lane: seconds[one] for lane, seconds in self.prefill.items()},
            generated_tokens_per_s=self.generated_tokens_per_s[one],
        )


@dataclass(frozen=True)
class _Search:
    workload: Workload
    requests: RequestClass
    roofline: Roofline
    host_limit: float

    @property
    def gpus(self) -> int:
        return self.roofline.machine.gpus

    @property
    def gpu_limit(self) -> float:
        return self.roofline.roof("gpu").bytes * GPU_SHARE * self.gpus

    @property
    def _gpu_roof(self) -> Roof:
        """The GPU as the kernels of offloaded experts see it.

        They reach no more of the peak in decode than in prefill, where their calls are largest.
        """
        gpu = self.roofline.roof("gpu")
        return replace(gpu, flops_per_s=min(gpu.flops_per_s, gpu.offload_prefill_flops_per_s))

    @property
    def expert_bytes(self) -> float:
        """Bytes of one routed expert of one layer, as computed with."""
        return float(self.workload.model.expert_parameters() * self.workload.value_bytes)

    @property
    def resident_bytes(self) -> float:
        """Bytes of all that is never streamed."""
        return float(costs.resident_parameters(self.workload.model) * self.workload.value_bytes)

    @property
    def weight_bytes(self) -> float:
        model = self.workload.model
        return self.resident_bytes + self.expert_bytes * model.experts * model.moe_layers

    @property
    def staged(self) -> bool:
        return self.weight_bytes > _PINNED_SHARE * self.roofline.roof("dram").bytes

    @property
    def prefill_tokens(self) -> int:
        return max(_PREFILL_TOKENS, self.requests.prompt_tokens_max)

    def evaluate(self, micro_batch: Array, micro_batches: Array) -> _Point:
        """Residency, memory and time of every (μ, n_ub)."""
        sequences = micro_batch * micro_batches
        resident = self._resident_experts(sequences, micro_batch)
        gpu_bytes = self._gpu_bytes(sequences, micro_batch, resident)
        host_bytes = np.asarray(sum(size for _, size in self.host_items(sequences, resident, micro_batches)))
        decode = self._decode_lanes(micro_batch, micro_batches, resident)
        prefill = self._prefill_lanes(sequences, resident)
        seconds = run_seconds(self.requests, sequences, _together(prefill), _together(decode))
        generated = self.requests.requests * self.requests.mean_output_tokens() / seconds
        feasible = (gpu_bytes <= self.gpu_limit) & (host_bytes <= self.host_limit)
        return _Point(
            micro_batch=micro_batch,
            micro_batches=micro_batches,
            resident_experts=resident,
            gpu_bytes=gpu_bytes,
            host_bytes=host_bytes,
            feasible=feasible,
            decode=decode,
            prefill=prefill,
            generated_tokens_per_s=generated,
        )

    def gpu_items(self, sequences: Array, micro_batch: Array, resident: Array) -> list[tuple[str, Array]]:
        """The GPU's memory table: what stays, two layers' streamed pages, hidden states, workspace."""
        model, size = self.workload.model, self.workload.value_bytes
        tokens = np.maximum(micro_batch, self.prefill_tokens)
        per_token = model.experts_per_token * (model.hidden + 3 * model.expert_intermediate)
        work = _WORKSPACE_MARGIN * size * tokens * per_token
        streamed = (model.experts - resident) * self.expert_bytes
        return [
            ("dense weights", self.resident_bytes + 0.0 * sequences),
            ("resident experts", resident * model.moe_layers * self.expert_bytes),
            ("weight pages", 2.0 * streamed),
            ("hidden states", 2.0 * size * model.hidden * np.maximum(sequences, self.prefill_tokens)),
            ("workspace", work),
        ]

    def _gpu_bytes(self, sequences: Array, micro_batch: Array, resident: Array) -> Array:
        return np.asarray(sum(size for _, size in self.gpu_items(sequences, micro_batch, resident)))

    def _resident_experts(self, sequences: Array, micro_batch: Array) -> Array:
        """The most whole experts per layer that GPU memory holds beside all else: linear, so closed form."""
        model = self.workload.model
        none = self._gpu_bytes(sequences, micro_batch, np.zeros_like(sequences))
        per_expert = (model.moe_layers - 2.0) * self.expert_bytes
        if per_expert <= 0:
            return np.zeros_like(sequences)
        return np.clip(np.floor((self.gpu_limit - none) / per_expert), 0, model.experts)

    def host_items(self, sequences: Array, resident: Array, micro_batches: Array) -> list[tuple[str, Array]]:
        """The host's memory table."""
        model, requests = self.workload.model, self.requests
        streamed = (model.experts - resident) * self.expert_bytes
        cache = costs.kv_bytes_held(self.workload, sequences, requests.context_tokens_max)
        parked = self.workload.value_bytes * model.hidden * sequences * requests.prompt_tokens_max
        return [
            ("streamed weights", streamed * model.moe_layers),
            ("pinned pages", streamed * (1.0 + _SPARE_SLOTS / micro_batches) * self.staged),
            ("KV cache", np.asarray(cache)),
            ("parked hidden states", parked),
            ("process", _HOST_PROCESS_BYTES + 0.0 * sequences),
        ]

    def _streamed_bytes(self, tokens: Array, resident: Array) -> Array:
        """Bytes of experts that one pass over `tokens` tokens brings to the GPUs, all layers."""
        model = self.workload.model
        touched = costs.touched_expert_share(model, tokens)
        return np.asarray((model.experts - resident) * touched * model.moe_layers * self.expert_bytes)

    def _link_s(self, streamed: Array, hidden: Array) -> Array:
        """Each GPU has its own link; together they cannot outrun host memory (the dram lane)."""
        link = self.roofline.roof("dram").up_bytes_per_s * self.gpus
        rate = link * (_STAGED_LINK_SHARE if self.staged else 1.0)
        return np.asarray(streamed / rate + hidden / link)

    def _decode_lanes(self, micro_batch: Array, micro_batches: Array, resident: Array) -> dict[str, Array]:
        """Seconds of each lane in one decode pass; hidden states go up once per layer, QKV come down."""
        workload, model, requests = self.workload, self.workload.model, self.requests
        dram = self.roofline.roof("dram")
        sequences = micro_batch * micro_batches
        context = requests.mean_prompt_tokens() + requests.mean_output_tokens() / 2
        on_gpu = [op for op in workload.operators if op.name not in _ON_CPU]
        on_cpu = [op for op in workload.operators if op.name in _ON_CPU]
        streamed = self._streamed_bytes(sequences, resident)
        values = sequences * workload.value_bytes * model.layers
        hidden = values * model.attention.heads * model.attention.value_dim
        qkv = values * (model.attention.heads + 2 * model.attention.kv_heads) * model.attention.head_dim
        kernels = (
            np.asarray(costs.call_seconds(workload, on_gpu, self._gpu_roof, micro_batch, context)) / self.gpus
        )
        launches = model.layers * _CALLS_PER_MICRO_BATCH * self.roofline.machine.launch_s
        cache = sum(np.asarray(costs.kv_bytes_read(workload, op, sequences, context)) for op in on_cpu)
        touches = _STAGED_DRAM_TOUCHES if self.staged else 1
        return {
            "gpu": micro_batches * (kernels + launches),
            "h2d": self._link_s(streamed, hidden),
            "d2h": np.asarray(qkv / (dram.up_bytes_per_s * self.gpus)),
            "cpu": np.asarray(costs.call_seconds(workload, on_cpu, dram, sequences, context)),
            "dram": np.asarray((touches * streamed + cache) / dram.bytes_per_s),
        }

    def _prefill_lanes(self, sequences: Array, resident: Array) -> dict[str, Array]:
        """Seconds of each lane while all prompts of a batch pass through the layers once."""
        workload, model, requests = self.workload, self.workload.model, self.requests
        gpu, dram = self.roofline.roof("gpu"), self.roofline.roof("dram")
        prompt = requests.mean_prompt_tokens()
        tokens = sequences * prompt
        streamed = self._streamed_bytes(tokens, resident)
        parked = tokens * model.hidden * workload.value_bytes * model.layers
        cache = np.asarray(costs.kv_bytes_held(workload, sequences, prompt))
        work = np.asarray(costs.prefill_flops(workload, sequences, prompt))
        touches = _STAGED_DRAM_TOUCHES if self.staged else 1
        return {
            "gpu": work / (gpu.offload_prefill_flops_per_s * self.gpus),
            "h2d": self._link_s(streamed, parked),
            "d2h": (parked + cache) / (dram.up_bytes_per_s * self.gpus),
            "dram": (touches * streamed + 2 * parked + cache) / dram.bytes_per_s,
        }

    def policy(self, point: _Point) -> Policy:
        """The policy record of a one-element point."""
        roofline, requests, model = self.roofline, self.requests, self.workload.model
        sequences = int(point.sequences[0])
        micro_batches = int(point.micro_batches[0])
        decode = _pass_time(point.decode)
        prefill = _pass_time(point.prefill)
        gpu = self.gpu_items(point.sequences, point.micro_batch, point.resident_experts)
        host = self.host_items(point.sequences, point.resident_experts, point.micro_batches)
        return Policy(
            machine=roofline.machine,
            serves=requests.name,
            engine="runtime_min",
            gpus=self.gpus,
            threads=host_threads(roofline),
            data_parallel=1,
            dtype=roofline.dtype,
            sequences=sequences,
            micro_batch=int(point.micro_batch[0]),
            micro_batches=micro_batches,
            prefill_tokens=self.prefill_tokens,
            attention_on="cpu",
            experts_on="gpu",
            weights_on="dram",
            resident_share=float(point.resident_experts[0]) / model.experts,
            staged=self.staged,
            pages=self._pages(point, micro_batches),
            memory=uses("gpu", _first(gpu)) + uses("dram", _first(host)),
            limits=(
                MemoryLimit(level="gpu", bytes=int(self.gpu_limit)),
                MemoryLimit(level="dram", bytes=int(self.host_limit)),
            ),
            prefill=prefill,
            decode=decode,
            prefill_tokens_per_s=estimate(
                roofline, sequences * requests.mean_prompt_tokens() / prefill.seconds, self.gpus
            ),
            decode_tokens_per_s=estimate(
                roofline, sequences * requests.decode_occupancy() / decode.seconds, self.gpus
            ),
            generated_tokens_per_s=estimate(roofline, float(point.generated_tokens_per_s[0]), self.gpus),
            rates=batch_rates(roofline, requests, sequences, prefill, decode, self.gpus),
            bottleneck=bottleneck(requests, prefill, decode),
        )

    def _pages(self, point: _Point, micro_batches: int) -> Pages:
        """The streamed experts of a layer in n_ub pages; the pinned ring holds one layer's pages, and one."""
        streamed = (self.workload.model.experts - point.resident_experts[0]) * self.expert_bytes
        if streamed == 0:
            return NO_PAGES
        return Pages(
            pages_per_layer=micro_batches,
            experts_per_page=0,
            resident_pages=0,
            slots=micro_batches + _SPARE_SLOTS,
            slot_bytes=int(np.ceil(streamed / micro_batches)),
            readers=0,
            block_bytes=0,
        )

    def refusal(self, point: _Point) -> Rejection:
        """Which memory is short for the smallest candidate."""
        level: LevelName = "gpu" if point.gpu_bytes[0] > self.gpu_limit else "dram"
        need, limit = (
            (point.gpu_bytes[0], self.gpu_limit) if level == "gpu" else (point.host_bytes[0], self.host_limit)
        )
        hint = (
            "more or larger GPUs, or shorter prompts"
            if level == "gpu"
            else "a machine with more host memory, or shorter requests"
        )
        what = f"{self.workload.model.name} with offloaded experts"
        return too_small(self.roofline, self.requests, level, float(need), limit, what, hint)


def _together(lane_seconds: dict[str, Array]) -> Array:
    """Seconds of a pass: no less than the busiest lane, more where others are about as busy."""
    return np.asarray(sum(seconds**_OVERLAP for seconds in lane_seconds.values()) ** (1.0 / _OVERLAP))


def _pass_time(lane_seconds: dict[str, Array]) -> PassTime:
    busiest = max(float(seconds[0]) for seconds in lane_seconds.values())
    return PassTime(
        lanes=lanes((lane, float(s[0])) for lane, s in lane_seconds.items()),
        serial_s=float(_together(lane_seconds)[0]) - busiest,
    )


def _first(items: list[tuple[str, Array]]) -> list[tuple[str, float]]:
    return [(item, float(size[0])) for item, size in items]
