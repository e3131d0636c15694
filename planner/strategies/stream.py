"""A machine without a GPU: weights in memory, or streamed from disk page by page while the cores compute.

One pass over the layers takes as long as the busier of disk and cores. The search maximises generated
tokens per second, prefill included, over the number of sequences; what memory is left holds resident pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moeplan.planner import costs
from moeplan.planner.ir.policy import MemoryLimit, Pages, PassTime, Policy, Rejection
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.strategies.common import (
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

PROCESS_BYTES = 512 << 20  # Python, torch and its thread pools
ALIGNMENT_BYTES = 4096  # of direct reads
READERS = 4  # threads that read the blocks of a page: with 256 KiB to 4 MiB blocks, near a disk's full rate
BLOCK_BYTES = 1 << 20
_MICRO_BATCH = 128
_PREFILL_TOKENS = 2048
_PAGE_BYTES = 1 << 20  # pages of at least a mebibyte read at the disk's full rate
_SLOTS = 4
_SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# An operator shorter than this runs on one thread: to start and join threads takes some microseconds, and
# milliseconds while another process holds one of their cores.
_WORTH_SHARING_S = 20e-6
# Small operators that the runtime launches: per attention call, per layer, per expert.
CALLS_ATTENTION, CALLS_LAYER, CALLS_EXPERT = 30, 12, 8
# Decode attention takes sequences of similar length in one call: the shortest at least 0.75 of the longest.
_CALLS_SPAN, _SIMILAR = 8, 0.75


def stream_policy(
    workload: Workload, requests: RequestClass, roofline: Roofline, memory_limit_bytes: int | None
) -> Policy | Rejection:
    """Return the fastest policy of a machine without a GPU, or what memory is short."""
    limit = float(memory_limit_bytes or roofline.roof("dram").bytes * HOST_SHARE)
    sizes = [n for n in _SEQUENCES if n < requests.requests] + [requests.requests]
    points = [_Point(workload, requests, roofline, limit, n) for n in sizes if n <= _SEQUENCES[-1]] or [
        _Point(workload, requests, roofline, limit, _SEQUENCES[-1])
    ]
    feasible = [point for point in points if point.fits]
    if not feasible:
        return _refusal(points[0])
    speed = np.array([point.generated_tokens_per_s for point in feasible])
    return feasible[smallest_of_best(speed, np.array([float(p.sequences) for p in feasible]))].policy()


def stream_figures(
    workload: Workload,
    requests: RequestClass,
    roofline: Roofline,
    policy: Policy,
    sequences: int,
    slower: Slower,
) -> Figures:
    """What the machine does with `sequences` of `requests` in flight, in the memory that `policy` may use."""
    limit = next(limit.bytes for limit in policy.limits if limit.level == "dram")
    point = _Point(workload, requests, roofline, float(limit), sequences)
    prefill_s, decode_s = point.prefill.seconds * slower.prefill, point.decode.seconds * slower.decode
    return batch_figures(requests, sequences, prefill_s, decode_s)


@dataclass(frozen=True)
class _Point:
    """One candidate: `sequences` in flight within `limit` bytes of memory."""

    workload: Workload
    requests: RequestClass
    roofline: Roofline
    limit: float
    sequences: int

    @property
    def micro_batch(self) -> int:
        return min(self.sequences, _MICRO_BATCH)

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.sequences / self.micro_batch)

    @property
    def prefill_tokens(self) -> int:
        return max(_PREFILL_TOKENS, self.requests.prompt_tokens_max)

    # Pages

    @property
    def experts_per_page(self) -> int:
        model = self.workload.model
        if not model.experts:
            return 0
        stored = model.expert_parameters() * model.stored_bytes_per_expert_parameter
        return min(model.experts, math.ceil(_PAGE_BYTES / stored))

    @property
    def expert_pages(self) -> int:
        return math.ceil(self.workload.model.experts / self.experts_per_page) if self.experts_per_page else 0

    @property
    def pages_per_layer(self) -> int:
        return 1 + self.expert_pages

    @property
    def page_parameters(self) -> list[int]:
        """Parameters of each page of one layer: attention, then experts."""
        model = self.workload.model
        experts, size = model.experts, self.experts_per_page
        counts = [min(size, experts - first) for first in range(0, experts, size)] if size else []
        return [model.parameters.attention // model.layers] + [n * model.expert_parameters() for n in counts]

    def _stored_bytes_per_parameter(self, page: int) -> float:
        model = self.workload.model
        return model.stored_bytes_per_expert_parameter if page else model.stored_bytes_per_other_parameter

    @property
    def slot_bytes(self) -> int:
        """The largest page as stored, each of its tensors cut out in whole blocks."""
        sizes = []
        for number, parameters in enumerate(self.page_parameters):
            tensors = 3 * self.experts_per_page if number else 4
            stored = parameters * self._stored_bytes_per_parameter(number)
            sizes.append(math.ceil(stored / ALIGNMENT_BYTES) + 2 * tensors)
        return max(sizes) * ALIGNMENT_BYTES

    @property
    def resident_pages(self) -> int:
        """The most leading pages of every layer that memory holds; all of them if it can."""
        layers, size = self.workload.model.layers, self.workload.value_bytes
        held = np.cumsum([n * layers * size for n in self.page_parameters])
        room = self.limit - self._fixed_bytes
        if held[-1] <= room:
            return self.pages_per_layer
        return int(np.searchsorted(held, room - self._slots_bytes_if_streaming, side="right"))

    @property
    def slots(self) -> int:
        streamed = self.pages_per_layer - self.resident_pages
        return min(_SLOTS, streamed * self.workload.model.layers)

    @property
    def _slots_bytes_if_streaming(self) -> int:
        return _SLOTS * self.slot_bytes

    # Memory

    @property
    def always_bytes(self) -> int:
        """Weights outside pages: embeddings, LM head, norms, routers, shared experts and dense MLPs."""
        p = self.workload.model.parameters
        return (p.total() - p.attention - p.routed_experts) * self.workload.value_bytes

    @property
    def kv_bytes(self) -> float:
        return float(
            np.asarray(costs.kv_bytes_held(self.workload, self.sequences, self.requests.context_tokens_max))
        )

    @property
    def workspace_bytes(self) -> int:
        """Item by item what runtime_min.plan_file.workspace_bytes counts; a test holds the two together."""
        model, requests = self.workload.model, self.requests
        attention = model.attention
        tokens = self.sequences * requests.prompt_tokens_max
        per_token = 8 * model.hidden + 24 + 64 * model.experts_per_token
        widest = max(
            3 * model.hidden + 8 * (attention.heads + attention.kv_heads) * attention.head_dim,
            3 * model.hidden + 3 * model.expert_intermediate,
            4 * model.experts,
        )
        call_tokens = min(
            tokens, max(self.prefill_tokens, requests.prompt_tokens_max, self.micro_batch, 1024)
        )
        mask = 8 * self.micro_batch * requests.context_tokens_max
        logits = 4 * (self.sequences + self.micro_batch) * model.vocab
        rope = 16 * requests.context_tokens_max * attention.head_dim
        page = 4 * max(self.page_parameters)
        loading = READERS * (BLOCK_BYTES + 2 * ALIGNMENT_BYTES) + (32 << 20)
        return tokens * per_token + 4 * call_tokens * widest + mask + logits + rope + page + loading

    @property
    def _fixed_bytes(self) -> float:
        return PROCESS_BYTES + self.always_bytes + self.kv_bytes + self.workspace_bytes

    @property
    def resident_page_bytes(self) -> int:
        held = sum(self.page_parameters[: self.resident_pages])
        return held * self.workload.model.layers * self.workload.value_bytes

    @property
    def used_bytes(self) -> float:
        return self._fixed_bytes + self.resident_page_bytes + self.slots * self.slot_bytes

    @property
    def fits(self) -> bool:
        return self.used_bytes <= self.limit

    # Time

    @property
    def streamed_bytes(self) -> float:
        """Bytes that every pass reads: whole pages, whichever experts are hit."""
        pages = [n * self._stored_bytes_per_parameter(p) for p, n in enumerate(self.page_parameters)]
        return sum(pages[self.resident_pages :]) * self.workload.model.layers

    @property
    def _disk_s(self) -> float:
        if not self.roofline.has("disk") or self.streamed_bytes == 0:
            return 0.0 if self.streamed_bytes == 0 else math.inf
        return self.streamed_bytes / self.roofline.roof("disk").up_bytes_per_s

    def _launch_s(self, attention_calls: int, tokens: float) -> float:
        return self._calls(attention_calls, tokens) * self.roofline.machine.launch_s

    def _calls(self, attention_calls: int, tokens: float) -> float:
        """Operator calls of one pass."""
        model = self.workload.model
        experts = model.experts * float(np.asarray(costs.touched_expert_share(model, tokens)))
        calls = CALLS_ATTENTION * attention_calls + CALLS_LAYER + CALLS_EXPERT * experts
        calls += _CALLS_SPAN * (self._spans - 1)
        return model.layers * calls

    @property
    def threads(self) -> int:
        """All cores, or one where operators are so small that sharing them costs more than it saves."""
        cores = host_threads(self.roofline)
        calls = self._calls(self.micro_batches, self.sequences)
        return 1 if self._decode_arithmetic_s * cores / calls < _WORTH_SHARING_S else cores

    @property
    def _slowdown(self) -> float:
        """How much longer arithmetic takes on `threads` than on all cores."""
        return host_threads(self.roofline) / self.threads

    @property
    def _decode_arithmetic_s(self) -> float:
        requests, dram = self.requests, self.roofline.roof("dram")
        context = requests.mean_prompt_tokens() + requests.mean_output_tokens() / 2
        tokens, operators = float(self.sequences), self.workload.operators
        return float(np.asarray(costs.call_seconds(self.workload, operators, dram, tokens, context)))

    @property
    def _spans(self) -> int:
        """Groups of similar length among the sequences of a batch, half-way through decoding."""
        requests = self.requests
        decoded = requests.mean_output_tokens() / 2
        ratio = (requests.prompt_tokens_max + decoded) / (requests.prompt_tokens_min + decoded)
        return min(self.sequences, 1 + int(math.log(ratio) / -math.log(_SIMILAR)))

    @property
    def _decode_launch_s(self) -> float:
        return self._launch_s(self.micro_batches, self.sequences)

    @property
    def decode(self) -> PassTime:
        compute = self._decode_arithmetic_s * self._slowdown + self._decode_launch_s
        return PassTime(lanes=lanes([("cores", compute), ("disk", self._disk_s)]), serial_s=0.0)

    @property
    def prefill(self) -> PassTime:
        prompt, dram = self.requests.mean_prompt_tokens(), self.roofline.roof("dram")
        work = float(np.asarray(costs.prefill_flops(self.workload, float(self.sequences), prompt)))
        tokens = self.sequences * prompt
        calls = math.ceil(tokens / self.prefill_tokens) + self.sequences
        compute = work / dram.prefill_flops_per_s * self._slowdown + self._launch_s(calls, tokens)
        return PassTime(lanes=lanes([("cores", compute), ("disk", self._disk_s)]), serial_s=0.0)

    @property
    def generated_tokens_per_s(self) -> float:
        seconds = run_seconds(self.requests, self.sequences, self.prefill.seconds, self.decode.seconds)
        return float(self.requests.requests * self.requests.mean_output_tokens() / seconds)

    def policy(self) -> Policy:
        roofline, requests = self.roofline, self.requests
        prefill, decode = self.prefill, self.decode
        streamed = self.streamed_bytes > 0
        return Policy(
            machine=roofline.machine,
            serves=requests.name,
            engine="runtime_min",
            gpus=0,
            data_parallel=1,
            threads=self.threads,
            dtype=self.roofline.dtype,
            sequences=self.sequences,
            micro_batch=self.micro_batch,
            micro_batches=self.micro_batches,
            prefill_tokens=self.prefill_tokens,
            attention_gpu_share=0.0,
            kv_gpu_share=0.0,
            weights_on="disk" if streamed else "dram",
            resident_share=self.resident_pages / self.pages_per_layer,
            experts_cpu_share=1.0,
            experts_disk_share=0.0,
            staged=False,
            pages=Pages(
                pages_per_layer=self.pages_per_layer,
                experts_per_page=self.experts_per_page,
                resident_pages=self.resident_pages,
                slots=self.slots,
                slot_bytes=self.slot_bytes if streamed else 0,
                readers=READERS,
                block_bytes=BLOCK_BYTES,
            ),
            memory=uses("dram", self._memory()),
            limits=(MemoryLimit(level="dram", bytes=int(self.limit)),),
            prefill=prefill,
            decode=decode,
            prefill_tokens_per_s=estimate(
                roofline, self.sequences * requests.mean_prompt_tokens() / prefill.seconds
            ),
            decode_tokens_per_s=estimate(
                roofline, self.sequences * requests.decode_occupancy() / decode.seconds
            ),
            generated_tokens_per_s=estimate(roofline, self.generated_tokens_per_s),
            rates=batch_rates(roofline, requests, self.sequences, prefill, decode, gpus=0),
            bottleneck=bottleneck(requests, prefill, decode),
        )

    def _memory(self) -> list[tuple[str, float]]:
        return [
            ("weights", self.always_bytes + self.resident_page_bytes),
            ("page slots", self.slots * self.slot_bytes),
            ("KV cache", self.kv_bytes),
            ("workspace", self.workspace_bytes),
            ("process", PROCESS_BYTES),
        ]


def _refusal(point: _Point) -> Rejection:
    return too_small(
        point.roofline,
        point.requests,
        "dram",
        point.used_bytes,
        point.limit,
        f"{point.workload.model.name} streamed, one sequence in flight,",
        "more memory, or shorter requests",
    )
