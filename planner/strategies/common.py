"""What the strategies share: predictions, memory tables, the choice on a grid."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.costs import Quantity
from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.machine import LevelName
from moeplan.planner.ir.policy import Bottleneck, BucketRate, LaneTime, MemoryUse, PassTime, Rejection
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Bucket, RequestClass
from moeplan.planner.units import format_bytes, format_duration

# Shares of a memory that a plan may use, as MoE-Lightning's released optimiser has them: the rest is left to
# fragmentation, the CUDA context and the operating system.
GPU_SHARE = 0.86
HOST_SHARE = 0.80
# A throughput this close to the best counts as the best: then the smaller batch wins.
PLATEAU = 0.005
# Predictions over several GPUs leave out host contention (published runs: worst error 26 % in sample).
_TENSOR_PARALLEL_SIGMA = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Slower:
    """How many times longer than predicted each phase takes."""

    prefill: float = 1.0
    decode: float = 1.0


AS_PREDICTED = Slower()


def estimate(roofline: Roofline, value: float, gpus: int = 1) -> Estimate:
    """A prediction made from this machine's figures."""
    sigma = roofline.machine.sigma * (_TENSOR_PARALLEL_SIGMA if gpus > 1 else 1.0)
    provenance = roofline.machine.provenance
    return Estimate(
        value=value, sigma=sigma, provenance="analytic" if provenance == "datasheet" else provenance
    )


def host_threads(roofline: Roofline) -> int:
    """A compute thread per physical core."""
    return max(1, round(roofline.machine.cpu_cores))


def uses(level: LevelName, items: Iterable[tuple[str, float]]) -> tuple[MemoryUse, ...]:
    """A memory table; items of zero bytes are left out."""
    return tuple(
        MemoryUse(level=level, item=item, bytes=int(np.ceil(size))) for item, size in items if size > 0
    )


def lanes(times: Iterable[tuple[str, float]]) -> tuple[LaneTime, ...]:
    return tuple(LaneTime(lane=lane, seconds=float(seconds)) for lane, seconds in times)


def smallest_of_best(speed: NDArray[np.float64], size: NDArray[np.float64]) -> int:
    """The flat index of the smallest `size` whose `speed` is within PLATEAU of the best; ties: the faster."""
    good = speed >= speed.max() * (1.0 - PLATEAU)
    order = np.lexsort((-speed.ravel(), np.where(good, size, np.inf).ravel()))
    return int(order[0])


def run_seconds(
    requests: RequestClass, sequences: Quantity, prefill_s: Quantity, decode_s: Quantity
) -> NDArray[np.float64]:
    """Seconds for all requests of a batch class, `sequences` at a time; decode passes are taken as full."""
    count = max(1, requests.requests)
    prefill = np.asarray(prefill_s) * count / np.asarray(sequences)
    return np.asarray(prefill + decode_passes(requests, sequences) * np.asarray(decode_s))


def decode_passes(requests: RequestClass, sequences: Quantity) -> NDArray[np.float64]:
    """Passes that decode, of all requests; each one's first token comes from prefill.

    Others enter as sequences finish, so a place gives mean outputs one after the other; at the end the
    longest is waited for. Of outputs of equal length this is exact.
    """
    places = np.ceil(max(1, requests.requests) / np.asarray(sequences, dtype=float))
    mean = max(1.0, requests.mean_output_tokens())
    return np.asarray(places * (mean - 1.0) + requests.output_tokens_max - mean)


def decode_rate(requests: RequestClass, sequences: float, decode_s: float) -> float:
    """Tokens per second of decode passes over the whole run."""
    passes = float(decode_passes(requests, sequences))
    if not passes:
        return sequences / decode_s
    return max(1, requests.requests) * (requests.mean_output_tokens() - 1.0) / (passes * decode_s)


def bottleneck(requests: RequestClass, prefill: PassTime, decode: PassTime) -> Bottleneck:
    """What bounds the phase in which a batch spends most of its time."""
    if prefill.seconds > (requests.mean_output_tokens() - 1.0) * decode.seconds:
        return prefill.bottleneck("prefill")
    return decode.bottleneck("decode")


def batch_rates(
    roofline: Roofline,
    requests: RequestClass,
    sequences: int,
    prefill: PassTime,
    decode: PassTime,
    gpus: int,
    entering_s: float = 0.0,
) -> tuple[BucketRate, ...]:
    """A batch class has one bucket; `sequences` are in flight. `entering_s` are what passes that
    prompts enter take longer in all."""
    seconds = float(run_seconds(requests, sequences, prefill.seconds, decode.seconds)) + entering_s
    return (
        BucketRate(
            bucket=0,
            requests_per_s=estimate(roofline, requests.requests / seconds, gpus),
            batch=sequences,
            ttft_s=prefill.seconds,
            itl_s=decode.seconds,
        ),
    )


def resized(requests: RequestClass, bucket: Bucket) -> RequestClass:
    """As many requests of the bucket's mean size, spread about it as `requests` are about theirs."""
    prompts = bucket.prompt_tokens / requests.mean_prompt_tokens()
    outputs = bucket.output_tokens / requests.mean_output_tokens()
    return replace(
        requests,
        buckets=(replace(bucket, share=1.0),),
        prompt_tokens_min=max(1, round(requests.prompt_tokens_min * prompts)),
        prompt_tokens_max=max(1, round(requests.prompt_tokens_max * prompts)),
        output_tokens_max=max(1, round(requests.output_tokens_max * outputs)),
    )


def batch_figures(requests: RequestClass, sequences: int, prefill_s: float, decode_s: float) -> Figures:
    """Figures of a batch class whose batches of `sequences` take so long to prefill and per decode pass."""
    return Figures(
        prefill_tokens_per_s=sequences * requests.mean_prompt_tokens() / prefill_s,
        decode_tokens_per_s=decode_rate(requests, sequences, decode_s),
        requests_per_s=requests.requests / float(run_seconds(requests, sequences, prefill_s, decode_s)),
        ttft_s=prefill_s,
        itl_s=decode_s,
    )


def too_small(
    roofline: Roofline,
    requests: RequestClass,
    level: LevelName,
    need: float,
    limit: float,
    what: str,
    hint: str,
) -> Rejection:
    """A refusal for want of memory, with the shortage in numbers."""
    return Rejection(
        machine=roofline.machine.name,
        serves=requests.name,
        constraint=f"{level} memory",
        message=f"{what} needs {format_bytes(need)} of {level} memory, {format_bytes(limit)} may be used",
        hint=hint,
        excess=need / limit,
    )


def impossible(machine: str, requests: RequestClass, constraint: str, message: str, hint: str) -> Rejection:
    """A refusal for want of something that no amount of anything replaces."""
    return Rejection(
        machine=machine,
        serves=requests.name,
        constraint=constraint,
        message=message,
        hint=hint,
        excess=math.inf,
    )


def keeps_slo(requests: RequestClass, ttft_s: Quantity, itl_s: Quantity) -> NDArray[np.bool_]:
    """Where both promises of the class are kept; everywhere if it has none."""
    slo = requests.slo
    if slo is None:
        return np.ones_like(np.asarray(itl_s), dtype=bool)
    return (np.asarray(ttft_s) <= slo.ttft_s) & (np.asarray(itl_s) <= slo.itl_s)


def mixed_rate(requests: RequestClass, rates: Iterable[float]) -> float:
    """Requests/s of the class's own mix of buckets, from those of each alone; 0 where one is not served."""
    pairs = list(zip(requests.buckets, rates, strict=True))
    if any(rate == 0.0 for _, rate in pairs):
        return 0.0
    return 1.0 / sum(bucket.share / rate for bucket, rate in pairs)


def too_slow(
    machine: str, requests: RequestClass, bucket: Bucket, ttft_s: float, itl_s: float, by: str = ""
) -> Rejection:
    """A refusal because requests of one size cannot keep the SLO, with what they reach `by` some account."""
    slo = requests.slo
    assert slo is not None  # without an SLO nothing is late
    late = "TTFT" if ttft_s > slo.ttft_s else "ITL"
    reached, wanted = (ttft_s, slo.ttft_s) if late == "TTFT" else (itl_s, slo.itl_s)
    return Rejection(
        machine=machine,
        serves=requests.name,
        constraint=late,
        message=(
            f"{by}requests of {bucket.prompt_tokens:.0f} + {bucket.output_tokens:.0f} tokens reach "
            f"{late} {format_duration(reached)} alone, the SLO is {format_duration(wanted)}"
        ),
        hint=f"an SLO of {late.lower()} {format_duration(reached)} or more, or a faster machine",
        excess=reached / wanted,
    )
