"""An offload plan executed: GPU, link, CPU and disk share the work of every pass, lane by lane.

A sequence keeps its place, and so its micro-batch: it decides where it attends. A micro-batch whose
sequences are all done goes on empty. One that the pass before has begun takes in new ones a pass later. Each
operation of schedule.py is a method here; the buffers it reads and writes are those that schedule.py says it
touches, and all order between lanes follows from that.

With an accelerator this has never run: tests and rehearsals put the CPU in its place.

B sequences of a micro-batch, T tokens of a piece of prefill, H hidden, K experts per token,
Q query heads, V key and value heads, D head dimension
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_min.attention import MicroBatch, attend, attend_prompts, decode_batch, prefill_batch
from moeplan.runtime_min.checksums import verification
from moeplan.runtime_min.cpu import keep_freed_memory
from moeplan.runtime_min.engine import Active, Batches, goes_on, groups
from moeplan.runtime_min.lanes import Blocks, Lanes, Row, check_schedule, load_schedule, single
from moeplan.runtime_min.latent import absorbed_queries, expand, values_of
from moeplan.runtime_min.layers import sort_by_expert
from moeplan.runtime_min.limits import check_offload, check_parameters
from moeplan.runtime_min.model_config import Sight, read_config
from moeplan.runtime_min.models.tensors import find_parts
from moeplan.runtime_min.offload_memory import (
    READERS,
    Buffers,
    Experts,
    Memory,
    check_device_and_host,
    check_pages,
)
from moeplan.runtime_min.operations import DTYPES, Operations
from moeplan.runtime_min.plan_file import RuntimePlan, kv_shape
from moeplan.runtime_min.ranks import ALONE, Ranks
from moeplan.runtime_min.report import RankReport
from moeplan.runtime_min.shares import parts_of, plan_of

LANES = ("gpu", "h2d", "d2h", "cpu", "copier", "disk")
PREFILL_OPS = (
    "load_piece",
    "prefill_layer",
    "store_piece",
    "store_piece_kv",
    "offload_piece",
    "piece_experts",
    "piece_partial",
    "piece_head",
)
PAGE_OPS = ("stage_page", "read_page", "copy_page")
_TO_CPU = ("normed", "weights", "chosen")  # what the CPU's experts need


@dataclass(frozen=True, slots=True)
class Group:
    """A micro-batch: its sequences, their newest tokens, and where these are in the cache they attend over:
    `host` as the host counts places, `device` as the device does."""

    active: Active
    tokens: Tensor
    host: MicroBatch | None
    device: MicroBatch | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Some whole prompts: their rows of the parked hidden states, each sequence's last token, and which keys
    and values go to the host's cache and which to the device's."""

    active: Active
    tokens: Tensor
    batch: MicroBatch
    last: Tensor
    parked: slice
    host: tuple[slice, MicroBatch]
    device: tuple[slice, MicroBatch]


@dataclass(slots=True)
class Step:
    """A pass: the sequences of each micro-batch at its start, and as its first operation has found them."""

    number: int
    active: list[Active]
    groups: dict[int, Group] = field(default_factory=dict)
    pieces: Sequence[Piece] = ()


class Offload(Batches):
    """An offload plan with its checkpoint loaded; `device` is the accelerator, or the CPU in its place.

    Of several `ranks` this one has its share, and `plan` becomes that of the share.
    """

    def __init__(
        self,
        folder: Path,
        plan: RuntimePlan,
        checkpoint: Path,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        path = folder / "runtime.json"
        check_offload(path, plan)
        schedule = load_schedule(folder, plan)
        check_schedule(schedule, "offload", offload_constants(plan, schedule))
        self.config = read_config(checkpoint, plan.model, plan.batch.context_tokens)
        refs = find_parts(checkpoint, plan.model, self.config)
        check_parameters(path, plan, {name: ref.shape for name, ref in refs.items()})
        refs, plan = parts_of(refs, plan, self.config, ranks.share), plan_of(plan, ranks.share)
        shapes, m = {name: ref.shape for name, ref in refs.items()}, plan.model
        self._s, self._ops = schedule.SCHEDULE, schedule.OPS
        experts = Experts(plan, self._s.pages, self.config.dense)
        self._buffers = Buffers(plan, self._s)
        check_pages(path, experts, self._s)
        check_device_and_host(path, plan, experts, self._buffers, shapes)
        torch.set_num_threads(plan.threads)
        keep_freed_memory()
        # A rank sees parts of tensors only, whose checksums nobody has noted.
        sums = verification(checkpoint, (r.path for r in refs.values()) if ranks.count == 1 else ())
        self._memory = Memory(experts, self._buffers, refs, device, sums)
        self._model = m
        self._on, self._dtype, self._device = self._memory.device, DTYPES[m.compute_dtype], device
        self._pinned = self._memory.pinned
        resident = self._memory.resident
        with device:
            self._device_ops = Operations(plan, self.config, resident, ranks)
        sinks = (self._device_ops.sinks(layer, resident) for layer in range(m.layers))
        self._host_sinks = [None if s is None else s.cpu() for s in sinks]
        self._passes = self._pages_staged = self._pages_copied = 0
        self._next: Step | None = None
        super().__init__(plan, Lanes(schedule, READERS, device), ranks)

    def close(self) -> None:
        super().close()
        self._memory.close()

    def _rank_report(self) -> RankReport:
        return replace(super()._rank_report(), loaded_bytes=self._memory.loaded_bytes)

    # Passes

    def _pass(self, active: Active, more: bool) -> None:
        step = self._step(active)
        decode, following = (
            self._micro_batches(place for place, g in active if test(g))
            for test in (lambda g: bool(g.tokens), goes_on)
        )
        rows = self.lanes.issue(decode, len(step.pieces), following)
        self._next = Step(self._passes, step.active)
        self.lanes.run(rows, list(self._work(rows, step, self._next)))

    def _micro_batches(self, places: Iterable[int]) -> int:
        """How many there are up to the last of `places`."""
        return max(places, default=-1) // self.plan.batch.micro_batch + 1

    def _step(self, active: Active) -> Step:
        """The pass that comes now; the one before may have begun its first micro-batches."""
        begun = self._next.groups if self._next else {}
        members: list[Active] = [
            [(place, g) for place, g in active if place // self.plan.batch.micro_batch == j]
            for j in range(self._micro_batches(place for place, _ in active))
        ]
        pieces = list(self._pieces([(place, g) for place, g in active if not g.tokens]))
        for _, generation in active:
            generation.cached = generation.length
        self._passes += 1
        return Step(self._passes - 1, members, begun, pieces)

    def _work(self, rows: Iterable[Row], step: Step, following: Step) -> Iterable[Blocks]:
        """The work of each row. What a micro-batch does after its head is of the next pass."""
        headed = set()
        for row in rows:
            op, _, layer, item, slot = row[:5]
            name = self._ops[op]
            if name in PAGE_OPS:
                yield self._page_work(name, step, layer, item, slot)
                continue
            ahead = name not in PREFILL_OPS and item in headed
            if name == "head":
                headed.add(item)
            do = getattr(self, f"_{name}")
            if name == "load_kv":
                do = partial(do, self._cached(step, item))
            yield single(do, following if ahead else step, layer, item, slot)

    def _page_work(self, name: str, step: Step, layer: int, page: int, slot: int) -> Blocks:
        """A page's move. In decode the CPU computes some experts, and these stay where they are; of a page
        for the next pass, which may be another prefill, all is moved."""
        copies = name == "copy_page"
        number = self._pages_copied if copies else self._pages_staged
        self._pages_copied += copies
        self._pages_staged += not copies
        to_come = number // (self._s.pages * self._s.layers) > step.number
        whole = (to_come or bool(step.pieces)) and not self._s.prefill_cpu_experts
        memory = self._memory
        if name == "read_page":
            return partial(memory.read_page, layer, page, slot, whole)
        if name == "stage_page":
            return single(memory.stage_page, layer, page, slot, whole)
        pinned = number % self._s.slots if self._s.slots else -1
        return single(memory.copy_page, layer, page, slot, pinned, whole)

    def _pieces(self, active: Active) -> Iterable[Piece]:
        """All prompts, in pieces of about `prefill_tokens` tokens of whole prompts."""
        lengths = [len(g.prompt) for _, g in active]
        row = 0
        for group in groups(lengths, self.plan.batch.prefill_tokens):
            some, ends = active[group], list(accumulate(lengths[group]))
            places = [place for place, _ in some]
            batch = prefill_batch(places, lengths[group])
            split = sum(len(g.prompt) for place, g in some if place < self._buffers.host_places)
            to_host, to_device = slice(0, split), slice(split, ends[-1])
            on_device = batch.part(to_device, self._buffers.host_places).on(self._device)
            yield Piece(
                active=some,
                tokens=torch.tensor([token for _, g in some for token in g.prompt], device=self._device),
                batch=batch.on(self._device),
                last=torch.tensor([end - 1 for end in ends], device=self._device),
                parked=slice(row, row + ends[-1]),
                host=(to_host, batch.part(to_host, 0)),
                device=(to_device, on_device),
            )
            row += ends[-1]

    def _group(self, j: int, active: Active) -> Group:
        """Micro-batch j of those whose prompts are read and that are not done."""
        active = [(place, g) for place, g in active if g.tokens and not g.finish]
        lengths = [g.length for _, g in active]
        first = self._buffers.host_places
        if j < self._s.cpu_attended + self._s.copied_up:
            first = j * self.plan.batch.micro_batch  # the cache that is copied up is of this one alone

        def batch(first_place: int) -> MicroBatch | None:
            places = [place - first_place for place, _ in active]
            return decode_batch(places, lengths) if active else None

        device = batch(first)
        tokens = torch.tensor([g.tokens[-1] for _, g in active], dtype=torch.int64, device=self._device)
        return Group(active, tokens, batch(0), device.on(self._device) if device else None)

    def _cached(self, step: Step, j: int) -> list[tuple[int, int]]:
        """(place, tokens in the cache) of micro-batch j; its cache is never copied up for the next pass."""
        if j >= len(step.active):
            return []
        return [(place, g.length - 1) for place, g in step.active[j] if g.tokens]

    # Decode: one token of every sequence of a micro-batch

    def _embed(self, step: Step, _: int, item: int, slot: int) -> None:
        if item >= self._s.micro_batches:
            piece = step.pieces[item - self._s.micro_batches]
            self._device_ops.embed(piece.tokens, self._on["piece_in"][slot][: len(piece.tokens)])
            return
        active = step.active[item] if item < len(step.active) else []
        step.groups[item] = self._group(item, active)
        self._device_ops.embed(step.groups[item].tokens, self._hidden(step, item))

    def _hidden(self, step: Step, j: int) -> Tensor:
        """The residual stream of micro-batch j: [B, H], float32."""
        return self._on["hidden"][j, : len(step.groups[j].active)]

    def _queries(self, step: Step, layer: int, j: int, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Queries, and what the cache is to keep: keys and values, or latents with queries that meet them."""
        hidden = self._hidden(step, j)
        if layer > 0:
            self._add_partial(hidden, j)
        if self.config.latent is None:
            return self._device_ops.queries(layer, hidden, batch.positions, self._memory.resident)
        q, latents = self._device_ops.latents(layer, hidden, batch.positions, self._memory.resident)
        wide = absorbed_queries(q, self._up_projection(layer), self.config.latent)
        return wide.to(self._dtype), latents[:, None]

    def _up_projection(self, layer: int) -> Tensor:
        """What makes keys and values of latents."""
        return self._memory.resident[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]

    def _add_partial(self, hidden: Tensor, j: int) -> None:
        """Add what the CPU's experts of the layer before have said."""
        if self._s.decode_cpu_experts:
            hidden += self.ranks.sum(self._on["partial"][j, : len(hidden)])

    def _pre_attention(self, step: Step, layer: int, j: int, _: int) -> None:
        group = step.groups[j]
        if group.device is not None:
            qkv = torch.cat(self._queries(step, layer, j, group.device), 1)
            self._on["qkv"][j, : len(qkv)] = qkv

    def _offload_qkv(self, step: Step, _: int, j: int, __: int) -> None:
        self._down(["qkv"], j, j, len(step.groups[j].active))

    def _cpu_attention(self, step: Step, layer: int, j: int, _: int) -> None:
        group, m = step.groups[j], self._model
        if group.host is not None:
            qkv = self._pinned["qkv"][j, : len(group.active)]
            kinds, heads, _ = kv_shape(m)
            ends = range(m.heads, m.heads + kinds * heads, heads)
            q, *kept = qkv.tensor_split(tuple(ends), 1)
            cache, sinks = self._memory.host_cache, self._host_sinks[layer]
            out = attend(layer, group.host, cache, q, kept, self.config.sight(layer), sinks)
            self._pinned["attended"][j, : len(out)] = out

    def _load_hidden(self, step: Step, _: int, j: int, __: int) -> None:
        self._up("attended", step, j)

    def _load_kv(self, cached: list[tuple[int, int]], _: Step, layer: int, j: int, slot: int) -> None:
        host, there = self._memory.host_cache.tensor[layer], self._memory.kv_in.tensor[slot]
        first = j * self.plan.batch.micro_batch
        for place, tokens in cached:
            for kv in range(len(host)):
                source = host[kv, place, :, :tokens]
                there[kv, place - first, :, :tokens].copy_(source, non_blocking=True)

    def _gpu_attention(self, step: Step, layer: int, j: int, slot: int) -> None:
        group = step.groups[j]
        if group.device is None:
            return
        q, *kept = self._queries(step, layer, j, group.device)
        sight, sinks = self._sight(layer)
        if slot < 0:
            out = attend(layer, group.device, self._memory.device_cache, q, kept, sight, sinks)
        else:
            out = attend(slot, group.device, self._memory.kv_in, q, kept, sight, sinks)
            self._keep(slot, kept)
        self._on["attended"][j, : len(out)] = out

    def _sight(self, layer: int) -> tuple[Sight, Tensor | None]:
        """What the device's queries see in a layer, and their sinks."""
        return self.config.sight(layer), self._device_ops.sinks(layer, self._memory.resident)

    def _keep(self, slot: int, kept: Sequence[Tensor]) -> None:
        """New keys and values, or latents, [T, V, D], for the host."""
        for kind, values in enumerate(kept):
            self._on["kv_out"][slot, kind, : len(values)] = values

    def _store_kv(self, step: Step, layer: int, j: int, slot: int) -> None:
        group = step.groups[j]
        if group.host is not None:
            self._store(layer, group.host, slot, slice(0, len(group.active)))

    def _store(self, layer: int, batch: MicroBatch, slot: int, tokens: slice) -> None:
        """Spread `tokens` of kv_out over the host's cache."""
        pinned = self._pinned["kv_out"][slot, :, tokens]
        for kv in range(len(pinned)):
            pinned[kv].copy_(self._on["kv_out"][slot, kv, tokens], non_blocking=True)
        if self._device.type != "cpu":
            torch.accelerator.current_stream().synchronize()  # now they are here, to be spread
        self._memory.host_cache.store(layer, batch, list(pinned))

    def _post_attention(self, step: Step, layer: int, j: int, half: int) -> None:
        hidden = self._hidden(step, j)
        if not len(hidden):
            return
        attended = self._on["attended"][j, : len(hidden)]
        if self.config.latent:
            per_head = attended.view(len(hidden), self._model.heads, -1)
            attended = values_of(per_head, self._up_projection(layer), self.config.latent)
        self._device_ops.add_attended(layer, hidden, attended, self._memory.resident)
        normed, choice = self._choose(layer, hidden)
        if self._s.decode_cpu_experts:
            self._tell("", j, normed, choice)
        self._add_experts(layer, half, normed, choice, hidden, bool(self._s.decode_cpu_experts))

    def _choose(self, layer: int, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The experts of each token and what goes into them."""
        normed = torch.empty_like(hidden, dtype=self._dtype)
        return normed, self._device_ops.choose(layer, hidden, normed)

    def _tell(self, kind: str, at: int, normed: Tensor, choice: tuple[Tensor, Tensor]) -> None:
        """Leave for the CPU's experts what they need."""
        if not choice[0].shape[1]:  # a layer without experts
            return
        for name, value in zip(_TO_CPU, (normed, *choice), strict=True):
            self._on[kind + name][at, : len(value)] = value

    def _add_experts(
        self, layer: int, half: int, normed: Tensor, choice: tuple[Tensor, Tensor], out: Tensor, shared: bool
    ) -> None:
        """Add what the device's experts say, and what a layer has beside experts; `shared`: the CPU computes
        its own."""
        outside = self._memory.outside[layer][self.plan.offload.cpu_experts if shared else 0 :]
        experts = [*self._memory.experts.resident(layer), *outside]
        routing = sort_by_expert(*choice, self._model.experts)
        alone = self.ranks.count == 1
        said = out if alone else torch.zeros_like(out)
        self._device_ops.add_common(layer, normed, said)
        self._device_ops.add_experts(experts, routing, normed, said, self._memory.on_device(layer, half))
        if not alone:
            out += self.ranks.sum(said.to(self._dtype))

    def _offload_routed(self, step: Step, _: int, j: int, __: int) -> None:
        self._down(_TO_CPU, j, j, len(step.groups[j].active))

    def _cpu_experts(self, step: Step, layer: int, j: int, _: int) -> None:
        self._answer("", layer, j, self._pinned["partial"][j, : len(step.groups[j].active)])

    def _answer(self, kind: str, layer: int, at: int, answer: Tensor) -> None:
        """What the CPU's experts say, to `answer` in pinned memory."""
        if layer in self.config.dense:
            answer.zero_()
        if not len(answer) or layer in self.config.dense:
            return
        normed, weights, chosen = (self._pinned[kind + name][at, : len(answer)] for name in _TO_CPU)
        out = torch.zeros(len(answer), self._model.hidden)
        routing = sort_by_expert(weights, chosen, self._model.experts)
        experts = self._memory.outside[layer][: self.plan.offload.cpu_experts]
        self._device_ops.add_experts(experts, routing, normed, out, self._memory.on_host(layer))
        answer.copy_(out)

    def _load_partial(self, step: Step, _: int, j: int, __: int) -> None:
        self._up("partial", step, j)

    def _head(self, step: Step, _: int, j: int, __: int) -> None:
        hidden = self._hidden(step, j)
        self._add_partial(hidden, j)
        self._score(hidden, torch.arange(len(hidden), device=self._device), step.groups[j].active)

    def _score(self, hidden: Tensor, rows: Tensor, active: Active) -> None:
        most = self.plan.batch.micro_batch
        for first in range(0, len(active), most):
            some = rows[first : first + most]
            scores = torch.empty(len(some), self._model.vocab, device=self._device)
            self._device_ops.scores(hidden, some, scores)
            self._accept(scores, active[first : first + most])

    # Prefill: the prompts of a piece

    def _load_piece(self, step: Step, _: int, q: int, slot: int) -> None:
        parked = self._pinned["parked"][step.pieces[q].parked]
        self._on["piece_in"][slot][: len(parked)].copy_(parked, non_blocking=True)

    def _prefill_layer(self, step: Step, layer: int, q: int, slot: int) -> None:
        piece = step.pieces[q]
        hidden = self._piece(piece, layer, slot)
        weights, ops = self._memory.resident, self._device_ops
        out, kept = self._attend_piece(layer, piece, hidden)
        ops.add_attended(layer, hidden, out, weights)
        tokens, batch = piece.device
        if tokens.stop > tokens.start:
            self._memory.device_cache.store(layer, batch, [values[tokens] for values in kept])
        if self._buffers.host_places:
            self._keep(slot, kept)
        normed, choice = self._choose(layer, hidden)
        if self._s.prefill_cpu_experts:
            self._tell("piece_", slot, normed, choice)
        half = (step.number * self._s.layers + layer) % 2
        self._add_experts(layer, half, normed, choice, hidden, bool(self._s.prefill_cpu_experts))
        self._on["piece_out"][slot][: len(hidden)] = hidden

    def _attend_piece(self, layer: int, piece: Piece, hidden: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """What prompts attend to, and what the cache is to keep of them."""
        positions, weights, sizes = piece.batch.positions, self._memory.resident, self.config.latent
        if sizes is None:
            q, k, v = self._device_ops.queries(layer, hidden, positions, weights)
            return attend_prompts(piece.batch, q, k, v, *self._sight(layer)), (k, v)
        q, latents = self._device_ops.latents(layer, hidden, positions, weights)
        k, v = expand(latents, self._up_projection(layer), self._model.heads, sizes)
        return attend_prompts(piece.batch, q, k, v, scale=sizes.score_scale), [latents[:, None]]

    def _piece(self, piece: Piece, layer: int, slot: int) -> Tensor:
        """The residual stream of a piece before `layer`: [T, H], float32."""
        count = len(piece.tokens)
        hidden = self._on["piece_in"][slot][:count].to(torch.float32, copy=True)
        if self._s.prefill_cpu_experts and layer > 0:
            hidden += self.ranks.sum(self._on["piece_partial"][slot][:count])
        return hidden

    def _store_piece(self, step: Step, _: int, q: int, slot: int) -> None:
        parked = self._pinned["parked"][step.pieces[q].parked]
        parked.copy_(self._on["piece_out"][slot][: len(parked)], non_blocking=True)

    def _store_piece_kv(self, step: Step, layer: int, q: int, slot: int) -> None:
        tokens, batch = step.pieces[q].host
        if tokens.stop:
            self._store(layer, batch, slot, tokens)

    def _offload_piece(self, step: Step, _: int, q: int, slot: int) -> None:
        names = ["piece_" + name for name in _TO_CPU]
        self._down(names, slot, q % self._s.pieces, len(step.pieces[q].tokens))

    def _piece_experts(self, step: Step, layer: int, q: int, _: int) -> None:
        self._answer(
            "piece_", layer, q % self._s.pieces, self._pinned["parked_partial"][step.pieces[q].parked]
        )

    def _piece_partial(self, step: Step, _: int, q: int, slot: int) -> None:
        partial_sums = self._pinned["parked_partial"][step.pieces[q].parked]
        self._on["piece_partial"][slot, : len(partial_sums)].copy_(partial_sums, non_blocking=True)

    def _piece_head(self, step: Step, layer: int, q: int, slot: int) -> None:
        piece = step.pieces[q]
        self._score(self._piece(piece, layer + 1, slot), piece.last, piece.active)

    # The link

    def _down(self, names: Iterable[str], at: int, to: int, count: int) -> None:
        """Rows of the device's buffer `at` to the host's `to`."""
        for name in names:
            self._pinned[name][to, :count].copy_(self._on[name][at, :count], non_blocking=True)

    def _up(self, name: str, step: Step, j: int) -> None:
        """Rows of micro-batch j from the host's buffer to the device's."""
        count = len(step.groups[j].active)
        self._on[name][j, :count].copy_(self._pinned[name][j, :count], non_blocking=True)


def offload_constants(plan: RuntimePlan, schedule: Any) -> dict[str, object]:
    """What schedule.py has to say for this offload plan."""
    offload, ops = plan.offload, getattr(schedule, "OPS", ())
    return {
        "LANES": LANES,
        "OPS": tuple(op for op in ops if op in PAGE_OPS or f"_{op}" in vars(Offload)),
        "layers": plan.model.layers,
        "micro_batches": -(-plan.batch.sequences // plan.batch.micro_batch),
        "pages": plan.pages.pages_per_layer,
        "slots": plan.pages.slots,
        "decode_cpu_experts": int(offload.cpu_experts > 0),
        "prefill_cpu_experts": int(offload.cpu_experts > 0 and not plan.pages.pages_per_layer),
    }
