"""A KV cache in blocks of equal size: a sequence holds as many as it can come to need, wherever they lie.

B sequences, S tokens of each, T tokens in all, M blocks of a sequence, t tokens of a block, D head dimension,
Q query heads, V key and value heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeplan.runtime_min.attention import EVERYTHING, first_seen, joined, prompt_attention, scored, seen
from moeplan.runtime_min.decode_attention import Scales, decode_attention
from moeplan.runtime_min.model_config import Sight
from moeplan.runtime_min.plan_file import KV_BLOCK_TOKENS, kv_blocks

Expand = Callable[..., tuple[Tensor, Tensor]]
Piece = tuple[Tensor, int, int]  # a sequence's blocks [M], and its tokens from .. to that a pass reads


@dataclass(frozen=True, slots=True)
class Span:
    """Prompt tokens that attend in one call: `new` each of sequences that begin, or of one whose keys before
    `start` are cached in the blocks `table` [M]."""

    tokens: slice
    start: int
    new: int
    table: Tensor


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """The tokens of one attention call: their rows of the pass, positions, and places in the cache.

    Either one token of each sequence, with the blocks and the lengths of all, or `spans` of prompts.
    """

    rows: slice
    positions: Tensor  # [T]
    blocks: Tensor  # [T]
    offsets: Tensor  # [T], within the block
    tables: Tensor  # [B, M] int32
    lengths: Tensor  # [B]
    spans: tuple[Span, ...]


class PagedCache:
    """Keys and values of all sequences: a tensor [layers, 2, blocks, V, t, D], and who has which blocks.

    Of latents, which are both, `kinds` is 1. Of zeros at first: values that are masked still take part in a
    product with zero. With `int8` each head's values of a token are whole numbers times a scale of their own,
    [layers, 2, blocks, V, t]; what is loaded again has `dtype`.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        tokens: int,
        dtype: torch.dtype,
        kinds: int = 2,
        int8: bool = False,
    ) -> None:
        blocks = kv_blocks(tokens)
        shape = (layers, kinds, blocks, kv_heads, KV_BLOCK_TOKENS, head_dim)
        self._dtype = dtype
        self.tensor = torch.empty(shape, dtype=torch.int8 if int8 else dtype).zero_()
        self._scales = torch.empty(shape[:-1]).zero_() if int8 else None
        self._free = list(reversed(range(blocks)))
        self._holders = [0] * blocks
        self._tables: dict[int, Tensor] = {}

    def room(self, tokens: Iterable[int]) -> int:
        """How many sequences of so many `tokens`, in their order, fit beside those here."""
        left = len(self._free)
        fitting = 0
        for count in tokens:
            left -= kv_blocks(count)
            fitting += left >= 0
        return fitting

    def take(self, key: int, tokens: int, shared: Sequence[int] = ()) -> list[int]:
        """Give the sequence `key` the blocks for `tokens`, `shared` ones among them; return all."""
        blocks = [*shared, *(self._free.pop() for _ in range(kv_blocks(tokens) - len(shared)))]
        for block in blocks:
            self._holders[block] += 1
        self._tables[key] = torch.tensor(blocks).int()
        return blocks

    def give_back(self, key: int) -> list[int]:
        """The sequence `key` is done; return the blocks that nobody holds any longer."""
        blocks = self._tables.pop(key).tolist()
        for block in blocks:
            self._holders[block] -= 1
        freed = [block for block in reversed(blocks) if not self._holders[block]]
        self._free += freed
        return freed

    def table(self, key: int) -> Tensor:
        """The blocks [M] of the sequence `key`, int32."""
        return self._tables[key]

    def store(self, layer: int, batch: PagedBatch, *kinds: Tensor) -> None:
        """Keep k and v, or latents, [T, V, D] in the places of their tokens."""
        for kind, values in enumerate(kinds):
            if self._scales is not None:
                values, scales = whole_numbers(values)
                self._scales[layer, kind][batch.blocks, :, batch.offsets] = scales
            self.tensor[layer, kind][batch.blocks, :, batch.offsets] = values

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The keys and the values [blocks, V, t, D] of a layer; of latents twice the same."""
        return self.tensor[layer, 0], self.tensor[layer, -1]

    def scales(self, layer: int) -> Scales | None:
        """Those of the keys and of the values [blocks, V, t] of a layer, where the cache is of int8."""
        return None if self._scales is None else (self._scales[layer, 0], self._scales[layer, -1])

    def load(self, layer: int, table: Tensor, first: int, end: int) -> tuple[Tensor, ...]:
        """Copies of a sequence's keys and values [V, tokens, D] from `first` to `end`, or of its latents."""
        block = first // KV_BLOCK_TOKENS
        found = self.tensor[layer][:, table[block : kv_blocks(end)]]
        if self._scales is not None:
            scales = self._scales[layer][:, table[block : kv_blocks(end)], ..., None]
            found = (found * scales).to(self._dtype)
        found = found.transpose(1, 2)  # [2, V, M, t, D]
        flat = found.reshape(*found.shape[:2], -1, found.shape[4])
        return tuple(flat[:, :, first - block * KV_BLOCK_TOKENS : end - block * KV_BLOCK_TOKENS])


def whole_numbers(values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] as whole numbers from -127 to 127, and their scales [...], float32."""
    values = values.float()
    scales = values.abs().amax(-1) / 127
    whole = (values / torch.where(scales == 0, 1.0, scales)[..., None]).round_()
    return whole.to(torch.int8), scales


def decode_batch(first_row: int, tables: Sequence[Tensor], lengths: Sequence[int]) -> PagedBatch:
    """The newest token of each sequence, whose length counts that token."""
    all_tokens = torch.tensor(lengths)
    positions = all_tokens - 1
    padded = torch.nn.utils.rnn.pad_sequence(list(tables), batch_first=True)
    blocks = padded.gather(1, (positions // KV_BLOCK_TOKENS)[:, None]).squeeze(1).long()
    rows = slice(first_row, first_row + len(lengths))
    offsets = positions % KV_BLOCK_TOKENS
    return PagedBatch(rows, positions, blocks, offsets, padded, all_tokens, ())


def prompt_batch(first_row: int, pieces: Sequence[Piece]) -> PagedBatch:
    """Parts of prompts, in the order of their rows; neighbours that begin and are as long share a call."""
    spans: list[Span] = []
    row = 0
    for table, start, end in pieces:
        new, last = end - start, spans[-1] if spans else None
        if last and last.start == start == 0 and last.new == new:
            spans[-1] = Span(slice(last.tokens.start, row + new), 0, new, table)
        else:
            spans.append(Span(slice(row, row + new), start, new, table))
        row += new
    positions = torch.cat([torch.arange(start, end) for _, start, end in pieces])
    blocks = torch.cat([table[torch.arange(s, e) // KV_BLOCK_TOKENS] for table, s, e in pieces]).long()
    none = torch.empty(0, dtype=torch.int32)
    rows = slice(first_row, first_row + row)
    return PagedBatch(rows, positions, blocks, positions % KV_BLOCK_TOKENS, none, none, tuple(spans))


def attend_paged(
    layer: int,
    batch: PagedBatch,
    cache: PagedCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight = EVERYTHING,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store k and v [T, V, D]; return the attention of q [T, Q, D] over each sequence: [T, Q * D]."""
    cache.store(layer, batch, k, v)
    if batch.spans:
        return attend_spans(layer, batch, cache, q, (k, v), sight, sinks)
    tables, lengths, starts = _visible(batch, sight)
    return decode_attention(q, *cache.layer(layer), tables, lengths, starts, sinks, cache.scales(layer))


def attend_spans(
    layer: int,
    batch: PagedBatch,
    cache: PagedCache,
    q: Tensor,
    kept: Sequence[Tensor],
    sight: Sight = EVERYTHING,
    sinks: Tensor | None = None,
    expand: Expand = lambda k, v: (k, v),
    scale: float | None = None,
) -> Tensor:
    """Causal attention of prompts: of whole ones, given flat, or of a later part of one.

    `expand` makes keys and values of what the cache keeps, and `kept` [T, V, D] is of these tokens.
    """
    parts = []
    for span in batch.spans:
        some = span.tokens
        if span.start == 0:
            k, v = expand(*(x[some] for x in kept))
            parts.append(prompt_attention(q[some], k, v, span.new, sight, sinks, scale))
            continue
        first = int(first_seen(sight, torch.tensor(span.start)))
        cached = cache.load(layer, span.table, first, span.start + span.new)
        given = (q[some], *expand(*(x.transpose(0, 1) for x in cached)))
        queries, k, v = (x.transpose(0, 1)[None] for x in given)
        mask = seen(sight, first, span.start, span.new, q.device)
        out = scored(queries, k, v, mask, sinks, scale=scale)
        parts.append(out[0].transpose(0, 1).flatten(1))
    return joined(parts)


def _visible(batch: PagedBatch, sight: Sight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The blocks of each sequence that its newest token sees, up to where, and from where in the first."""
    if not sight.window and not sight.chunk:
        return batch.tables, batch.lengths, None
    first = first_seen(sight, batch.positions)
    skipped = first // KV_BLOCK_TOKENS
    lengths = batch.lengths - skipped * KV_BLOCK_TOKENS
    most = min(batch.tables.shape[1], kv_blocks(int(lengths.max())))
    columns = skipped[:, None] + torch.arange(most)
    tables = batch.tables.gather(1, columns.clamp(max=batch.tables.shape[1] - 1))
    return tables, lengths, first - skipped * KV_BLOCK_TOKENS
