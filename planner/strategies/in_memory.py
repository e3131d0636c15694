"""The model in GPU memory under vLLM, continuous batching: the largest request rate that keeps the SLO.

A decode step of b sequences takes t(b) = Σ over operators of a rounded roofline, plus kernel launches and
all-reduces. A prompt is prefilled in t_p, and each token of a request waits for b·t_p/o of other requests'
prefill, so ITL = t(b) + b·t_p/o and one copy serves b/(o·ITL) requests a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moeplan.planner import costs
from moeplan.planner.ir.policy import NO_PAGES, BucketRate, MemoryLimit, PassTime, Policy, Rejection
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Bucket, RequestClass, Workload
from moeplan.planner.strategies.common import GPU_SHARE, estimate, host_threads, lanes, too_small, uses
from moeplan.planner.units import format_duration

_MAX_SEQUENCES = 256  # vLLM's default max_num_seqs
_PREFILL_TOKENS = 8192  # vLLM's chunk of prompt tokens per step
_ALL_REDUCE_S = 20e-6  # fixed cost of one all-reduce; 12-25 µs were measured on NVLink machines
_CALLS_PER_LAYER = 12  # kernels that vLLM launches per layer, fused where it fuses


def in_memory_policy(workload: Workload, requests: RequestClass, roofline: Roofline) -> Policy | Rejection:
    """Return the tensor-parallel degree with which the whole machine serves most requests per second."""
    gpus = roofline.machine.gpus
    copies = [_Copy(workload, requests, roofline, tp) for tp in (1, 2, 4, 8, 16) if gpus % tp == 0]
    fitting = [copy for copy in copies if copy.kv_bytes >= copy.longest_request_bytes]
    if not fitting:
        return _does_not_fit(requests, roofline, copies[-1])
    policies = [copy.policy() for copy in fitting]
    best = max(policies, key=lambda policy: (policy.generated_tokens_per_s.value, -policy.gpus))
    if best.generated_tokens_per_s.value == 0.0:
        return _too_slow(requests, roofline, min(policies, key=lambda p: max(r.ttft_s for r in p.rates)))
    return best


@dataclass(frozen=True)
class _Copy:
    """One copy of the model over `tp` GPUs."""

    workload: Workload
    requests: RequestClass
    roofline: Roofline
    tp: int

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
        return self.limit_bytes - costs.held_weight_bytes(self.workload) - self.workspace_bytes

    @property
    def longest_request_bytes(self) -> float:
        return self._held(self.requests.context_tokens_max)

    def _held(self, context: float) -> float:
        """Cache bytes of one sequence on all GPUs: KV heads are shared out, and copied where there are fewer
        heads than GPUs; MLA's latent cache has no heads."""
        attention = self.workload.model.attention
        parts = 1 if attention.kind == "mla" else attention.kv_heads
        copies = self.tp / min(self.tp, parts)
        return copies * float(np.asarray(costs.kv_bytes_held(self.workload, 1.0, context)))

    def step_parts(self, batch: costs.Quantity, context: float) -> dict[str, costs.Quantity]:
        """Seconds of one decode step by cause, over all layers."""
        roof, model = self.roofline.roof("gpu"), self.workload.model
        compute = costs.call_seconds(self.workload, self.workload.operators, roof, batch, context) / self.tp
        parts: dict[str, costs.Quantity] = {
            "gpu": compute,
            "launch": model.layers * _CALLS_PER_LAYER * self.roofline.machine.launch_s,
        }
        if self.tp > 1:
            moved = batch * model.hidden * self.workload.value_bytes * 2 * (self.tp - 1) / self.tp
            parts["all-reduce"] = (
                2 * model.layers * (_ALL_REDUCE_S + moved / self.roofline.machine.peer_bytes_per_s)
            )
        return parts

    def prefill_s(self, prompt: float) -> float:
        work = float(np.asarray(costs.prefill_flops(self.workload, 1.0, prompt)))
        return work / (self.roofline.roof("gpu").prefill_flops_per_s * self.tp)

    def rate(self, number: int, bucket: Bucket) -> BucketRate:
        """The largest batch that memory and SLO allow, and the requests per second that it gives."""
        context = bucket.prompt_tokens + bucket.output_tokens / 2
        held = self._held(context)
        batch = np.arange(1.0, max(1, min(_MAX_SEQUENCES, int(self.kv_bytes // held))) + 1)
        prefill = self.prefill_s(bucket.prompt_tokens)
        itl = _total(self.step_parts(batch, context)) + batch * prefill / bucket.output_tokens
        ttft = prefill + itl
        good = np.flatnonzero(self._keeps_slo(ttft, itl))
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

    def _keeps_slo(self, ttft: NDArray[np.float64], itl: NDArray[np.float64]) -> NDArray[np.bool_]:
        slo = self.requests.slo
        if slo is None:
            return np.ones_like(itl, dtype=bool)
        return (ttft <= slo.ttft_s) & (itl <= slo.itl_s)

    def policy(self) -> Policy:
        """This copy's policy; generated_tokens_per_s is 0 where some bucket cannot keep the SLO."""
        requests, roofline, tp = self.requests, self.roofline, self.tp
        rates = tuple(self.rate(number, bucket) for number, bucket in enumerate(requests.buckets))
        batch = max(rate.batch for rate in rates)
        prompt, output = requests.mean_prompt_tokens(), requests.mean_output_tokens()
        parts = self.step_parts(float(batch), prompt + output / 2)
        decode = PassTime(lanes=lanes([("gpu", float(_total(parts)))]), serial_s=0.0)
        prefill = PassTime(lanes=lanes([("gpu", self.prefill_s(prompt))]), serial_s=0.0)
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
            prefill=prefill,
            decode=decode,
            prefill_tokens_per_s=estimate(roofline, copies * prompt / prefill.seconds, tp),
            decode_tokens_per_s=estimate(roofline, copies * batch / decode.seconds, tp),
            generated_tokens_per_s=estimate(roofline, _mixed_rate(requests, rates) * output, tp),
            rates=rates,
            bottleneck=self._bottleneck(batch, prompt, output),
        )

    def _memory(self) -> list[tuple[str, float]]:
        weights = costs.held_weight_bytes(self.workload)
        return [("weights", weights), ("workspace", self.workspace_bytes), ("KV cache", self.kv_bytes)]

    def _bottleneck(self, batch: int, prompt: float, output: float) -> str:
        """What a request's seconds go to: its share of decode steps by cause, and prefill."""
        spent = {
            name: float(np.asarray(s))
            for name, s in self.step_parts(float(batch), prompt + output / 2).items()
        }
        spent["prefill"] = batch * self.prefill_s(prompt) / output
        spent["gpu decode"] = spent.pop("gpu")
        return max(sorted(spent), key=lambda name: spent[name])


def _total(parts: dict[str, costs.Quantity]) -> NDArray[np.float64]:
    return np.asarray(sum(np.asarray(seconds) for seconds in parts.values()))


def _mixed_rate(requests: RequestClass, rates: tuple[BucketRate, ...]) -> float:
    """Requests/s of the class's own mix of buckets; 0 where some bucket cannot be served."""
    if any(rate.requests_per_s.value == 0.0 for rate in rates):
        return 0.0
    return 1.0 / sum(
        bucket.share / rate.requests_per_s.value for bucket, rate in zip(requests.buckets, rates, strict=True)
    )


def _does_not_fit(requests: RequestClass, roofline: Roofline, copy: _Copy) -> Rejection:
    need = costs.held_weight_bytes(copy.workload) + copy.workspace_bytes + copy.longest_request_bytes
    return too_small(
        roofline,
        requests,
        "gpu",
        need,
        copy.limit_bytes,
        f"{copy.workload.model.name} in memory with one request of {requests.context_tokens_max} tokens",
        "more or larger GPUs",
    )


def _too_slow(requests: RequestClass, roofline: Roofline, best: Policy) -> Rejection:
    slo = requests.slo
    assert slo is not None  # without an SLO every rate is positive
    worst = next(rate for rate in best.rates if rate.requests_per_s.value == 0.0)
    bucket = requests.buckets[worst.bucket]
    late = "TTFT" if worst.ttft_s > slo.ttft_s else "ITL"
    reached, wanted = (worst.ttft_s, slo.ttft_s) if late == "TTFT" else (worst.itl_s, slo.itl_s)
    return Rejection(
        machine=roofline.machine.name,
        serves=requests.name,
        constraint=late,
        message=(
            f"requests of {bucket.prompt_tokens:.0f} + {bucket.output_tokens:.0f} tokens reach "
            f"{late} {format_duration(reached)} alone, the SLO is {format_duration(wanted)}"
        ),
        hint=f"an SLO of {late.lower()} {format_duration(reached)} or more, or a faster machine",
        excess=reached / wanted,
    )
