"""The Policy level: how one machine would run one request class, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.machine import LevelName, Machine
from moeplan.planner.ir.profile import Correction
from moeplan.planner.ir.spec import Dtype
from moeplan.planner.ir.workload import ClassName, KvDtype

Engine = Literal["runtime_min", "vllm"]
ExpertShares = Literal["width", "whole"]
WeightsDtype = Literal["checkpoint", "fp8", "bf12", "int8", "int4"]
Phase = Literal["prefill", "decode", "steps"]  # steps of continuous batching do both


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes that one item takes at one level."""

    level: LevelName
    item: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """What a policy may use of one level: the machine's bytes times the safety share."""

    level: LevelName
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneTime:
    """Seconds that one resource is busy in one pass over all layers."""

    lane: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """The lane that bounds a phase, and the one that would bound it next (empty where no other works).

    Where lanes `overlap`, a share is the part of the pass that the lane is busy, and what `next_share` leaves
    is its slack. Where they follow one another, a share is the lane's part of the pass.
    """

    phase: Phase
    lane: str
    share: float
    next_lane: str
    next_share: float
    overlap: bool

    def __str__(self) -> str:
        if self.overlap:
            first, then = self.lane, f"{self.next_lane} at {self.next_share:.0%}"
        else:
            first, then = (
                f"{self.lane}, {self.share:.0%} of the time",
                f"{self.next_lane}, {self.next_share:.0%}",
            )
        return f"{self.phase}: {first}" + (f"; next {then}" if self.next_lane else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """One pass over the model, its seconds by resource or cause.

    Lanes that `overlap` take as long as the busiest, others as long as all together; `serial_s` is on top.
    """

    lanes: tuple[LaneTime, ...]
    serial_s: float
    overlap: bool = True

    @property
    def seconds(self) -> float:
        times = [lane.seconds for lane in self.lanes]
        return (max(times) if self.overlap else sum(times)) + self.serial_s

    def bottleneck(self, phase: Phase) -> Bottleneck:
        """The busiest lane and the second; of equally busy ones the first in the table."""
        first, *others = sorted(self.lanes, key=lambda lane: -lane.seconds)
        second = others[0] if others and others[0].seconds else LaneTime(lane="", seconds=0.0)
        return Bottleneck(
            phase=phase,
            lane=first.lane,
            share=first.seconds / self.seconds,
            next_lane=second.lane,
            next_share=second.seconds / self.seconds,
            overlap=self.overlap,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRate:
    """What one replica does with requests of one bucket alone; 0 requests/s where it cannot keep the SLO."""

    bucket: int
    requests_per_s: Estimate
    batch: int
    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """How each layer's weights are cut and read: see runtime_min's PagePlan. All zero under vLLM.

    `hit_pages` is how many of `places` a decode pass of the full batch is expected to use.
    """

    pages_per_layer: int
    experts_per_page: int
    resident_pages: int
    slots: int
    slot_bytes: int
    readers: int
    block_bytes: int
    places: int = 0
    guesses: int = 0
    hit_pages: float = 0.0


NO_PAGES = Pages(
    pages_per_layer=0,
    experts_per_page=0,
    resident_pages=0,
    slots=0,
    slot_bytes=0,
    readers=0,
    block_bytes=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentExperts:
    """The experts of one layer that stay where they are computed, most popular first."""

    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Perplexity of a trained model as it is and rounded, and the command that measures it."""

    model: str
    exact_perplexity: float
    perplexity: float
    source: str

    @property
    def change(self) -> float:
        """Relative; above 0 where rounding makes the model worse."""
        return self.perplexity / self.exact_perplexity - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DtypeOption:
    """What the machine would do with weights, or the cache, in one dtype.

    `bytes` of the checkpoint, or of the cache of one token; generated tokens per second of the best policy,
    0 where memory holds none; `quality` is what rounding was measured to do to some models.
    """

    dtype: str
    bytes: int
    generated_tokens_per_s: float
    quality: tuple[Quality, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """One way to run a class on a machine.

    One copy of the model spans `gpus` GPUs (tensor parallelism); the machine runs `data_parallel` copies. Of
    the experts each of the GPUs has, as `expert_shares` says, a part of every one's width or whole ones.
    `threads` compute on the host. `sequences` (N) are in flight together, in `micro_batches` groups of
    `micro_batch` (μ). `attention_gpu_share` of the micro-batches attend on the GPU, `kv_gpu_share` of them
    out of GPU memory; the rest of the cache is in host memory. Weights rest at `weights_on`. Of each layer's
    routed experts `resident_share` stay where they are computed, `experts_cpu_share` are computed by the CPU
    in decode, `experts_disk_share` are read from disk in every pass. `staged` weights go through a pinned
    ring. `weights_dtype` is what weights are held in: as the checkpoint stores them, or rounded to fp8 by
    the engine as it loads them, or experts packed before by `runtime_min quantize`; `weights_options` are
    those it was chosen from, empty where there was no choice; `kv_dtype` and `kv_options` likewise say what
    keys and values are kept in. `corrections` say which rates the user's
    measurements changed; pass times stay as predicted. `resident_experts` are listed where the spec says
    which experts are popular; else the first of each layer are.
    """

    machine: Machine
    serves: ClassName
    engine: Engine
    gpus: int
    data_parallel: int
    threads: int
    dtype: Dtype
    sequences: int
    micro_batch: int
    micro_batches: int
    prefill_tokens: int
    attention_gpu_share: float
    kv_gpu_share: float
    weights_on: LevelName
    resident_share: float
    experts_cpu_share: float
    experts_disk_share: float
    staged: bool
    pages: Pages
    memory: tuple[MemoryUse, ...]
    limits: tuple[MemoryLimit, ...]
    prefill: PassTime
    decode: PassTime
    prefill_tokens_per_s: Estimate
    decode_tokens_per_s: Estimate
    generated_tokens_per_s: Estimate
    rates: tuple[BucketRate, ...]
    bottleneck: Bottleneck
    expert_shares: ExpertShares = "width"
    weights_dtype: WeightsDtype = "checkpoint"
    weights_options: tuple[DtypeOption, ...] = ()
    kv_dtype: KvDtype = "same"
    kv_options: tuple[DtypeOption, ...] = ()
    corrections: tuple[Correction, ...] = ()
    resident_experts: tuple[ResidentExperts, ...] = ()

    @property
    def rehearsed_only(self) -> bool:
        """Whether it has never run where it would: the runtime's GPU path was only tried with a CPU in its
        place."""
        return self.engine == "runtime_min" and self.gpus > 0

    def used_bytes(self, level: LevelName) -> int:
        """Sum of what the policy holds at `level`."""
        return sum(use.bytes for use in self.memory if use.level == level)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityBound:
    """What no schedule of an offloaded policy can exceed, and whether memory or arithmetic is the bound.

    Memory holds the cache of `sequences` half-done requests, and each gets a token when the weights have
    passed once, in `pass_s`.
    """

    generated_tokens_per_s: float
    binds: Literal["memory", "compute"]
    sequences: float
    pass_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """Why one machine cannot run one class: the constraint in numbers, and what would help.

    `excess` is what is needed over what there is, to find the nearest miss.
    """

    machine: str
    serves: ClassName
    constraint: str
    message: str
    hint: str
    excess: float
