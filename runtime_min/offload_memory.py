"""What an offload plan holds: weights where the plan wants them, pages, caches and buffers, allocated once.

A layer's experts that are not resident lie one after the other, each w1, w2, w3 (or what it has of fused
tensors) in the compute dtype: those of the CPU, those streamed from host memory, those from disk. Their bytes
are cut into equal pages, of which the last takes the remainder.

N sequences, B a micro-batch, T tokens of a piece, H hidden, K experts per token,
Q query heads, V key and value heads, D head dimension
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_min.attention import KvCache
from moeplan.runtime_min.checkpoint import TensorRef
from moeplan.runtime_min.checksums import Verification
from moeplan.runtime_min.lanes import Block
from moeplan.runtime_min.limits import check_items, stay_bytes
from moeplan.runtime_min.models.tensors import expert_names, expert_shapes
from moeplan.runtime_min.operations import DTYPES
from moeplan.runtime_min.pages import Reader, Shard, kept_as
from moeplan.runtime_min.plan_file import PlanFileError, RuntimePlan, kv_shape, scratch_bytes

READERS, _BLOCK_BYTES = 4, 4 << 20  # direct reads of this size reached the disks' rates in calibrations
_ROUNDING_BYTES = 4096  # what a plan's sizes may be short by, per buffer

Sizes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # of tensors, by name


@dataclass(frozen=True)
class Experts:
    """Which experts of each layer lie where, and the pages that hold those that are not resident."""

    plan: RuntimePlan
    pages: int
    dense: frozenset[int] = frozenset()  # layers without experts

    @property
    def outside(self) -> int:
        """How many of a layer are not resident."""
        return len(self._ranked(0)) - self.plan.offload.resident_experts

    @property
    def expert_bytes(self) -> int:
        m = self.plan.model
        return m.expert_parameters * DTYPES[m.compute_dtype].itemsize

    @property
    def layer_bytes(self) -> int:
        """Of all that are not resident."""
        return self.outside * self.expert_bytes

    @property
    def host_bytes(self) -> int:
        """Of a layer's part in host memory."""
        return self.layer_bytes - self.plan.offload.disk_experts * self.expert_bytes

    @property
    def cpu_bytes(self) -> int:
        """Of a layer's part that the CPU computes in decode."""
        return self.plan.offload.cpu_experts * self.expert_bytes

    @property
    def page_bytes(self) -> int:
        item = DTYPES[self.plan.model.compute_dtype].itemsize
        return self.layer_bytes // self.pages // item * item

    @property
    def slot_bytes(self) -> int:
        """Of the largest page, the last."""
        return self.layer_bytes - (self.pages - 1) * self.page_bytes

    def page(self, number: int, whole: bool) -> tuple[int, int, int]:
        """Where a page begins, what of it is to be moved: all, or what the CPU does not compute."""
        start = number * self.page_bytes
        end = self.layer_bytes if number == self.pages - 1 else start + self.page_bytes
        return start, start if whole else min(end, max(start, self.cpu_bytes)), end

    def _ranked(self, layer: int) -> Sequence[int]:
        ranking = self.plan.offload.ranking
        return ranking[layer] if ranking else range(self.plan.model.experts)

    def resident(self, layer: int) -> Sequence[int]:
        return () if layer in self.dense else self._ranked(layer)[: self.plan.offload.resident_experts]

    def others(self, layer: int) -> list[int]:
        """Those that are not resident, in the order of their bytes: the CPU's first."""
        if layer in self.dense:
            return []
        rest = self._ranked(layer)[self.plan.offload.resident_experts :]
        streamed = len(rest) - self.plan.offload.cpu_experts
        return [*rest[streamed:], *rest[:streamed]]


@dataclass(frozen=True)
class Buffers:
    """The tensors that an offload plan needs beside weights and caches, by where they are."""

    plan: RuntimePlan
    s: Any  # the schedule's constants

    @property
    def piece_tokens(self) -> int:
        """The most tokens of a piece of prefill."""
        return max(self.plan.batch.prefill_tokens, self.plan.batch.prompt_tokens)

    @property
    def host_places(self) -> int:
        """Sequences whose cache is in host memory."""
        return int(self.s.cpu_attended + self.s.copied_up) * self.plan.batch.micro_batch

    @property
    def device_places(self) -> int:
        most = int(self.s.micro_batches) * self.plan.batch.micro_batch
        return most - self.host_places

    def cache(self, layers: int, places: int) -> tuple[int, ...]:
        """The shape of a cache, [layers, 2, places, V, context, D]; of latents with 1 in place of 2 and V."""
        kinds, heads, width = kv_shape(self.plan.model)
        return (layers, kinds, places, heads, self.plan.batch.context_tokens, width)

    def shared(self) -> Sizes:
        """On the device, with a pinned counterpart: what micro-batches and pieces send and receive."""
        m, s, dtype = self.plan.model, self.s, DTYPES[self.plan.model.compute_dtype]
        count, micro = s.micro_batches, self.plan.batch.micro_batch
        kinds, heads, width = kv_shape(m)
        rows = max(self.piece_tokens, micro) if self.host_places else 0
        return {
            "qkv": ((s.cpu_attended, micro, m.heads + kinds * heads, width), dtype),
            "attended": ((count, micro, m.heads * width), dtype),
            "kv_out": ((2, kinds, rows, heads, width), dtype),
            "partial": ((count * s.decode_cpu_experts, micro, m.hidden), dtype),
            **self._routed("", count * s.decode_cpu_experts, micro),
        }

    def _routed(self, name: str, count: int, rows: int) -> Sizes:
        """What goes to the CPU's experts."""
        m, dtype = self.plan.model, DTYPES[self.plan.model.compute_dtype]
        return {
            f"{name}normed": ((count, rows, m.hidden), dtype),
            f"{name}weights": ((count, rows, m.experts_per_token), torch.float32),
            f"{name}chosen": ((count, rows, m.experts_per_token), torch.int64),
        }

    def device(self) -> Sizes:
        m, s, dtype = self.plan.model, self.s, DTYPES[self.plan.model.compute_dtype]
        piece = (2, self.piece_tokens, m.hidden)
        return {
            **self.shared(),
            **self._routed("piece_", 2 * s.prefill_cpu_experts, self.piece_tokens),
            "piece_partial": ((2 * s.prefill_cpu_experts, self.piece_tokens, m.hidden), dtype),
            "hidden": ((s.micro_batches, self.plan.batch.micro_batch, m.hidden), torch.float32),
            "piece_in": (piece, dtype),
            "piece_out": (piece, dtype),
        }

    def pinned(self) -> Sizes:
        m, s, dtype = self.plan.model, self.s, DTYPES[self.plan.model.compute_dtype]
        tokens = self.plan.batch.sequences * self.plan.batch.prompt_tokens
        return {
            **self.shared(),
            **self._routed("piece_", s.pieces * s.prefill_cpu_experts, self.piece_tokens),
            "parked": ((tokens, m.hidden), dtype),
            "parked_partial": ((tokens * s.prefill_cpu_experts, m.hidden), dtype),
        }


def check_pages(path: Path, experts: Experts, s: Any) -> None:
    """Raise PlanFileError where a page that is staged from host memory holds what only the disk has."""
    if s.pages and (s.pages - s.disk_pages) * experts.page_bytes > experts.host_bytes:
        count = experts.plan.offload.disk_experts
        raise PlanFileError(
            f"{path}: {s.disk_pages} of {s.pages} pages from disk do not hold its {count} experts",
            "compile the spec again",
        )


def check_device_and_host(
    path: Path, plan: RuntimePlan, experts: Experts, buffers: Buffers, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise PlanFileError where host or device need more than the plan gives them."""
    m, s, item = plan.model, buffers.s, DTYPES[plan.model.compute_dtype].itemsize
    outside = m.moe_layers * experts.layer_bytes
    streamed = experts.layer_bytes if s.pages else 0
    kv_in = 2 if s.copied_up else 0
    scratch = scratch_bytes(m, plan.batch, buffers.piece_tokens, item)
    if plan.offload.gpus > 1:  # what a rank's experts say, in float32 and as it is summed
        scratch += (4 + item) * buffers.piece_tokens * m.hidden
    device = {
        "weights": sum(stay_bytes(plan, name, shape) for name, shape in shapes.items()) - outside,
        "weight pages": 2 * streamed,
        "KV cache": item * math.prod(buffers.cache(m.layers, buffers.device_places)),
        "KV pages": item * math.prod(buffers.cache(kv_in, plan.batch.micro_batch)),
        "buffers": _bytes(buffers.device()),
        "workspace": scratch,
    }
    ring, memory = s.slots * experts.slot_bytes if s.pages else 0, plan.memory
    host_kv = item * math.prod(buffers.cache(m.layers, buffers.host_places))
    host_weights = m.moe_layers * experts.host_bytes
    loading = READERS * (_BLOCK_BYTES + 8192) + (32 << 20)
    host = {
        "weights": (host_weights, memory.weights_bytes),
        "slots": (ring, memory.slots_bytes + s.slots * _ROUNDING_BYTES),
        "kv": (host_kv, memory.kv_bytes),
    }
    work = _bytes(buffers.pinned()) + scratch + loading + memory.process_bytes
    total = sum(need for need, _ in host.values()) + work
    check_items(path, {**host, "all": (total, memory.budget_bytes)})
    parts = ", ".join(f"{name} {size:,}" for name, size in device.items())
    check_items(path, {f"device ({parts})": (sum(device.values()), plan.offload.budget_bytes)})


def _bytes(sizes: Sizes) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in sizes.values())


class Memory:
    """All that the run holds, on `device` and on the host, and the moves of weight pages between them."""

    def __init__(
        self,
        experts: Experts,
        buffers: Buffers,
        refs: Mapping[str, TensorRef],
        device: torch.device,
        verification: Verification,
    ) -> None:
        plan, s = experts.plan, buffers.s
        m, self._dtype = plan.model, DTYPES[plan.model.compute_dtype]
        self.experts, self._refs, self._device = experts, refs, device
        self._shards = {path: Shard(path) for path in {ref.path for ref in refs.values()}}
        self._reader = Reader(self._shards, READERS, _BLOCK_BYTES, verification)
        self.outside = [experts.others(layer) for layer in range(m.layers)]
        moving = {n for layer, es in enumerate(self.outside) for e in es for n in expert_names(m, layer, e)}
        self.resident = {
            name: torch.empty(ref.shape, dtype=kept_as(ref, self._dtype), device=device)
            for name, ref in refs.items()
            if name not in moving
        }
        pinned = bool(s.pages) and not s.slots
        self._host = [self._bytes(experts.host_bytes if es else 0, pinned) for es in self.outside]
        self._slots = [self._bytes(experts.slot_bytes, True) for _ in range(s.slots if s.pages else 0)]
        pages = experts.layer_bytes if s.pages else 0
        self._halves = [torch.zeros(pages, dtype=torch.uint8, device=device) for _ in range(2)]
        self.device = {k: torch.zeros(n, dtype=t, device=device) for k, (n, t) in buffers.device().items()}
        self.pinned = {k: self._pinned(n, t) for k, (n, t) in buffers.pinned().items()}
        kv_in = 2 if s.copied_up else 0
        self.device_cache = self._cache(buffers.cache(m.layers, buffers.device_places), device)
        self.kv_in = self._cache(buffers.cache(kv_in, plan.batch.micro_batch), device)
        self.host_cache = self._cache(buffers.cache(m.layers, buffers.host_places), torch.device("cpu"))
        self._load()
        if device.type != "cpu":
            torch.accelerator.synchronize()  # streams do not wait for what this thread has filled

    def _pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self._device.type != "cpu").zero_()

    def _bytes(self, count: int, pinned: bool) -> Tensor:
        return self._pinned((count,), torch.uint8) if pinned else torch.zeros(count, dtype=torch.uint8)

    def _cache(self, shape: tuple[int, ...], device: torch.device) -> KvCache:
        """A cache in which a sequence's tokens lie together, over all heads: copied in one block."""
        layers, kv, places, heads, context, dim = shape
        stored = torch.empty(layers, kv, places, context, heads, dim, dtype=self._dtype, device=device)
        return KvCache(stored.zero_().transpose(3, 4))

    def _load(self) -> None:
        into = dict(self.resident)
        in_host = self.experts.outside - self.experts.plan.offload.disk_experts
        for layer, es in enumerate(self.outside):
            for at, e in enumerate(es[:in_host]):
                matrices = self._matrices(self._host[layer], at)
                into |= dict(zip(expert_names(self.experts.plan.model, layer, e), matrices, strict=True))
        self._reader.load([self._refs[name] for name in into], into)

    @property
    def loaded_bytes(self) -> int:
        """Read of files while weights were loaded."""
        return self._reader.loaded_bytes

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def _matrices(self, flat: Tensor, at: int) -> tuple[Tensor, ...]:
        """The tensors of the expert at place `at` of a layer's bytes."""
        size, shapes = self.experts.expert_bytes, expert_shapes(self.experts.plan.model)
        ends = tuple(accumulate(math.prod(shape) for shape in shapes))
        parts = flat[at * size : (at + 1) * size].view(self._dtype).tensor_split(ends[:-1])
        return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    def on_device(self, layer: int, half: int) -> Callable[[int], tuple[Tensor, ...]]:
        """The tensors of an expert that is resident or in weight buffer `half`."""

        def matrices(e: int) -> tuple[Tensor, ...]:
            if e in self.outside[layer]:
                return self._matrices(self._halves[half], self.outside[layer].index(e))
            return tuple(self.resident[name] for name in expert_names(self.experts.plan.model, layer, e))

        return matrices

    def on_host(self, layer: int) -> Callable[[int], tuple[Tensor, ...]]:
        """The tensors of an expert that the CPU computes."""
        return lambda e: self._matrices(self._host[layer], self.outside[layer].index(e))

    def stage_page(self, layer: int, page: int, slot: int, whole: bool) -> None:
        """From host memory to a pinned slot; of a layer without experts nothing."""
        if not self.outside[layer]:
            return
        start, first, end = self.experts.page(page, whole)
        self._slots[slot][first - start : end - start] = self._host[layer][first:end]

    def copy_page(self, layer: int, page: int, half: int, slot: int, whole: bool) -> None:
        """From a pinned slot, or (-1) from where all weights are pinned, to the device."""
        if not self.outside[layer]:
            return
        start, first, end = self.experts.page(page, whole)
        host = self._host[layer][first:end]
        source = host if slot < 0 else self._slots[slot][first - start : end - start]
        self._halves[half][first:end].copy_(source, non_blocking=True)

    def read_page(self, layer: int, page: int, slot: int, whole: bool) -> list[Block]:
        """The parts of a page to a pinned slot: from disk, and what of it is in host memory."""
        if not self.outside[layer]:
            return []
        start, first, end = self.experts.page(page, whole)
        at = min(max(first, self.experts.host_bytes), end)  # here the disk's part begins
        into = self._slots[slot][at - start : end - start].view(self._dtype)
        blocks = self._reads(layer, at // self._dtype.itemsize, into)
        if first < at:
            target, source = self._slots[slot][first - start : at - start], self._host[layer][first:at]
            blocks.append(partial(_copy, target, source))
        return blocks

    def _reads(self, layer: int, first: int, into: Tensor) -> list[Block]:
        """The reads that fill `into` with a layer's elements from `first` on, tensor after tensor."""
        model = self.experts.plan.model
        blocks: list[Block] = []
        e, skipped = divmod(first, model.expert_parameters)
        for expert in self.outside[layer][e:]:
            for name in expert_names(model, layer, expert):
                size = math.prod(self._refs[name].shape)
                part = into[: max(0, size - skipped)]
                if len(part):
                    blocks += self._reader.blocks(self._refs[name], part, skipped)
                into, skipped = into[len(part) :], max(0, skipped - size)
        return blocks


def _copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source)
