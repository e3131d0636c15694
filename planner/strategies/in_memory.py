"""The model in GPU memory under vLLM, continuous batching: the largest request rate that keeps the SLO.

A decode step of b sequences takes t(b), the prefill of a prompt t_p (both in `planner/serving.py`), and each
token of a request waits for b·t_p/o of other requests' prefill, so ITL = t(b) + b·t_p/o and one copy serves
b/(o·ITL) requests a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.planner import costs, serving
from moeplan.planner.ir.attainment import ServingLaw
from moeplan.planner.ir.policy import (
    NO_PAGES,
    BucketRate,
    MemoryLimit,
    PassTime,
    Policy,
    Rejection,
    WeightsDtype,
)
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.roofline import Roof, Roofline
from moeplan.planner.ir.workload import Bucket, RequestClass, Workload
from moeplan.planner.law_grids import batch_grid, tokens_grid
from moeplan.planner.strategies.common import (
    AS_PREDICTED,
    GPU_SHARE,
    Slower,
    estimate,
    host_threads,
    keeps_slo,
    lanes,
    mixed_rate,
    too_slow,
    too_small,
    uses,
)

_MAX_SEQUENCES = 256  # vLLM's default max_num_seqs
_PREFILL_TOKENS = 8192  # vLLM's chunk of prompt tokens per step
# Fitted with the catalog's default efficiencies to measured serving runs: benchmarks/serving_accuracy.py.
VLLM = serving.Engine(
    layer_s=27e-6,
    moe_layer_s=35e-6,
    all_reduce_s=serving.ALL_REDUCE_S,
    peer_efficiency=serving.PEER_EFFICIENCY,
    mixed_prefill=0.87,
    first_steps=2.2,
    first_prefill=1.1,
    queued=0.064,
    prefill_moe_layer_s=1.05e-3,
)
_STEPS_WAITED = 1.5  # by a first token: half of the step under way on average, and its own


def in_memory_policy(workload: Workload, requests: RequestClass, roofline: Roofline) -> Policy | Rejection:
    """Return the tensor-parallel degree with which the whole machine serves most requests per second, and the
    weights' dtype where the engine may choose it."""
    gpus = roofline.machine.gpus
    copies = [
        _Copy(held, requests, roofline, tp, weights_dtype)
        for weights_dtype, held in _held_workloads(workload, roofline).items()
        for tp in (1, 2, 4, 8, 16)
        if gpus % tp == 0
    ]
    fitting = [copy for copy in copies if copy.kv_bytes >= copy.longest_request_bytes]
    if not fitting:
        return _does_not_fit(requests, roofline, copies[-1])
    rated = [(copy, copy.rates()) for copy in fitting]
    copy, rates = max(rated, key=lambda pair: (_mixed(requests, pair[1]), -pair[0].tp))
    if _mixed(requests, rates) == 0.0:
        return _too_slow(requests, roofline, min((r for _, r in rated), key=_slowest_s))
    return copy.policy(rates)


def _mixed(requests: RequestClass, rates: Sequence[BucketRate]) -> float:
    """Requests per second of the class's mix of sizes."""
    return mixed_rate(requests, (rate.requests_per_s.value for rate in rates))


def _slowest_s(rates: Sequence[BucketRate]) -> float:
    return max(rate.ttft_s for rate in rates)


def _held_workloads(workload: Workload, roofline: Roofline) -> dict[WeightsDtype, Workload]:
    """The workload with its weights in each dtype that may be chosen. vLLM keeps fp8 weights on Turing GPUs
    and later: those with 8-bit arithmetic of some kind."""
    known = roofline.machine.level("gpu").flops_per_s
    sixteen_bit = workload.model.stored_bytes_per_expert_parameter >= 2.0
    if workload.quantize in ("fp8", "allow") and sixteen_bit and ("fp8" in known or "int8" in known):
        return {"checkpoint": workload, "fp8": costs.in_fp8(workload)}
    return {"checkpoint": workload}


def _copy_of(workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy) -> _Copy:
    """One copy of the model as `policy` holds it."""
    held = _held_workloads(workload, roofline)[policy.weights_dtype]
    return _Copy(held, requests, roofline, policy.gpus, policy.weights_dtype)


def in_memory_figures(
    workload: Workload,
    requests: RequestClass,
    roofline: Roofline,
    policy: Policy,
    bucket: Bucket,
    batch: int,
    slower: Slower,
) -> Figures:
    """What one copy of the model does with `batch` requests of the bucket's size in flight."""
    copy = _copy_of(workload, requests, roofline, policy)
    times = copy.times(bucket, float(batch), slower)
    return Figures(
        prefill_tokens_per_s=bucket.prompt_tokens / times.prefill,
        decode_tokens_per_s=batch / float(times.step),
        requests_per_s=batch / (bucket.output_tokens * float(times.itl)),
        ttft_s=float(times.ttft),
        itl_s=float(times.itl),
    )


def in_memory_law(
    workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy
) -> ServingLaw:
    """One copy of the model, step by step."""
    return _copy_of(workload, requests, roofline, policy).law(policy.sequences)


def in_memory_fits(
    workload: Workload,
    requests: RequestClass,
    roofline: Roofline,
    policy: Policy,
    bucket: Bucket,
    batch: int,
) -> bool:
    """Whether the cache of one copy holds `batch` requests of the bucket's size, and vLLM takes as many."""
    copy = _copy_of(workload, requests, roofline, policy)
    return batch <= _MAX_SEQUENCES and batch * copy.held_bytes(bucket) <= copy.kv_bytes


@dataclass(frozen=True)
class _Times:
    """Seconds of one prompt's prefill, of a decode step, between two tokens of a request, to its first."""

    prefill: float
    step: NDArray[np.float64]
    itl: NDArray[np.float64]
    ttft: NDArray[np.float64]


@dataclass(frozen=True)
class _Copy:
    """One copy of the model over `tp` GPUs."""

    workload: Workload
    requests: RequestClass
    roofline: Roofline
    tp: int
    weights_dtype: WeightsDtype

    @property
    def limit_bytes(self) -> float:
        return self.roofline.roof("gpu").bytes * GPU_SHARE * self.tp

    @property
    def workspace_bytes(self) -> float:
        """Activations of one prefill chunk and the logits of a full batch."""
        model = self.workload.model
        inner = max(model.expert_intermediate * max(1, model.experts_per_token), model.dense_intermediate)
        per_token = self.workload.value_bytes * (4 * model.hidden + 3 * inner)
        return float(_PREFILL_TOKENS * per_token + _MAX_SEQUENCES * model.vocab * 4)

    @property
    def kv_bytes(self) -> float:
        """What is left for the cache."""
        return self.limit_bytes - self.weight_bytes - self.workspace_bytes

    @property
    def weight_bytes(self) -> float:
        return serving.weight_bytes(self.workload, self.tp)

    @property
    def longest_request_bytes(self) -> float:
        return self._held(self.requests.context_tokens_max)

    def _held(self, context: float) -> float:
        """Cache bytes of one sequence on all GPUs."""
        copies = serving.kv_copies(self.workload.model.attention, self.tp)
        return float(copies * np.asarray(costs.kv_bytes_held(self.workload, 1.0, context)))

    def held_bytes(self, bucket: Bucket) -> float:
        """Cache bytes of one request of the bucket, on average over its life."""
        return self._held(bucket.context_tokens)

    def step_parts(self, batch: costs.Quantity, context: float) -> dict[str, costs.Quantity]:
        """Seconds of one decode step by cause, over all layers."""
        return serving.step_parts(*self._shared, batch, context)

    def prefill_s(self, prompt: float) -> float:
        return float(np.asarray(serving.prefill_s(*self._shared, prompt)))

    @property
    def _shared(self) -> tuple[Workload, Roof, float, serving.Sharding, serving.Engine]:
        peer = self.roofline.machine.peer_bytes_per_s
        return self.workload, self.roofline.roof("gpu"), peer, serving.Sharding(tensor=self.tp), VLLM

    def times(self, bucket: Bucket, batch: costs.Quantity, slower: Slower) -> _Times:
        """What `batch` requests of the bucket's size in flight wait for."""
        prefill = self.prefill_s(bucket.prompt_tokens)
        parts = {name: s * slower.decode for name, s in self.step_parts(batch, bucket.context_tokens).items()}
        itl = serving.inter_token_s(parts, prefill * slower.prefill, VLLM, batch, bucket.output_tokens)
        before_steps = serving.first_token_s(self.workload, VLLM, prefill, 0.0, batch)
        return _Times(
            prefill=prefill * slower.prefill,
            step=np.asarray(sum(parts.values())),
            itl=np.asarray(itl),
            ttft=np.asarray(before_steps * slower.prefill + VLLM.first_steps * itl),
        )

    def rate(self, number: int, bucket: Bucket) -> BucketRate:
        """The largest batch that memory and SLO allow, and the requests per second that it gives."""
        most = int(self.kv_bytes // self.held_bytes(bucket))
        batch = np.arange(1.0, max(1, min(_MAX_SEQUENCES, most)) + 1)
        times = self.times(bucket, batch, AS_PREDICTED)
        itl, ttft = times.itl, times.ttft
        good = np.flatnonzero(keeps_slo(self.requests, ttft, itl))
        best = int(good[-1]) if good.size else 0
        copies = self.roofline.machine.gpus // self.tp
        rate = copies * batch[best] / (bucket.output_tokens * itl[best]) if good.size else 0.0
        return BucketRate(
            bucket=number,
            requests_per_s=estimate(self.roofline, float(rate), self.tp),
            batch=int(batch[best]),
            ttft_s=float(ttft[best]),
            itl_s=float(itl[best]),
        )

    def rates(self) -> tuple[BucketRate, ...]:
        """Of every size; 0 requests/s where it cannot keep the SLO."""
        return tuple(self.rate(number, bucket) for number, bucket in enumerate(self.requests.buckets))

    def policy(self, rates: tuple[BucketRate, ...]) -> Policy:
        """This copy's policy; generated_tokens_per_s is 0 where some bucket cannot keep the SLO."""
        requests, roofline, tp = self.requests, self.roofline, self.tp
        batch = max(rate.batch for rate in rates)
        mean = requests.mean_bucket()
        parts = self.step_parts(float(batch), mean.context_tokens)
        decode, prefill_s = _step(parts), self.prefill_s(mean.prompt_tokens)
        felt_s = batch * prefill_s * VLLM.mixed_prefill / mean.output_tokens
        mixed = _mixed(requests, rates)
        copies = roofline.machine.gpus // tp
        return Policy(
            machine=roofline.machine,
            serves=requests.name,
            engine="vllm",
            gpus=tp,
            threads=host_threads(roofline),
            data_parallel=copies,
            dtype=roofline.dtype,
            sequences=batch,
            micro_batch=batch,
            micro_batches=1,
            prefill_tokens=_PREFILL_TOKENS,
            attention_gpu_share=1.0,
            kv_gpu_share=1.0,
            weights_on="gpu",
            resident_share=1.0,
            experts_cpu_share=0.0,
            experts_disk_share=0.0,
            staged=False,
            pages=NO_PAGES,
            memory=uses("gpu", self._memory()),
            limits=(MemoryLimit(level="gpu", bytes=int(self.limit_bytes)),),
            prefill=PassTime(lanes=lanes([("gpu", prefill_s)]), serial_s=0.0),
            decode=decode,
            prefill_tokens_per_s=estimate(roofline, copies * mean.prompt_tokens / prefill_s, tp),
            decode_tokens_per_s=estimate(roofline, copies * batch / decode.seconds, tp),
            generated_tokens_per_s=estimate(roofline, mixed * mean.output_tokens, tp),
            rates=rates,
            # What a token's seconds go to: the parts of its step, and other requests' prefill.
            bottleneck=_step({**parts, "prefill": felt_s}).bottleneck("steps"),
            weights_dtype=self.weights_dtype,
        )

    def law(self, sequences: int) -> ServingLaw:
        """What one step takes, with at most so many sequences. A first token takes the rest of the step
        under way and its own, in which its prompt passes; what the law of TTFT has above that is on top."""
        most = self.requests.context_tokens_max
        batch = batch_grid(sequences)
        context, prompts = tokens_grid(most), tokens_grid(self.requests.prompt_tokens_max)
        sizes = np.array(batch, dtype=float)
        steps = np.stack([np.asarray(sum(self.step_parts(sizes, c).values())) for c in context], axis=1)
        prefill = [self.prefill_s(p) for p in prompts]
        own_s = self.workload.model.moe_layers * VLLM.prefill_moe_layer_s
        return ServingLaw(
            sequences=sequences,
            step_tokens=_PREFILL_TOKENS,
            memory_bytes=self.kv_bytes,
            batch=batch,
            context_tokens=context,
            step_s=tuple(map(tuple, steps.tolist())),
            cache_bytes=tuple(self._held(c) for c in context),
            prompt_tokens=prompts,
            prefill_s=tuple(VLLM.mixed_prefill * s for s in prefill),
            first_token_s=tuple(own_s + (VLLM.first_prefill - VLLM.mixed_prefill) * s for s in prefill),
            first_token_steps=VLLM.first_steps - _STEPS_WAITED,
        )

    def _memory(self) -> list[tuple[str, float]]:
        return [
            ("weights", self.weight_bytes),
            ("workspace", self.workspace_bytes),
            ("KV cache", self.kv_bytes),
        ]


def _step(parts: dict[str, costs.Quantity]) -> PassTime:
    """The parts of one step, one after the other."""
    times = ((name, float(np.asarray(seconds))) for name, seconds in parts.items())
    return PassTime(lanes=lanes(times), serial_s=0.0, overlap=False)


def _does_not_fit(requests: RequestClass, roofline: Roofline, copy: _Copy) -> Rejection:
    need = copy.weight_bytes + copy.workspace_bytes + copy.longest_request_bytes
    return too_small(
        roofline,
        requests,
        "gpu",
        need,
        copy.limit_bytes,
        f"{copy.workload.model.name} in memory with one request of {requests.context_tokens_max} tokens",
        _what_would_fit(copy, need),
    )


def _what_would_fit(copy: _Copy, need: float) -> str:
    """The smallest machine of the same GPU that would do, or the weights' dtype that makes this one do."""
    machine = copy.roofline.machine
    count = 2 ** math.ceil(math.log2(need / copy.limit_bytes * copy.tp))
    hint = (
        f"{count} {machine.gpu} GPUs in one machine" if machine.gpu else f"{count} such GPUs in one machine"
    )
    smaller = replace(copy, workload=costs.in_fp8(copy.workload))
    if copy.workload.quantize not in ("fp8", "allow") and smaller.kv_bytes >= smaller.longest_request_bytes:
        hint += ", or `quantize: fp8` in the spec's model"
    return hint


def _too_slow(requests: RequestClass, roofline: Roofline, rates: Sequence[BucketRate]) -> Rejection:
    worst = next(rate for rate in rates if rate.requests_per_s.value == 0.0)
    return too_slow(
        roofline.machine.name, requests, requests.buckets[worst.bucket], worst.ttft_s, worst.itl_s
    )
