"""A stream plan executed: all tokens of a pass through page after page of the weights.

N sequences, T tokens, H hidden, Q query heads, V key and value heads, D head dimension
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_min import amx
from moeplan.runtime_min.checksums import verification
from moeplan.runtime_min.cpu import keep_freed_memory
from moeplan.runtime_min.decode_attention import prepare
from moeplan.runtime_min.engine import Active, Batches, Generation, goes_on, groups
from moeplan.runtime_min.lanes import (
    ATTENTION,
    EMBED,
    EXPECT,
    EXPERTS,
    FETCH,
    GUESS,
    HEAD,
    HIT,
    LANES,
    OPS,
    PLACE,
    READ,
    ROUTE,
    Block,
    Blocks,
    Lanes,
    Row,
    check_schedule,
    load_schedule,
    single,
)
from moeplan.runtime_min.latent import attend_latent
from moeplan.runtime_min.layers import Routing, sort_by_expert
from moeplan.runtime_min.limits import check_memory, check_numbers
from moeplan.runtime_min.model_config import ModelConfig, read_config
from moeplan.runtime_min.models.tensors import (
    expert_names,
    find_parts,
    page_experts,
    page_names,
)
from moeplan.runtime_min.operations import DTYPES, Operations
from moeplan.runtime_min.paged import PagedBatch, PagedCache, attend_paged, decode_batch, prompt_batch
from moeplan.runtime_min.pages import PageStore, Weights
from moeplan.runtime_min.places import Places
from moeplan.runtime_min.plan_file import KV_BLOCK_TOKENS, RuntimePlan, call_tokens, kv_shape
from moeplan.runtime_min.prefixes import Prefixes

Read = Callable[[int, int, int], Sequence[Block]]  # layer, page, slot


@dataclass(frozen=True, slots=True)
class Pass:
    """The tokens [T] of one pass, cut into attention calls, first `decode` of decode, and the rows [N] whose
    scores are wanted."""

    tokens: Tensor
    calls: tuple[PagedBatch, ...]
    decode: int
    last: Tensor


class StreamModel(Operations):
    """Holds the state of the stream pass under way; `execute` computes one row of its schedule.

    After the head row `logits` has the next-token scores of each sequence, float32 [N, vocab].
    """

    def __init__(self, plan: RuntimePlan, config: ModelConfig, pages: Weights) -> None:
        super().__init__(plan, config, pages.resident)
        m, batch, dtype = plan.model, plan.batch, DTYPES[plan.model.compute_dtype]
        self._page_plan, self._pages = plan.pages, pages
        tokens = batch.pass_tokens
        # Written once now: the first pass would wait for the system to find the memory.
        self._hidden = torch.empty(tokens, m.hidden).zero_()  # the residual stream, always float32
        self._normed = torch.empty(tokens, m.hidden, dtype=dtype).zero_()
        self._logits = torch.empty(batch.sequences, m.vocab).zero_()
        kinds, heads, size = kv_shape(m)
        int8 = batch.kv_cache == "int8"
        self.cache = PagedCache(m.layers, heads, size, batch.kv_tokens, dtype, kinds, int8)
        self._routing = Routing(torch.empty(0), torch.empty(0), [])
        self.places = Places(plan)

    def begin(self, step: Pass) -> None:
        """Make `step` the pass that the next rows compute."""
        self._step = step
        self.hidden = self._hidden[: len(step.tokens)]  # [T, H]
        self.normed = self._normed[: len(step.tokens)]
        self.logits = self._logits[: len(step.last)]

    def route_as(self, routing: Routing) -> None:
        """Take `routing` for the experts that come next."""
        self._routing = routing

    def execute(self, row: Row) -> None:
        op, _, layer, item, slot = row[:5]
        if op == EMBED:
            self.embed(self._step.tokens, self.hidden)
        elif op == ATTENTION:
            self._attention(layer, self._step.calls[item], self._pages.view(layer, 0, slot))
        elif op == ROUTE:
            choice = self.choose(layer, self.hidden, self.normed)
            self._routing = sort_by_expert(*choice, self._model.experts)
            self.add_common(layer, self.normed, self.hidden)
        elif op == EXPERTS:
            self._experts(layer, item, self._pages.view(layer, item, slot))
        elif op == EXPECT:
            self.places.expect(layer, *self.choose(layer, self.hidden, torch.empty_like(self.normed)))
        elif op == PLACE:
            self.places.place(layer, self._routing)
        elif op == HIT and (page := self.places.pages[item - 1]):
            self._experts(layer, page, self._pages.view(layer, page, slot))
        elif op == HEAD:
            self.scores(self.hidden, self._step.last, self.logits)

    def _attention(self, layer: int, batch: PagedBatch, weights: Mapping[str, Tensor]) -> None:
        residual = self.hidden[batch.rows]
        if self._config.latent:
            q, latents = self.latents(layer, residual, batch.positions, weights)
            up = weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
            out = attend_latent(layer, batch, self.cache, q, latents, up, self._config.latent)
        else:
            q, k, v = self.queries(layer, residual, batch.positions, weights)
            sight, sinks = self._config.sight(layer), self.sinks(layer, weights)
            out = attend_paged(layer, batch, self.cache, q, k, v, sight, sinks)
        self.add_attended(layer, residual, out, weights)

    def _experts(self, layer: int, page: int, weights: Mapping[str, Tensor]) -> None:
        """Add what the page's experts say to the residual stream."""

        def matrices(e: int) -> tuple[Any, ...]:
            return tuple(weights[name] for name in expert_names(self._model, layer, e))

        experts = page_experts(self._model, self._page_plan, page)
        self.add_experts(experts, self._routing, self.normed, self.hidden, matrices)


class Stream(Batches):
    """All tokens of a pass through page after page of the weights."""

    def __init__(self, plan: RuntimePlan, model: StreamModel, lanes: Lanes, read: Read) -> None:
        super().__init__(plan, lanes)
        self.model = model
        self._read = read
        self._prefixes = Prefixes()

    def _room(self, candidates: Sequence[Generation]) -> int:
        return self.model.cache.room(g.most_tokens for g in candidates)

    def _enter(self, place: int, generation: Generation) -> None:
        super()._enter(place, generation)
        shared = self._prefixes.find(place, generation.prompt)
        blocks = self.model.cache.take(place, generation.most_tokens, shared)
        self._prefixes.keep(place, generation, blocks)
        generation.cached = len(shared) * KV_BLOCK_TOKENS
        self.stats.shared_tokens += generation.cached

    def _leave(self, place: int) -> None:
        self._prefixes.forget(self.model.cache.give_back(place))

    def _pass(self, active: Active, more: bool) -> None:
        step, asking = self._step(active)
        unread = any(g.cached < len(g.prompt) for _, g in active)
        self.execute(step, more or unread or any(goes_on(g) for _, g in asking))
        self._accept(self.model.logits, asking)

    def execute(self, step: Pass, following: bool) -> None:
        """One pass of the schedule; the model has its scores. `following`: another comes."""
        self.model.begin(step)
        rows = self.lanes.issue(step.decode, len(step.calls) - step.decode, int(following))
        self.lanes.run(rows, [self._work(row) for row in rows])

    def _work(self, row: Row) -> Blocks:
        op, _, layer, item, slot = row[:5]
        if op == READ:
            return partial(self._read, layer, item, slot)
        if op in (GUESS, FETCH):
            return partial(self._read_place, *row[:5])
        return single(self.model.execute, row)

    def _read_place(self, op: int, _: int, layer: int, item: int, slot: int) -> Sequence[Block]:
        """The reads of a place's page: the guessed one, or one that routing hit."""
        places = self.model.places
        page = places.guess(layer, item) if op == GUESS else places.pages[item - 1]
        return self._read(layer, page, slot) if page else ()

    def _step(self, active: Active) -> tuple[Pass, Active]:
        """The pass that comes now, and those that get a token from it."""
        decoding = [member for member in active if member[1].tokens]
        pieces = list(self._pieces(active, self.plan.batch.pass_tokens - len(decoding)))
        calls = list(self._decode_calls(decoding))
        decode = len(calls)
        ends = list(accumulate((end - start for _, start, end in pieces), initial=len(decoding)))
        for group in groups([end - start for _, start, end in pieces], self.plan.batch.prefill_tokens):
            parts = [(self.model.cache.table(place), start, end) for (place, _), start, end in pieces[group]]
            calls.append(prompt_batch(ends[group.start], parts))
        whole = [at for at, ((_, g), _, end) in enumerate(pieces) if end == len(g.prompt)]
        last = [*range(len(decoding)), *(ends[at + 1] - 1 for at in whole)]
        tokens = [g.tokens[-1] for _, g in decoding]
        for (_, generation), start, end in pieces:
            tokens += generation.prompt[start:end]
        for _, generation in decoding:
            generation.cached += 1
        step = Pass(torch.tensor(tokens), tuple(calls), decode, torch.tensor(last, dtype=torch.int64))
        return step, [*decoding, *(pieces[at][0] for at in whole)]

    def _pieces(self, active: Active, room: int) -> Iterator[tuple[tuple[int, Generation], int, int]]:
        """Prompt tokens not yet read, at most `room`, in pieces that fit one call: (member, from, to).

        They count as cached from now on.
        """
        most = call_tokens(self.plan.batch)
        for member in active:
            generation = member[1]
            while room > 0 and generation.cached < len(generation.prompt):
                start = generation.cached
                generation.cached = min(len(generation.prompt), start + min(room, most))
                room -= generation.cached - start
                yield member, start, generation.cached

    def _decode_calls(self, decoding: Active) -> Iterator[PagedBatch]:
        """The newest token of each sequence, in micro-batches."""
        row = 0
        for _, group in groupby(decoding, lambda member: member[0] // self.plan.batch.micro_batch):
            members = list(group)
            tables = [self.model.cache.table(place) for place, _ in members]
            yield decode_batch(row, tables, [g.length for _, g in members])
            row += len(members)


class Engine(Stream):
    """A stream plan with its checkpoint loaded."""

    def __init__(self, folder: Path, plan: RuntimePlan, checkpoint: Path) -> None:
        m, pages = plan.model, plan.pages
        check_numbers(folder / "runtime.json", plan)
        schedule = load_schedule(folder, plan)
        check_schedule(schedule, "stream", stream_constants(plan))
        self.config = read_config(checkpoint, m, plan.batch.context_tokens)
        refs = find_parts(checkpoint, m, self.config)
        moving = {
            (layer, page): page_names(m, self.config, pages, layer, page)
            for layer in range(m.layers)
            for page in range(pages.resident_pages, pages.pages_per_layer)
        }
        shapes = {name: ref.shape for name, ref in refs.items()}
        check_memory(folder / "runtime.json", plan, shapes, set(chain(*moving.values())))
        torch.set_num_threads(plan.threads)
        keep_freed_memory()
        prepare()
        amx.usable()
        dtype = DTYPES[m.compute_dtype]
        sums = verification(checkpoint, (ref.path for ref in refs.values()))
        self._pages = PageStore(refs, pages, moving, dtype, sums)
        lanes = Lanes(schedule, pages.readers)
        super().__init__(plan, StreamModel(plan, self.config, self._pages), lanes, self._pages.blocks)

    def close(self) -> None:
        super().close()
        self._pages.close()


def stream_constants(plan: RuntimePlan) -> dict[str, object]:
    """What schedule.py has to say for a stream plan."""
    return {
        "LANES": LANES,
        "OPS": OPS,
        "layers": plan.model.layers,
        "pages": plan.pages.pages_per_layer,
        "resident": plan.pages.resident_pages,
        "slots": plan.pages.slots,
        "places": plan.pages.places,
        "guesses": plan.pages.guesses,
    }
