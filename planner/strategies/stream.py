"""A machine without a GPU: weights in memory, or streamed from disk page by page while the cores compute.

One pass over the layers takes as long as the busier of disk and cores. The search maximises generated
tokens per second, prefill included, over the number of sequences, and over what decode reads: whole layers,
or the pages that routing hits, some of them guessed. What memory is left holds resident pages.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from moeplan.planner import costs
from moeplan.planner.ir.estimate import Z90, Estimate
from moeplan.planner.ir.machine import Kernels
from moeplan.planner.ir.model import PACKED_BYTES, SCALED
from moeplan.planner.ir.policy import (
    MemoryLimit,
    Pages,
    PassTime,
    Policy,
    Rejection,
    WeightsDtype,
)
from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.strategies.common import (
    HOST_SHARE,
    PLATEAU,
    Slower,
    batch_figures,
    batch_rates,
    bottleneck,
    decode_passes,
    decode_rate,
    estimate,
    lanes,
    run_seconds,
    smallest_of_best,
    too_small,
    uses,
)
from moeplan.planner.strategies.dtypes import dtype_options, most_exact
from moeplan.planner.strategies.routed import (
    RIGHT_SHARE,
    RoutedLayer,
    entering_passes,
    expected_use,
    routed_seconds,
)
from moeplan.planner.strategies.runtime_costs import PassShape, RuntimeCosts, kernels_of
from moeplan.planner.strategies.task_costs import TaskCost, TaskCosts

T = TypeVar("T")
PROCESS_BYTES = 512 << 20  # Python, torch and its thread pools
ALIGNMENT_BYTES = 4096  # of direct reads
KV_BLOCK_TOKENS = 32
PASS_TOKENS = 32768  # of prompts that one pass takes at most, where they are shorter
READERS = 4  # threads that read the blocks of a page: with 256 KiB to 4 MiB blocks, near a disk's full rate
BLOCK_BYTES = 1 << 20
_MICRO_BATCH = 128
_PREFILL_TOKENS = 2048
_PAGE_BYTES = 1 << 20  # pages of at least a mebibyte read at the disk's full rate
_ROUTED_PAGE_BYTES = 256 << 10  # smaller ones would be cheaper to read together
_SLOTS = 4
_GUESSES = (0, 1, 2, 4, 8)
_WORTH_ROUTING = 0.8  # of a layer's moving pages hit: beyond it whole layers are read
_SEQUENCES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# More than one thread must win this much: they wait for each other actively, and a busy neighbour that takes
# a core of theirs costs milliseconds at every wait.
_WORTH_SHARING = 1.25
_SIMULATED_LAYERS = 8
_ROUNDING = 1e-9  # of sums in another order


def stream_policy(
    workload: Workload, requests: RequestClass, roofline: Roofline, memory_limit_bytes: int | None
) -> Policy | Rejection:
    """Return the fastest policy of a machine without a GPU, or what memory is short."""
    weights: tuple[WeightsDtype, ...] = ("checkpoint", *costs.packings(workload))
    caches = costs.kv_dtypes(workload)
    points = {
        held: _best_point(costs.held_as(workload, *held), requests, roofline, memory_limit_bytes)
        for held in itertools.product(weights, caches)
    }
    rates = {held: p.generated_tokens_per_s if p.fits else 0.0 for held, p in points.items()}
    # The cache is chosen first: rounding it changes less than rounding weights.
    caches_of = {w: most_exact({kv: rates[w, kv] for kv in caches}) for w in weights}
    chosen = most_exact({w: rates[w, caches_of[w]] for w in weights})
    if not rates[chosen, caches_of[chosen]]:
        return _refusal(points[weights[-1], caches[-1]])
    sizes = {w: points[w, caches_of[w]].workload.model.weight_bytes() for w in weights}
    return replace(
        points[chosen, caches_of[chosen]].policy(),
        weights_dtype=chosen,
        weights_options=dtype_options({w: (sizes[w], rates[w, caches_of[w]]) for w in weights}),
        kv_dtype=caches_of[chosen],
        kv_options=dtype_options(
            {kv: (points[chosen, kv].token_bytes, rates[chosen, kv]) for kv in caches}, "kv-"
        ),
    )


def _best_point(
    workload: Workload, requests: RequestClass, roofline: Roofline, memory_limit_bytes: int | None
) -> _Point:
    """The fastest candidate, or, where memory holds none, one sequence."""
    workload = workload.as_one_expert()
    limit = float(memory_limit_bytes or roofline.roof("dram").bytes * HOST_SHARE)
    sizes = [n for n in _SEQUENCES if n < requests.requests] + [requests.requests]
    sizes = [n for n in sizes if n <= _SEQUENCES[-1]] or [_SEQUENCES[-1]]
    points = [
        point
        for n in sizes
        for kernels in kernels_of(roofline)
        for point in _ways_to_read(_Point(workload, requests, roofline, limit, n, kernels))
    ]
    feasible = [point for point in points if point.fits]
    if not feasible:
        return points[0]
    speed = _speeds(feasible)
    return feasible[smallest_of_best(speed, np.array([float(p.sequences) for p in feasible]))]


def _speeds(points: Sequence[_Point]) -> NDArray[np.float64]:
    """Tokens per second of each; 0 where a bound says that it is not on the plateau of the best."""
    speed, best = np.zeros(len(points)), 0.0
    bounds = np.array([p.most_tokens_per_s / p.shared for p in points])
    for at in np.argsort(-bounds, kind="stable"):
        if bounds[at] < best * (1.0 - PLATEAU) * (1.0 - _ROUNDING):
            break
        speed[at] = points[at].generated_tokens_per_s / points[at].shared
        best = max(best, speed[at])
    return speed


def stream_figures(
    workload: Workload,
    requests: RequestClass,
    roofline: Roofline,
    policy: Policy,
    sequences: int,
    slower: Slower,
) -> Figures:
    """What the machine does with `sequences` of `requests` in flight, in the memory that `policy` may use."""
    point = _point_of(workload, requests, roofline, policy, sequences)
    prefill_s, decode_s = point.prefill.seconds * slower.prefill, point.decode.seconds * slower.decode
    return batch_figures(requests, sequences, prefill_s, decode_s)


def stream_fits(
    workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy, sequences: int
) -> bool:
    """Whether the memory that `policy` may use holds `sequences` of `requests`."""
    return _point_of(workload, requests, roofline, policy, sequences).fits


def stream_tasks(workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy) -> TaskCosts:
    """The tasks of a decode pass, by operation; together they take what the policy's lanes take."""
    return _point_of(workload, requests, roofline, policy, policy.sequences).decode_tasks


def _point_of(
    workload: Workload, requests: RequestClass, roofline: Roofline, policy: Policy, sequences: int
) -> _Point:
    """The candidate with `sequences` in flight, in the memory and on the threads that `policy` may use."""
    limit = next(limit.bytes for limit in policy.limits if limit.level == "dram")
    kernels = next(k for k in kernels_of(roofline) if k.threads == policy.threads)
    workload = costs.held_as(workload, policy.weights_dtype, policy.kv_dtype).as_one_expert()
    point = _Point(workload, requests, roofline, float(limit), sequences, kernels)
    held = policy.pages.resident_pages == policy.pages.pages_per_layer
    return replace(point, held=held, routed=policy.pages.places > 0, most_guesses=policy.pages.guesses)


def _ways_to_read(whole: _Point) -> Iterator[_Point]:
    """Nothing where memory holds all; else whole layers, or the pages that routing hits where those are
    clearly fewer."""
    held = replace(whole, held=True)
    if held.fits:
        yield held
        return
    yield whole
    routed = replace(whole, routed=True)
    if routed.fits and 0 < routed.hit_pages < _WORTH_ROUTING * routed.moving_expert_pages:
        most = min(routed.places, int(routed.hit_pages))
        yield from (replace(routed, most_guesses=n) for n in _GUESSES if n <= most)


def overlapped(
    compute: Sequence[float], reads: Sequence[float], slots: int, layers: int, ends_s: float
) -> float:
    """Seconds of one pass among many alike, in which pages are read into `slots` slots while others compute.

    `compute` and `reads` are seconds per page of a layer; a page without a read is resident, `ends_s` are
    arithmetic outside the layers. A read waits for the disk and for the page that last lay in its slot; a
    computation for the cores and its page. Of many layers some stand for all.
    """
    simulated = min(layers, _SIMULATED_LAYERS)
    disk = cores = first = 0.0
    freed = deque([0.0] * slots, maxlen=slots)
    pages = list(zip(compute, reads, strict=True)) * simulated
    for _ in range(2):  # the second pass begins with the pages that were read ahead
        first = cores
        for work_s, read_s in pages:
            if not read_s:
                cores += work_s
                continue
            free = freed[0]
            disk = (disk if disk > free else free) + read_s  # `max` takes three times as long
            cores = (cores if cores > disk else disk) + work_s
            freed.append(cores)
        cores += ends_s * simulated / layers
    return (cores - first) * layers / simulated


class _PassTimes(NamedTuple):
    """Seconds at work of each lane alone, and of both together where each takes so many times as long.
    `ahead_s`: reads for a pass that may come before it."""

    cores_s: float
    disk_s: float
    ahead_s: float
    seconds: Callable[[float, float], float]


@dataclass(frozen=True)
class _Point:
    """One candidate: `sequences` in flight within `limit` bytes of memory.

    `held`: all weights lie there, the experts of a layer in one page, since each page costs a row of the
    schedule. `routed`: decode reads only the pages that routing hits, up to `most_guesses` of each layer
    before it is routed, `right_share` of which are hit.
    """

    workload: Workload
    requests: RequestClass
    roofline: Roofline
    limit: float
    sequences: int
    kernels: Kernels
    held: bool = False
    routed: bool = False
    most_guesses: int = 0
    right_share: float = RIGHT_SHARE

    @cached_property
    def micro_batch(self) -> int:
        return min(self.sequences, _MICRO_BATCH)

    @cached_property
    def micro_batches(self) -> int:
        return math.ceil(self.sequences / self.micro_batch)

    @cached_property
    def prefill_tokens(self) -> int:
        return _PREFILL_TOKENS

    # Pages

    @cached_property
    def experts_per_page(self) -> int:
        model = self.workload.model
        if not model.experts or self.held:
            return model.experts
        stored = model.expert_page_bytes(1, model.stored_bytes_per_expert_parameter)
        wanted = _ROUTED_PAGE_BYTES if self.routed else _PAGE_BYTES
        return min(model.experts, math.ceil(wanted / stored))

    @cached_property
    def expert_pages(self) -> int:
        return math.ceil(self.workload.model.experts / self.experts_per_page) if self.experts_per_page else 0

    @cached_property
    def pages_per_layer(self) -> int:
        return 1 + self.expert_pages

    @cached_property
    def page_parameters(self) -> list[int]:
        """Parameters of each page of one layer: attention, then experts."""
        model, one = self.workload.model, self.workload.model.expert_parameters()
        return [model.parameters.attention // model.layers, *(n * one for n in self._experts_of_pages)]

    @cached_property
    def _experts_of_pages(self) -> list[int]:
        """How many experts each page of them has."""
        size = max(1, self.experts_per_page)
        full, rest = divmod(self.workload.model.experts, size)
        return [size] * full + [rest] * bool(rest)

    def _of_pages(self, value: Callable[[int], T]) -> list[T]:
        """`value` of each page's number of experts, of which there are two at most."""
        values = {n: value(n) for n in set(self._experts_of_pages)}
        return [values[n] for n in self._experts_of_pages]

    @cached_property
    def _stored_page_bytes(self) -> list[float]:
        """Bytes of each page of one layer in the checkpoint."""
        model = self.workload.model
        if model.packing not in SCALED:
            attention, *experts = self.page_parameters
            return [attention * model.stored_bytes_per_other_parameter] + [
                n * model.stored_bytes_per_expert_parameter for n in experts
            ]
        plain = max(2.0, model.stored_bytes_per_other_parameter)  # of biases and sinks
        experts_bytes = self._of_pages(lambda n: model.expert_page_bytes(n, plain))
        return [model.attention_page_bytes(plain), *experts_bytes]

    @cached_property
    def slot_bytes(self) -> int:
        """The largest page as stored, each of its tensors cut out in whole blocks."""
        attention, *experts = self._stored_page_bytes[:2]  # of those with experts the first is the largest
        wide, deep = (14, 6) if self.workload.model.packing in SCALED else (9, 4)  # tensors
        blocks = [math.ceil(attention / ALIGNMENT_BYTES) + 2 * wide]
        blocks += [
            math.ceil(stored / ALIGNMENT_BYTES) + 2 * deep * self.experts_per_page for stored in experts
        ]
        return max(blocks) * ALIGNMENT_BYTES

    @cached_property
    def _page_bytes(self) -> list[int]:
        """Bytes in memory of each page, of all layers that have it: experts are not in all."""
        model, size = self.workload.model, self.workload.value_bytes
        attention = int(model.attention_page_bytes(size)) * model.layers
        experts = self._of_pages(lambda n: math.ceil(model.expert_page_bytes(n, size)) * model.moe_layers)
        return [attention, *experts]

    @cached_property
    def resident_pages(self) -> int:
        """The most leading pages of every layer that memory holds."""
        if self.held:
            return self.pages_per_layer
        room = self.limit - self._fixed_bytes - self._slots_bytes_if_streaming
        return int(np.searchsorted(np.cumsum(self._page_bytes), room, side="right"))

    @cached_property
    def slots(self) -> int:
        streamed = self.pages_per_layer - self.resident_pages
        return min(_SLOTS + self.most_guesses, streamed * self.workload.model.layers)

    @cached_property
    def moving_expert_pages(self) -> int:
        """Pages of experts of a layer that are not resident."""
        return self.pages_per_layer - max(1, self.resident_pages)

    @cached_property
    def places(self) -> int:
        """The most of them that a decode pass can hit, as runtime_min.plan_file.most_places has it."""
        hits = self.sequences * self.workload.model.experts_per_token
        return max(0, min(self.moving_expert_pages, hits)) if self.routed else 0

    @cached_property
    def guesses(self) -> int:
        return min(self.most_guesses, self.places)

    @cached_property
    def hit_pages(self) -> float:
        """How many of them a mean decode pass hits: 1 - (1 - K/E)^N of all where a page is an expert."""
        tokens = self.sequences * self.experts_per_page
        share = float(np.asarray(costs.touched_expert_share(self.workload.model, tokens)))
        return min(float(self.places), share * self.moving_expert_pages)

    @cached_property
    def shared(self) -> float:
        """The factor by which this point must be faster than another of one thread."""
        return 1.0 if self.kernels.threads == 1 else _WORTH_SHARING

    @cached_property
    def _slots_bytes_if_streaming(self) -> int:
        return (_SLOTS + self.most_guesses) * self.slot_bytes

    # Memory

    @cached_property
    def always_bytes(self) -> int:
        """Weights outside pages: embeddings, LM head, norms, routers, shared experts and dense MLPs."""
        model, p = self.workload.model, self.workload.model.parameters
        always = p.total() - p.attention - p.routed_experts - model.scaled.mlp_values
        return always * self.workload.value_bytes + model.scaled.mlp_bytes + 4 * model.router_corrections

    @cached_property
    def kv_bytes(self) -> float:
        """Of sequences that each hold the blocks for the longest context, in all layers: the runtime keeps
        what is behind a window."""
        context = -(-self.requests.context_tokens_max // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
        return float(self.sequences * context * self.token_bytes)

    @cached_property
    def token_bytes(self) -> int:
        """Of one token's keys and values in all layers."""
        values = self.workload.model.layers * self.workload.model.attention.kv_values_per_token()
        return round(values * self.workload.kv_value_bytes)

    @property
    def pass_tokens(self) -> int:
        """As runtime_min.plan_file.pass_tokens has it."""
        prompt = self.requests.prompt_tokens_max
        return min(self.sequences * prompt, max(PASS_TOKENS, prompt, self.sequences))

    @cached_property
    def workspace_bytes(self) -> int:
        """Item by item what runtime_min.plan_file.workspace_bytes counts; a test holds the two together."""
        model, requests = self.workload.model, self.requests
        attention = model.attention
        tokens = self.pass_tokens
        per_token = 8 * model.hidden + 24 + 64 * model.experts_per_token
        latent = attention.kv_lora_dim + attention.rope_dim
        values = 8 * (attention.heads + attention.kv_heads) * attention.head_dim
        width = max(model.expert_intermediate, model.dense_intermediate, model.shared_intermediate)
        wide = 3 * model.hidden + max(values, 3 * width, 6 * attention.heads * latent)
        widest = max(wide, 4 * model.experts)
        expanded = 2 * requests.context_tokens_max * attention.heads * attention.head_dim if latent else 0
        mask = 8 * self.micro_batch * requests.context_tokens_max
        logits = 4 * (self.sequences + self.micro_batch) * model.vocab
        rope = 16 * requests.context_tokens_max * attention.head_dim
        first, *others = self.page_parameters
        page = 4 * max(first, model.expert_parameters() if self.held else max(others, default=0))
        loading = READERS * (BLOCK_BYTES + 2 * ALIGNMENT_BYTES) + (32 << 20)
        call = 4 * (self._call_tokens * widest + expanded)
        return tokens * per_token + call + mask + logits + rope + page + loading

    @cached_property
    def _fixed_bytes(self) -> float:
        return PROCESS_BYTES + self.always_bytes + self.kv_bytes + self.workspace_bytes

    @cached_property
    def resident_page_bytes(self) -> int:
        return sum(self._page_bytes[: self.resident_pages])

    @cached_property
    def used_bytes(self) -> float:
        return self._fixed_bytes + self.resident_page_bytes + self.slots * self.slot_bytes

    @cached_property
    def fits(self) -> bool:
        return self.used_bytes <= self.limit

    # Time

    @cached_property
    def streamed_bytes(self) -> float:
        """Bytes of the pages that move; a pass reads all of them unless it is routed."""
        model, stored = self.workload.model, self._stored_page_bytes
        experts = sum(stored[max(1, self.resident_pages) :]) * model.moe_layers
        return experts + (stored[0] * model.layers if self.resident_pages == 0 else 0.0)

    @cached_property
    def _decode_step(self) -> PassShape:
        requests = self.requests
        return PassShape(
            prefill=False,
            tokens=self.sequences,
            sequences=self.sequences,
            context=requests.mean_bucket().context_tokens,
            calls=self.micro_batches,
            spans=self.micro_batches,
            call_tokens=self._call_tokens,
        )

    @cached_property
    def _prefill_step(self) -> PassShape:
        """One of the passes that read all prompts. Whole prompts share a call while they fit; those of equal
        length share a product of scores."""
        requests, prompt = self.requests, self.requests.mean_prompt_tokens()
        sequences = self.sequences / self._prefill_passes
        pieces = math.ceil(prompt / self._call_tokens)  # of each prompt
        calls = math.ceil(sequences * pieces / max(1, int(self.prefill_tokens / prompt)))
        alike = requests.prompt_tokens_min == requests.prompt_tokens_max
        return PassShape(
            prefill=True,
            tokens=sequences * prompt,
            sequences=sequences,
            context=prompt,
            calls=calls,
            spans=calls if alike else max(calls, sequences * pieces),
            call_tokens=self._call_tokens,
        )

    @cached_property
    def _call_tokens(self) -> int:
        """As runtime_min.plan_file.call_tokens has it."""
        return min(self.pass_tokens, max(self.prefill_tokens, self.micro_batch, 1024))

    def _pass(self, step: PassShape) -> PassTime:
        """Cores and disk overlap; each slows the other down while it works."""
        return self._pass_time(self._times(step))

    def _pass_time(self, times: _PassTimes) -> PassTime:
        if times.disk_s == 0:
            return PassTime(lanes=lanes([("cores", times.cores_s), ("disk", 0.0)]), serial_s=0.0)
        machine, alone_s = self.roofline.machine, times.seconds(1.0, 1.0)
        slower = 1 + (1 / machine.compute_kept - 1) * min(1.0, times.disk_s / alone_s)
        longer = 1 + (1 / machine.disk_kept - 1) * min(1.0, times.cores_s / alone_s)
        seconds = times.seconds(slower, longer)
        cores_s, disk_s = times.cores_s * slower, times.disk_s * longer
        # What neither lane explains is waiting for a page while every slot is full or empty.
        waiting_s = seconds - max(cores_s, disk_s)
        return PassTime(lanes=lanes([("cores", cores_s), ("disk", disk_s)]), serial_s=max(0.0, waiting_s))

    def _least_s(self, step: PassShape) -> float:
        """A lower bound of the pass: both lanes never take longer than one after the other, and a read begins
        once the page that lay in its slot is used, so all but one read per slot lie within the pass."""
        times, machine = self._times(step), self.roofline.machine
        if not 0 < times.disk_s < math.inf:
            return times.cores_s
        longest_s = times.cores_s + times.disk_s
        slower = 1 + (1 / machine.compute_kept - 1) * times.disk_s / longest_s
        longer = 1 + (1 / machine.disk_kept - 1) * times.cores_s / longest_s
        return max(times.cores_s * slower, (times.disk_s - times.ahead_s) * longer)

    def _times(self, step: PassShape) -> _PassTimes:
        routed = self.places > 0 and not step.prefill
        return self._routed_times(step) if routed else self._whole_times(step)

    def _ahead_s(self, read_s: float) -> float:
        """A read of `read_s` for each slot; a few layers stand for all."""
        layers = self.workload.model.layers
        return self.slots * read_s * layers / min(layers, _SIMULATED_LAYERS)

    def _whole_times(self, step: PassShape) -> _PassTimes:
        """A pass that reads every page that moves."""
        compute, ends = self._compute(step)
        reads, layers = self._reads_s, self.workload.model.layers

        def seconds(slower: float, longer: float) -> float:
            cores, disk = [c * slower for c in compute], [r * longer for r in reads]
            return overlapped(cores, disk, self.slots, layers, ends * slower)

        ahead_s = self._ahead_s(max(reads))
        return _PassTimes(layers * sum(compute) + ends, layers * sum(reads), ahead_s, seconds)

    def _routed_times(self, step: PassShape) -> _PassTimes:
        """A pass that reads the pages that routing hits."""
        (at, ends), layers = self._routed_layer(step), self.workload.model.layers

        def seconds(slower: float, longer: float) -> float:
            return routed_seconds(at.scaled(slower, longer), self.slots, layers, ends * slower)

        ahead_s = self._ahead_s(max(at.attention_read_s, at.guess_s))
        return _PassTimes(layers * at.cores_s + ends, layers * at.disk_s, ahead_s, seconds)

    def _routed_layer(self, step: PassShape) -> tuple[RoutedLayer, float]:
        """A layer's tasks, and the seconds of arithmetic at both ends of the pass."""
        (attention, *experts), ends = self._compute(step)
        resident = max(1, self.resident_pages)
        read_s = max(self._reads_s[resident:])  # the last page may have fewer experts
        right = [self.right_share] * self.guesses
        fetched = expected_use(self.hit_pages - sum(right), self.places)
        computed_s = sum(experts[resident - 1 :])
        layer = RoutedLayer(
            attention_s=attention,
            attention_read_s=self._reads_s[0],
            expect_s=self._costs.route(step) if self.guesses else 0.0,
            resident_s=tuple(experts[: resident - 1]),
            hits_s=tuple(computed_s * share / self.hit_pages for share in (*right, *fetched)),
            fetches_s=tuple(read_s * share for share in fetched),
            guesses=self.guesses,
            guess_s=read_s,
        )
        return layer, ends

    def _compute(self, step: PassShape) -> tuple[list[float], float]:
        """Seconds of arithmetic per page of a layer, and at both ends of the pass."""
        at = self._costs
        share = self.workload.model.moe_layers / self.workload.model.layers  # layers with experts and without
        pages = [
            at.attention(step) + at.route(step),
            *self._of_pages(lambda n: share * at.experts(step, n)),
        ]
        return pages, at.ends(step, self.micro_batch, self._rows(step))

    @cached_property
    def _costs(self) -> RuntimeCosts:
        model, size = self.workload.model, self.workload.value_bytes
        p = model.parameters
        experts = p.routed_experts * PACKED_BYTES.get(model.packing, size)
        # Passes that hit few experts hit others each time.
        weights_bytes = experts + (p.total() - p.embedding - p.routed_experts) * size
        return RuntimeCosts(
            model=model,
            kernels=self.kernels,
            value_bytes=size,
            kv_value_bytes=self.workload.kv_value_bytes,
            weights_bytes=weights_bytes,
        )

    def _rows(self, step: PassShape) -> float:
        """Rows of the compute lane in one pass: an attention call each, routing, pages; both ends."""
        pages = self.pages_per_layer
        if self.places and not step.prefill:
            pages = (
                max(1, self.resident_pages) + self.guesses + self.places + 2
            )  # and what follows from routing
        return 2 + self.workload.model.layers * (step.calls + pages)

    @cached_property
    def _reads_s(self) -> list[float]:
        """Seconds to read each page of a layer; zero where it is resident."""
        if not self.roofline.has("disk"):
            return [0.0 if p < self.resident_pages else math.inf for p in range(self.pages_per_layer)]
        rate = self.roofline.roof("disk").up_bytes_per_s
        share = self.workload.model.moe_layers / self.workload.model.layers
        return [
            0.0 if p < self.resident_pages else stored / rate * (share if p else 1.0)
            for p, stored in enumerate(self._stored_page_bytes)
        ]

    @cached_property
    def decode_tasks(self) -> TaskCosts:
        """Tasks of the decode pass, each slowed down as much as its lane is by the other."""
        step = self._decode_step
        times = self._times(step)
        lane = {lane.lane: lane.seconds for lane in self.decode.lanes}
        slower = lane["cores"] / times.cores_s
        longer = lane["disk"] / times.disk_s if times.disk_s else 1.0
        (attention, *experts), ends = self._compute(step)
        tasks = {
            "embed": TaskCost(),
            "read": TaskCost(seconds_of_item=tuple(longer * s for s in self._reads_s)),
            "attention": TaskCost(seconds=slower * attention / self.micro_batches),
            "route": TaskCost(),
            "experts": TaskCost(seconds_of_item=(0.0, *(slower * s for s in experts))),
            "head": TaskCost(seconds=slower * ends),
        }
        return tasks | (self._place_tasks(slower, longer) if self.places else {})

    def _place_tasks(self, slower: float, longer: float) -> dict[str, TaskCost]:
        """What a routed pass has besides; places are numbered from 1."""
        at = self._routed_layer(self._decode_step)[0].scaled(slower, longer)
        return {
            "expect": TaskCost(seconds=at.expect_s),
            "guess": TaskCost(seconds=at.guess_s),
            "place": TaskCost(),
            "fetch": TaskCost(seconds_of_item=(0.0, *[0.0] * self.guesses, *at.fetches_s)),
            "hit": TaskCost(seconds_of_item=(0.0, *at.hits_s)),
        }

    @cached_property
    def decode(self) -> PassTime:
        return self._pass(self._decode_step)

    @cached_property
    def prefill(self) -> PassTime:
        """All prompts of a batch: of long ones, in several passes."""
        passes, once = self._prefill_passes, self._pass(self._prefill_step)
        if passes == 1:
            return once
        times = [(lane.lane, passes * lane.seconds) for lane in once.lanes]
        return PassTime(lanes=lanes(times), serial_s=passes * once.serial_s)

    @property
    def _prefill_passes(self) -> int:
        return math.ceil(self.sequences * self.requests.mean_prompt_tokens() / self.pass_tokens)

    @cached_property
    def decode_tokens_per_s(self) -> float:
        return float(decode_rate(self.requests, self.sequences, self.decode.seconds))

    @cached_property
    def generated_tokens_per_s(self) -> float:
        return self._tokens_per_s(self.prefill.seconds, self.decode.seconds, self.entering_s)

    @property
    def most_tokens_per_s(self) -> float:
        """What `generated_tokens_per_s` never exceeds, by arithmetic alone."""
        prefill_s = self._prefill_passes * self._least_s(self._prefill_step)
        return self._tokens_per_s(prefill_s, self._least_s(self._decode_step))

    def _tokens_per_s(self, prefill_s: float, decode_s: float, entering_s: float = 0.0) -> float:
        seconds = run_seconds(self.requests, self.sequences, prefill_s, decode_s) + entering_s
        return float(self.requests.requests * self.requests.mean_output_tokens() / seconds)

    @cached_property
    def entering_s(self) -> float:
        """What all decode passes take longer because prompts enter routed ones, which then read whole layers.

        Outputs of one length end together, so prompts enter together: such passes are charged as prefill.
        """
        requests, mean = self.requests, self.requests.mean_output_tokens()
        if not self.places or requests.output_tokens_max <= mean:
            return 0.0
        passes = float(decode_passes(requests, self.sequences))
        charged = requests.requests / self.sequences
        whole = self._pass_time(self._whole_times(self._decode_step))
        more = max(0.0, entering_passes(passes, self.sequences, mean) - charged)
        return more * max(0.0, whole.seconds - self.decode.seconds)

    def _estimate(self, value: float, passes: Sequence[tuple[float, PassTime]], slowest: float) -> Estimate:
        """A prediction from so many of each of `passes`, the less sure the longer the disk is read in them.

        Its interval reaches as far down again as to `slowest`: what no right guess would give.
        """
        seconds = sum(count * one.seconds for count, one in passes)
        disk = (count * lane.seconds for count, one in passes for lane in one.lanes if lane.lane == "disk")
        unsteady = self.roofline.machine.disk_sigma * sum(disk) / seconds
        prediction = estimate(self.roofline, value)
        further = math.log(value / slowest) / Z90
        return replace(prediction, sigma=math.hypot(prediction.sigma, unsteady, further))

    def policy(self) -> Policy:
        roofline, requests = self.roofline, self.requests
        blind = replace(self, right_share=0.0) if self.guesses else self
        prefill, decode = self.prefill, self.decode
        prompt_rate = self.sequences * requests.mean_prompt_tokens() / prefill.seconds
        batches, passes = requests.requests / self.sequences, float(decode_passes(requests, self.sequences))
        streamed = self.streamed_bytes > 0
        return Policy(
            machine=roofline.machine,
            serves=requests.name,
            engine="runtime_min",
            gpus=0,
            data_parallel=1,
            threads=self.kernels.threads,
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
                places=self.places,
                guesses=self.guesses,
                hit_pages=self.hit_pages if self.places else 0.0,
            ),
            memory=uses("dram", self._memory()),
            limits=(MemoryLimit(level="dram", bytes=int(self.limit)),),
            prefill=prefill,
            decode=decode,
            prefill_tokens_per_s=self._estimate(prompt_rate, [(1, prefill)], prompt_rate),
            decode_tokens_per_s=self._estimate(
                self.decode_tokens_per_s, [(1, decode)], blind.decode_tokens_per_s
            ),
            generated_tokens_per_s=self._estimate(
                self.generated_tokens_per_s,
                [(batches, prefill), (passes, decode)],
                blind.generated_tokens_per_s,
            ),
            rates=batch_rates(
                roofline, requests, self.sequences, prefill, decode, 0, entering_s=self.entering_s
            ),
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
