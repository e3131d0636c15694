"""What one offloaded pass costs: seconds of every lane and bytes of every memory, many candidates at once.

A model spans some GPUs, each with its share of every matrix. Its N = μ·n_ub sequences pass through the layers
in micro-batches, each of which attends in one of three ways: on the GPU out of GPU memory, on the GPU out of
a cache copied up from the host, or on the CPU. A layer's experts are ranked by popularity: the most popular
stay on the GPU, the least popular are computed by the CPU, those between are streamed, the last of these from
disk where host memory cannot hold them. A pass takes as long as its busiest lane, and longer where others are
about as busy.
Source: MoE-Lightning (ASPLOS'25), section 4.2, Eq. 12-14 and its released optimiser's memory tables, with
their faults mended: PV counts, attention is charged at mean length, residency is in whole experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moeplan.planner import costs
from moeplan.planner.ir.policy import ResidentExperts
from moeplan.planner.ir.roofline import Roof, Roofline
from moeplan.planner.ir.workload import Operator, OperatorName, RequestClass, Workload
from moeplan.planner.serving import ALL_REDUCE_S, PEER_EFFICIENCY, exchange_s, kv_copies
from moeplan.planner.strategies.common import GPU_SHARE
from moeplan.planner.strategies.whole_experts import busiest_choices, busiest_hits

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Items = list[tuple[str, Array]]
Lanes = dict[str, Array]
_T = TypeVar("_T")

# Pinned memory may take this share of the host's; the kernel and the page cache need pages that move.
PINNED_SHARE = 0.6
# Weights that are not pinned pass through a pinned ring: 0.72 of the pinned link rate (8.4-9.1 against
# 11.9-12.3 GB/s in MoE-Lightning's runs on an L4 host), and three touches of DRAM: read, write, DMA read.
_STAGED_LINK_SHARE = 0.72
STAGED_TOUCHES = 3
# Lanes wait for each other's micro-batches and share DRAM, so near the balance point they do not overlap
# fully: t = (sum of t_lane^p)^(1/p). p was chosen on MoE-Lightning's runs (1.5 to 6 tried): with 2 the link
# that fits the L4's is about the 12.3 GB/s measured on its own (Fig. 9), with the maximum 8.4
# (benchmarks/published_runs.py).
_OVERLAP = 2.0
_DISK_TOUCHES = 2  # direct reads land in the ring: write, DMA read
_CALLS_PER_MICRO_BATCH = 30  # operator launches per layer and micro-batch, without experts
# Of each expert that is hit, on the GPU or by the CPU: runtime_min.operations.add_experts.
_CALLS_PER_EXPERT = 9
_HOST_PROCESS_BYTES = 4 << 30  # interpreter, CUDA context's host part, file cache the kernel insists on
_PREFILL_TOKENS = 4096
_LOADING_BYTES = 64 << 20  # blocks of the readers, and what the allocator holds
SPARE_SLOTS = 2  # pinned pages beside those of one layer, for what is staged ahead
_CORES: tuple[OperatorName, ...] = ("attention_core", "windowed_attention_core")


@dataclass(frozen=True)
class Shapes:
    """Per element: the GPUs that share the model, whether each has `whole` experts, not a part of every
    one's width, μ and n_ub. Arrays of all records here may be of other shapes that broadcast."""

    gpus: Array
    whole: Mask
    micro_batch: Array
    micro_batches: Array

    @property
    def dealt(self) -> Array:
        """Experts of a layer that are placed at once: where whole, one of each GPU's."""
        return np.where(self.whole, self.gpus, 1.0)


@dataclass(frozen=True)
class Prompts:
    """Per element, prompts that pass through the layers together: tokens and FLOPs of all, what the routed
    experts of the busiest GPU take of them times the GPUs, their `Experts.key`, how many of a layer's
    experts they hit, all-reduce seconds, and their cache."""

    tokens: Array
    flops: Array
    expert_flops: Array
    key: Array
    hits: Array
    reduce_s: Array
    cache_bytes: Array


@dataclass(frozen=True)
class Units(Shapes):
    """One unit of each decision, per element: seconds and bytes in one decode pass.

    Of one micro-batch: `*_attention_s`, and the bytes of its attention output (up), its QKV (down), its
    routed hidden states (each way), and its cache. Of the whole pass: `*_experts_s` with all experts in one
    place, `gpu_other_s` everything else, `sum_s` of it summing over the GPUs once in each layer. `*_key` are
    `Experts.key` of the tokens of a pass and of a call, and a call hits `call_hits` of a layer's experts.
    `longest_cache_bytes` is a micro-batch's cache on the GPU at the longest request, `scratch_bytes` what a
    call's operations take, `prompts` are those of all sequences.
    """

    gpu_other_s: Array
    sum_s: Array
    gpu_experts_s: Array
    gpu_attention_s: Array
    cpu_attention_s: Array
    cpu_experts_s: Array
    attended_bytes: Array
    qkv_bytes: Array
    routed_bytes: Array
    cache_bytes: Array
    pass_key: Array
    call_key: Array
    call_hits: Array
    longest_cache_bytes: Array
    scratch_bytes: Array
    prompts: Prompts


@dataclass(frozen=True)
class Layout:
    """Candidates before the CPU's share of experts is chosen, per element.

    `on_gpu` micro-batches keep their cache in GPU memory, `cache_up` have it copied up from the host.
    Where `streams`, prefill streams all experts that are not resident; otherwise none ever moves, and the
    CPU computes them in both phases. `most_resident` experts of a layer fit the GPU (below 0: nothing does),
    `room_bytes` of host memory are left for experts.
    """

    units: Units
    on_gpu: Array
    cache_up: Array
    streams: Mask
    most_resident: Array
    room_bytes: Array


_LAYOUT = fields(Layout)


@dataclass(frozen=True)
class Point(Layout):
    """Candidates in full: experts of a layer that are resident, on the CPU, and streamed from disk."""

    resident: Array
    cpu_experts: Array
    disk_experts: Array
    staged: Mask
    feasible: Mask

    @property
    def sequences(self) -> Array:
        """Sequences in flight."""
        return self.units.micro_batch * self.units.micro_batches

    @property
    def cpu_micro_batches(self) -> Array:
        """Micro-batches that attend on the CPU."""
        return self.units.micro_batches - self.on_gpu - self.cache_up


def take(record: _T, index: NDArray[np.intp] | slice | Mask) -> _T:
    """A record of arrays at `index`, nested records included."""
    return _changed(record, lambda array: array[index])


def flat(record: _T, where: Mask) -> _T:
    """The elements at which `where` is true, of a record of arrays that broadcast to it."""
    return _changed(record, lambda array: np.broadcast_to(array, where.shape)[where])


def _changed(record: _T, change: Callable[[NDArray[Any]], NDArray[Any]]) -> _T:
    values = vars(record).items()
    return type(record)(
        **{k: change(v) if isinstance(v, np.ndarray) else _changed(v, change) for k, v in values}
    )


@dataclass(frozen=True)
class Experts:
    """How many of a layer's `rank` most popular experts some tokens hit: E(1 - (1 - k/E)^n) where all are
    alike, else the sum of 1 - (1 - p)^n over the layers' mean of each rank's share p of the tokens."""

    workload: Workload

    @cached_property
    def layers(self) -> Array:
        """[layers, experts]: the share of tokens that each expert sees, most popular first; one layer stands
        for all where experts are alike."""
        model = self.workload.model
        if not self.workload.popularity:
            return np.full((1, model.experts), model.experts_per_token / max(1, model.experts))
        return np.array([sorted(layer.token_share, reverse=True) for layer in self.workload.popularity])

    @cached_property
    def _shares(self) -> Array:
        """By rank, the share of tokens that an expert sees; empty where all see the same."""
        return self.layers.mean(axis=0) if self.workload.popularity else np.zeros(0)

    def key(self, tokens: Array) -> Array:
        """What `hits` needs to know of a number of tokens."""
        if self._shares.size:
            return np.asarray(tokens, dtype=float)
        return np.asarray(costs.touched_expert_share(self.workload.model, tokens))

    def hits(self, key: Array, rank: Array) -> Array:
        """Experts hit among the first `rank`."""
        if not self._shares.size:
            return key * rank
        tokens, place = np.unique(key, return_inverse=True)
        each = 1.0 - (1.0 - self._shares) ** tokens[:, None]
        first = np.concatenate([np.zeros((len(tokens), 1)), np.cumsum(each, axis=1)], axis=1)
        return np.asarray(first[place, np.clip(rank, 0, self._shares.size).astype(int)])

    def token_share(self, rank: Array) -> Array:
        """The share of all expert calls that go to the first `rank`."""
        if not self._shares.size:
            return rank / self.workload.model.experts
        first = np.concatenate([[0.0], np.cumsum(self._shares)]) / self._shares.sum()
        return np.asarray(first[np.clip(rank, 0, self._shares.size).astype(int)])

    def most_popular(self, count: int) -> tuple[ResidentExperts, ...]:
        """The first `count` of every layer by popularity, ties by number; empty where all are alike."""
        return tuple(
            ResidentExperts(layer=layer.layer, experts=layer.ranked[:count])
            for layer in self.workload.popularity
        )


@dataclass(frozen=True)
class Costs:
    """Times and memory of one class on one machine; `host_limit_bytes` is what a plan may use of the host."""

    workload: Workload
    requests: RequestClass
    roofline: Roofline
    host_limit_bytes: float

    # Sizes

    @cached_property
    def experts(self) -> Experts:
        return Experts(self.workload)

    @cached_property
    def expert_bytes(self) -> float:
        """One expert of all layers, as computed with."""
        model = self.workload.model
        size = costs.held_bytes_per_parameter(model.stored_bytes_per_expert_parameter, self.workload)
        return float(model.expert_parameters() * model.moe_layers * size)

    @property
    def _stored_expert_bytes(self) -> float:
        """One expert of all layers, as the disk has it."""
        model = self.workload.model
        return model.expert_parameters() * model.moe_layers * model.stored_bytes_per_expert_parameter

    @cached_property
    def _disk_holds_the_model(self) -> bool:
        size = self.workload.model.weight_bytes()
        return self.roofline.has("disk") and size <= self.roofline.roof("disk").bytes

    @property
    def _layer_expert_bytes(self) -> float:
        return self.expert_bytes / self.workload.model.moe_layers

    @property
    def prefill_tokens(self) -> int:
        return max(_PREFILL_TOKENS, self.requests.prompt_tokens_max)

    @property
    def pinned_limit_bytes(self) -> float:
        return PINNED_SHARE * self.roofline.roof("dram").bytes

    def gpu_limit_bytes(self, gpus: Array) -> Array:
        return np.asarray(self.roofline.roof("gpu").bytes * GPU_SHARE * gpus)

    def cache_copies(self, gpus: Array) -> Array:
        """How often the GPUs hold one cache."""
        return np.asarray(kv_copies(self.workload.model.attention, gpus))

    def all_reduce_s(self, tokens: Array, gpus: Array) -> Array:
        """Seconds of the two all-reduces of every layer over `tokens` tokens; none on one GPU."""
        reached = self.roofline.machine.peer_bytes_per_s * PEER_EFFICIENCY
        moving_s = exchange_s(self.workload, reached, gpus, tokens)
        return np.where(gpus > 1, 2 * self.workload.model.layers * ALL_REDUCE_S + moving_s, 0.0)

    def _held(self, sequences: Array, context: float) -> Array:
        """Bytes of cache, in all layers alike: the runtime keeps and moves what is behind a window too."""
        values = self.workload.model.layers * self.workload.model.attention.kv_values_per_token()
        return np.asarray(sequences * context * values * self.workload.value_bytes)

    # Units

    @property
    def gpu_roof(self) -> Roof:
        """The GPU as the kernels of offloaded experts see it."""
        return offloading_roof(self.roofline.roof("gpu"))

    @property
    def launches_s(self) -> float:
        """Launching the operators of one micro-batch, all layers."""
        return self.workload.model.layers * _CALLS_PER_MICRO_BATCH * self.roofline.machine.launch_s

    @property
    def _expert_launches_s(self) -> float:
        """Calling the operators of one expert of every layer: about as long on a CPU as on a GPU."""
        return self.workload.model.moe_layers * _CALLS_PER_EXPERT * self.roofline.machine.launch_s

    @cached_property
    def context(self) -> float:
        """Tokens in a sequence's cache, on average over decoding."""
        return self.requests.mean_bucket().context_tokens

    def units(self, shapes: Shapes) -> Units:
        """The units of every shape."""
        workload, model, size = self.workload, self.workload.model, self.workload.value_bytes
        gpu, dram = self.gpu_roof, self.roofline.roof("dram")
        cores, other = _split(workload.operators)
        micro, count, gpus = shapes.micro_batch, shapes.micro_batches, shapes.gpus

        def seconds(operators: list[Operator], roof: object) -> Array:
            return np.asarray(costs.call_seconds(workload, operators, roof, micro, self.context))  # type: ignore[arg-type]

        values = micro * size * model.layers
        attention, call_key = model.attention, self.experts.key(micro)
        call_hits = self.experts.hits(call_key, np.full_like(micro, model.experts))
        gpu_experts_s, cpu_experts_s = self._experts_s(shapes, call_hits)
        longest = self._held(micro, self.requests.context_tokens_max)
        return Units(
            gpus=gpus,
            whole=shapes.whole,
            micro_batch=micro,
            micro_batches=count,
            gpu_other_s=count
            * (seconds(other, gpu) / gpus + self.launches_s + self.all_reduce_s(micro, gpus)),
            sum_s=count * self.all_reduce_s(micro, gpus) / 2,
            gpu_experts_s=count * gpu_experts_s,
            gpu_attention_s=seconds(cores, gpu) / gpus,
            cpu_attention_s=seconds(cores, dram) * self.cache_copies(gpus),
            cpu_experts_s=count * cpu_experts_s,
            attended_bytes=values * attention.attended_values(),
            qkv_bytes=values * (attention.attended_values() + attention.kv_values_per_token()),
            routed_bytes=micro * size * model.moe_layers * model.hidden,
            cache_bytes=self._held(micro, self.context),
            pass_key=self.experts.key(micro * count),
            call_key=call_key,
            call_hits=call_hits,
            longest_cache_bytes=self.cache_copies(gpus) * longest,
            scratch_bytes=self._scratch_bytes(shapes),
            prompts=self.prompts(micro * count, shapes),
        )

    def _experts_s(self, shapes: Shapes, call_hits: Array) -> tuple[Array, Array]:
        """Seconds of a call of all layers' routed experts, which hits so many of one, if the GPUs compute all
        and if the CPU does. Whole experts take as long as the busiest GPU's; a part of them counts as uneven
        as all are."""
        choices, hits = (
            self._busiest(part, shapes, shapes.micro_batch) for part in (busiest_choices, busiest_hits)
        )
        experts = self.workload.operator("routed_experts")

        def seconds(roof: Roof) -> Array:
            parts = costs.operator_parts(self.workload, experts, roof, shapes.micro_batch, 0.0)
            return np.asarray(costs.knee(hits * parts[0], choices * parts[1]))

        called_s = call_hits * hits / shapes.dealt * self._expert_launches_s
        on_gpu, on_cpu = seconds(self.gpu_roof) / shapes.gpus, seconds(self.roofline.roof("dram"))
        return on_gpu + called_s, on_cpu + called_s

    def _busiest(self, part: Callable[[Array, int, Array], Array], shapes: Shapes, tokens: Array) -> Array:
        """A `part` of `whole_experts` of calls of `tokens`; 1 where experts are cut, and all do the same."""
        whole, gpus, tokens = np.broadcast_arrays(shapes.whole, shapes.gpus, tokens)
        found = np.ones_like(gpus)
        for degree in np.unique(shapes.gpus[shapes.whole]):
            some = whole & (gpus == degree)
            found[some] = part(self.experts.layers, int(degree), tokens[some])
        return found

    def prompts(self, count: Array, shapes: Shapes) -> Prompts:
        """`count` prompts of the mean size on the GPUs of `shapes`, in pieces of `prefill_tokens`."""
        prompt = self.requests.mean_prompt_tokens()
        tokens = count * prompt
        key = self.experts.key(tokens)
        choices = self._busiest(busiest_choices, shapes, np.minimum(tokens, self.prefill_tokens))
        return Prompts(
            tokens=tokens,
            flops=np.asarray(costs.prefill_flops(self.workload, count, prompt)),
            expert_flops=choices * tokens * self.workload.operator("routed_experts").flops_per_token,
            key=key,
            hits=self.experts.hits(key, np.full_like(tokens, self.workload.model.experts)),
            reduce_s=self.all_reduce_s(tokens, shapes.gpus),
            cache_bytes=self._held(count, prompt),
        )

    # Memory

    def gpu_items(self, point: Layout) -> Items:
        """What the GPUs hold beside experts. Each has its share of embeddings, heads and MLPs, and all of
        norms and routers, and of keys and values that others have too."""
        model, p, units = self.workload.model, self.workload.model.parameters, point.units
        held = costs.held_bytes_per_parameter(model.stored_bytes_per_other_parameter, self.workload)
        one, gpus = units.longest_cache_bytes, units.gpus
        fullest = gpus * np.ceil(model.vocab / gpus) / model.vocab  # as if all held what the fullest holds
        keys = 2 * model.layers * model.hidden * model.attention.kv_heads * model.attention.head_dim
        dense = p.attention + p.shared_experts + p.dense_mlp + (self.cache_copies(gpus) - 1) * keys
        return [
            ("embedding", p.embedding * held * fullest),
            ("LM head", p.lm_head * held * fullest),
            ("attention and other dense weights", (dense + gpus * (p.router + p.norms)) * held),
            ("KV cache", point.on_gpu * one),
            ("KV pages", np.where(point.cache_up > 0, 2.0 * one / model.layers, 0.0)),
            ("micro-batch buffers", units.gpus * self._micro_batch_bytes(point)),
            ("prefill buffers", units.gpus * self._piece_bytes(point)),
            ("workspace", units.gpus * units.scratch_bytes),
        ]

    # Item by item what runtime_min.offload_memory counts; a test holds the two together.

    @property
    def _choice_bytes(self) -> float:
        """A token's experts and their weights, and its hidden state: what the CPU's experts need."""
        model = self.workload.model
        return model.hidden * self.workload.value_bytes + 12.0 * model.experts_per_token

    def _head_bytes(self, gpus: Array) -> tuple[Array, Array]:
        """Of a token, its queries (or attention output) on one GPU, and what is cached of it there."""
        a, size = self.workload.model.attention, self.workload.value_bytes
        queries, keys = (size * values / gpus for values in (a.attended_values(), a.kv_values_per_token()))
        return queries, keys * self.cache_copies(gpus)

    def _micro_batch_bytes(self, point: Layout) -> Array:
        """Hidden states, QKV, attention output and what the CPU's experts exchange, of all micro-batches, on
        one GPU."""
        model, size, units = self.workload.model, self.workload.value_bytes, point.units
        sequences, (queries, keys) = units.micro_batch * units.micro_batches, self._head_bytes(units.gpus)
        on_cpu = units.micro_batch * (units.micro_batches - point.on_gpu - point.cache_up)
        qkv = on_cpu * (queries + keys)
        exchanged = self._choice_bytes + size * model.hidden
        return qkv + sequences * (queries + exchanged + 4.0 * model.hidden)

    def _new_cache_bytes(self, point: Layout) -> Array:
        """Two pieces' or micro-batches' new keys and values of one layer, on their way to the host."""
        outside = point.units.micro_batches - point.on_gpu
        rows = np.where(outside > 0, np.maximum(self.prefill_tokens, point.units.micro_batch), 0.0)
        return np.asarray(2.0 * rows * self._head_bytes(point.units.gpus)[1])

    def _piece_bytes(self, point: Layout) -> Array:
        """Two pieces of prefill in and out, and what the CPU's experts exchange where they prefill too."""
        hidden = self.workload.value_bytes * self.workload.model.hidden
        exchanged = np.where(point.streams, 0.0, 2.0 * (self._choice_bytes + hidden))
        return self._new_cache_bytes(point) + self.prefill_tokens * (4.0 * hidden + exchanged)

    def _scratch_bytes(self, shapes: Shapes) -> Array:
        """What the operations of one call take: runtime_min.plan_file.scratch_bytes; of several GPUs each
        needs room for what it adds to a sum."""
        model, a = self.workload.model, self.workload.model.attention
        gpus, micro_batch = shapes.gpus, shapes.micro_batch
        tokens, context = self.prefill_tokens, self.requests.context_tokens_max
        width = np.maximum(
            model.expert_intermediate * shapes.dealt,
            max(model.dense_intermediate, model.shared_intermediate),
        )
        latent = a.kv_lora_dim + a.rope_dim
        heads = (a.heads + a.kv_heads * self.cache_copies(gpus)) / gpus
        values = np.maximum(8 * heads * a.head_dim, 3 * width / gpus)
        values = np.maximum(values, 6 * a.heads * latent)
        widest: Array = np.maximum(3 * model.hidden + values, 4 * model.experts)
        expanded = 2 * context * a.heads * a.head_dim if latent else 0
        called = self.workload.value_bytes * (np.maximum(tokens, micro_batch) * widest + expanded)
        per_sequence = 8.0 * context + 4.0 * model.vocab
        summed = np.where(gpus > 1, (4 + self.workload.value_bytes) * model.hidden, 0)
        per_token = 8 * model.hidden + 24 + 64 * model.experts_per_token + summed
        room = tokens * per_token + called + micro_batch * per_sequence + 16.0 * context * a.head_dim
        return np.asarray(room)

    def _pinned_bytes(self, point: Layout) -> Array:
        """The host's side of one GPU's buffers, and the hidden states of all prompts, which wait there."""
        units, hidden = point.units, self.workload.value_bytes * self.workload.model.hidden
        tokens = units.micro_batch * units.micro_batches * self.requests.prompt_tokens_max
        exchanged = (tokens + self.prefill_tokens) * self._choice_bytes + tokens * hidden
        shared = self._micro_batch_bytes(point) + self._new_cache_bytes(point)
        return shared + tokens * hidden + np.where(point.streams, 0.0, exchanged)

    def gpu_expert_items(self, point: Point) -> Items:
        """Experts on the GPUs: those that stay, and two layers' pages of those that stream."""
        streamed = np.where(point.streams, self.workload.model.experts - point.resident, 0.0)
        return [
            ("resident experts", point.resident * self.expert_bytes),
            ("weight pages", 2.0 * streamed * self._layer_expert_bytes),
        ]

    def host_items(self, point: Layout) -> Items:
        """What the host holds beside experts, for all GPUs: each has a process of its own."""
        units, requests = point.units, self.requests
        outside = (units.micro_batches - point.on_gpu) * units.micro_batch
        return [
            ("KV cache", self.cache_copies(units.gpus) * self._held(outside, requests.context_tokens_max)),
            ("pinned buffers", units.gpus * self._pinned_bytes(point)),
            ("workspace", units.gpus * (units.scratch_bytes + _LOADING_BYTES)),
            ("process", units.gpus * _HOST_PROCESS_BYTES),
        ]

    def host_expert_items(self, point: Point) -> Items:
        """Experts in host memory, and a pinned ring where they are staged."""
        held = self.workload.model.experts - point.resident - point.disk_experts
        weights = held * self.expert_bytes
        return [
            ("expert weights", np.where(point.streams & ~point.staged, 0.0, weights)),
            ("pinned expert weights", np.where(point.streams & ~point.staged, weights, 0.0)),
            ("pinned pages", np.where(point.staged, self.ring_bytes(point.units, point.resident), 0.0)),
        ]

    def ring_bytes(self, units: Units, resident: Array) -> Array:
        """The pinned rings of all GPUs, where weights are staged."""
        layer = (self.workload.model.experts - resident) * self._layer_expert_bytes
        return layer * (1.0 + SPARE_SLOTS / units.micro_batches)

    def free_gpu_bytes(self, layout: Layout) -> Array:
        """What is left of GPU memory for experts; below 0 where even the rest does not fit."""
        return self.gpu_limit_bytes(layout.units.gpus) - total(self.gpu_items(layout))

    def layout(self, units: Units, on_gpu: Array, cache_up: Array, streams: Mask) -> Layout:
        """Candidates with the room that is left for experts on the GPU and in the host."""
        model = self.workload.model
        empty = unfilled(units, on_gpu, cache_up, streams)
        free = self.free_gpu_bytes(empty)
        pages = np.where(streams, 2.0 * self._layer_expert_bytes, 0.0)
        # r resident take r·(one expert of all layers) + (E - r)·(two pages): linear, so closed form.
        slope = np.maximum(self.expert_bytes - pages, 1.0)
        most = np.floor((free - model.experts * pages) / slope)
        all_fit = free >= model.experts * self.expert_bytes
        most = np.where(all_fit, model.experts, np.minimum(most, model.experts - 1.0))
        most = _rounded_down(most, units.dealt)
        room = self.host_limit_bytes - total(self.host_items(empty))
        return Layout(units, on_gpu, cache_up, streams, most, room)

    def point(self, layout: Layout, cpu_experts: Array) -> Point:
        """Candidates with `cpu_experts` of each layer on the CPU, rounded up to what is dealt at once (all
        that are not resident where nothing streams). Everything is pinned where it fits and may be: that is
        never slower; otherwise it is staged through a ring, and what host memory cannot hold comes from disk.
        """
        experts, dealt = float(self.workload.model.experts), layout.units.dealt
        cpu_experts = np.ceil(cpu_experts / dealt) * dealt
        cpu_experts = np.where(layout.streams, cpu_experts, experts - np.maximum(layout.most_resident, 0.0))
        resident = np.minimum(np.maximum(layout.most_resident, 0.0), experts - cpu_experts)
        outside = experts - resident
        weights = outside * self.expert_bytes
        pinned = weights <= np.minimum(layout.room_bytes, self.pinned_limit_bytes)
        staged = layout.streams & ~pinned
        left = layout.room_bytes - np.where(staged, self.ring_bytes(layout.units, resident), 0.0)
        held = np.clip(_rounded_down(left / self.expert_bytes, dealt), 0.0, outside)
        disk = outside - held
        readable = layout.streams & self._disk_holds_the_model | (disk == 0.0)
        feasible = (
            (layout.most_resident >= 0) & (left >= 0) & readable & (cpu_experts <= held) & (resident >= 0)
        )
        return Point(
            **{f.name: getattr(layout, f.name) for f in _LAYOUT},
            resident=resident,
            cpu_experts=cpu_experts,
            disk_experts=disk,
            staged=staged,
            feasible=feasible,
        )

    # Times

    def _link_s(self, point: Point, streamed: Array, hidden: Array | float) -> Array:
        """Each GPU has its own link; together they cannot outrun host memory (the dram lane)."""
        link = self.roofline.roof("dram").up_bytes_per_s * point.units.gpus
        return np.asarray(streamed / (link * np.where(point.staged, _STAGED_LINK_SHARE, 1.0)) + hidden / link)

    def outside_link_s(self, point: Point) -> Array:
        """The link's seconds for all streamed experts of a decode pass."""
        key = point.units.pass_key
        upto = self.experts.hits(key, self.workload.model.experts - point.cpu_experts)
        return self._link_s(point, self._streamed_bytes(point, key, upto), 0.0)

    def outside_cpu_s(self, point: Point) -> Array:
        """The CPU's seconds if it computed all experts that are not resident, in one decode pass."""
        resident = self.experts.hits(point.units.call_key, point.resident) / point.units.call_hits
        return point.units.cpu_experts_s * (1.0 - resident)

    def _streamed_bytes(self, point: Point, key: Array, upto: Array) -> Array:
        """Bytes to the GPU, where tokens of `key` hit `upto` experts that the CPU does not compute."""
        return (upto - self.experts.hits(key, point.resident)) * self.expert_bytes

    def _moved(self, point: Point, key: Array, cpu_experts: Array) -> tuple[Array, Array, Array]:
        """Of the experts that tokens of `key` hit: bytes to the GPU, bytes from disk, and the bytes of DRAM
        traffic that both cause."""
        first_cpu = self.workload.model.experts - cpu_experts
        upto = self.experts.hits(key, first_cpu)
        streamed = self._streamed_bytes(point, key, upto)
        from_disk = upto - self.experts.hits(key, first_cpu - point.disk_experts)
        touches = np.where(point.staged, STAGED_TOUCHES, 1)
        in_dram = streamed - from_disk * self.expert_bytes
        touched = touches * in_dram + _DISK_TOUCHES * from_disk * self.expert_bytes
        return streamed, from_disk * self._stored_expert_bytes, touched

    def _disk_s(self, from_disk: Array) -> Array:
        if not self.roofline.has("disk"):
            return 0.0 * from_disk
        return from_disk / self.roofline.roof("disk").up_bytes_per_s

    def decode_lanes(self, point: Point) -> Lanes:
        """Seconds of each lane in one decode pass.

        Hidden states of micro-batches that attend on the CPU go up once per layer, their QKV come down; so do
        the hidden states of all where the CPU computes experts, to and from each GPU, and a sum more.
        """
        u, dram = point.units, self.roofline.roof("dram")
        on_cpu, link = point.cpu_micro_batches, dram.up_bytes_per_s * u.gpus
        gpu_calls = self.experts.hits(u.call_key, self.workload.model.experts - point.cpu_experts)
        gpu_share = gpu_calls / u.call_hits
        streamed, from_disk, touched = self._moved(point, u.pass_key, point.cpu_experts)
        any_cpu = point.cpu_experts > 0
        routed = any_cpu * u.micro_batches * u.gpus * u.routed_bytes
        cache_up = point.cache_up * u.cache_bytes
        up_s = cache_up * self.cache_copies(u.gpus) / (dram.up_pageable_bytes_per_s * u.gpus)
        read = u.micro_batches * (u.call_hits - gpu_calls) * self.expert_bytes
        read = read + on_cpu * u.cache_bytes * self.cache_copies(u.gpus)
        return {
            "gpu": u.gpu_other_s
            + any_cpu * u.sum_s
            + u.gpu_experts_s * gpu_share
            + (point.on_gpu + point.cache_up) * u.gpu_attention_s,
            "h2d": self._link_s(point, streamed, on_cpu * u.attended_bytes + routed) + up_s,
            "d2h": (on_cpu * u.qkv_bytes + routed + cache_up / self.context) / link,
            "cpu": on_cpu * u.cpu_attention_s + u.cpu_experts_s * (1.0 - gpu_share),
            "dram": (touched + read + STAGED_TOUCHES * cache_up) / dram.bytes_per_s,
            "disk": self._disk_s(from_disk),
        }

    def prefill_lanes(self, point: Point, prompts: Prompts) -> Lanes:
        """Seconds of each lane while `prompts` pass through the layers once."""
        workload, model, u = self.workload, self.workload.model, point.units
        gpu, dram = self.roofline.roof("gpu"), self.roofline.roof("dram")
        link = dram.up_bytes_per_s * u.gpus
        cpu_share = 1.0 - self.experts.token_share(model.experts - self._prefill_cpu_experts(point))
        streamed, from_disk, touched = self._prefill_moved(point, prompts)
        parked, routed, cache = self.prefill_bytes(point, prompts)
        even = prompts.tokens * workload.operator("routed_experts").flops_per_token
        gpu_work = prompts.flops - even + (1.0 - cpu_share) * prompts.expert_flops
        read = prompts.hits * cpu_share
        sums = 1.0 + 0.5 * (self._prefill_cpu_experts(point) > 0)
        gpu_s = gpu_work / (gpu.offload_prefill_flops_per_s * u.gpus)
        return {
            "gpu": gpu_s + sums * prompts.reduce_s,
            "h2d": self._link_s(point, streamed, parked + routed),
            "d2h": (parked + cache + routed) / link,
            "cpu": cpu_share * prompts.expert_flops / dram.prefill_flops_per_s,
            "dram": (touched + read * self.expert_bytes + 2 * parked + cache) / dram.bytes_per_s,
            "disk": self._disk_s(from_disk),
        }

    def prefill_bytes(self, point: Point, prompts: Prompts) -> tuple[Array, Array, Array]:
        """Of `prompts`, all layers: hidden states that wait on the host and those that the CPU's experts
        take, each way and for each GPU, and the cache that goes to the host."""
        model, gpus = self.workload.model, point.units.gpus
        hidden = gpus * prompts.tokens * model.hidden * self.workload.value_bytes
        return (
            hidden * model.layers,
            (self._prefill_cpu_experts(point) > 0) * hidden * model.moe_layers,
            self.cache_copies(gpus) * prompts.cache_bytes * (1.0 - point.on_gpu / point.units.micro_batches),
        )

    def _prefill_cpu_experts(self, point: Point) -> Array:
        return np.where(point.streams, 0.0, point.cpu_experts)

    def _prefill_moved(self, point: Point, prompts: Prompts) -> tuple[Array, Array, Array]:
        return self._moved(point, prompts.key, self._prefill_cpu_experts(point))

    def weight_seconds(self, point: Point, decode: bool) -> tuple[Array, Array, Array]:
        """Seconds of the link, the disk and DRAM for the weights of a decode pass, or of one that
        prefills."""
        if decode:
            streamed, from_disk, touched = self._moved(point, point.units.pass_key, point.cpu_experts)
        else:
            streamed, from_disk, touched = self._prefill_moved(point, point.units.prompts)
        link_s = self._link_s(point, streamed, 0.0)
        return link_s, self._disk_s(from_disk), touched / self.roofline.roof("dram").bytes_per_s

    def serial_s(self, point: Point, lanes: Lanes) -> Array:
        """What a pass takes beyond its busiest lane."""
        return self.pass_s(point, lanes) - busiest(lanes)

    def pass_s(self, point: Point, lanes: Lanes) -> Array:
        """Seconds of a pass. Where n_ub = 1 GPU and CPU take turns: a lone micro-batch is on one of them at a
        time, and only the copies of weights run beside it."""
        in_turn = lanes["gpu"] + lanes["cpu"]
        alone = point.units.micro_batches == 1
        return np.maximum(together(lanes), np.where(alone, in_turn, 0.0))


def unfilled(units: Units, on_gpu: Array, cache_up: Array, streams: Mask) -> Layout:
    """Candidates without what room they leave."""
    none = np.zeros(1)
    return Layout(units, on_gpu, cache_up, streams, none, none)


def busiest(lanes: Lanes) -> Array:
    """Seconds of the busiest lane."""
    return np.asarray(np.maximum.reduce(list(lanes.values())))


def together(lanes: Lanes) -> Array:
    """Seconds of lanes that overlap: no less than the busiest, more where others are about as busy."""
    return np.asarray(sum(seconds**_OVERLAP for seconds in lanes.values()) ** (1.0 / _OVERLAP))


def _rounded_down(count: Array, dealt: Array) -> Array:
    """A number of experts, made one that can be placed."""
    return np.asarray(np.floor(count / dealt) * dealt)


def total(items: Items) -> Array:
    """Bytes of all items."""
    return np.asarray(sum(size for _, size in items))


def _split(operators: tuple[Operator, ...]) -> tuple[list[Operator], list[Operator]]:
    """Attention cores, and all others but routed experts."""
    cores = [op for op in operators if op.name in _CORES]
    return cores, [op for op in operators if op not in cores and op.name != "routed_experts"]


def offloading_roof(gpu: Roof) -> Roof:
    """A GPU as the kernels of offloaded experts see it: in decode they reach no more of the peak than in
    prefill, where their calls are largest."""
    part = min(1.0, gpu.offload_prefill_flops_per_s / gpu.flops_per_s)
    return replace(
        gpu,
        flops_per_s=part * gpu.flops_per_s,
        flops_8bit_per_s=part * gpu.flops_8bit_per_s,
        flops_4bit_per_s=part * gpu.flops_4bit_per_s,
    )
