"""Attention over a KV cache whose places stay put while sequences come and go.

B sequences, S tokens of each, T = B * S tokens, D head dimension,
Q query heads, V key and value heads, G = Q / V query heads to each of these
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILAR = 0.75  # a decode call spans sequences whose lengths differ by less: the longest sets the work of all


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring sequences that attend in one call.

    `tokens` are their rows within the micro-batch and `places` their rows of the KV cache. In prefill each
    has `new` tokens; in decode one, and keys up to `length`, of which `mask` (None: all) says which are its.
    """

    tokens: slice
    places: slice
    new: int
    length: int
    mask: Tensor | None  # [B, 1, 1, length]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tokens of one attention call: rows of the pass, and for each its place in the KV cache."""

    rows: slice
    places: Tensor  # [T]
    positions: Tensor  # [T]
    spans: tuple[Span, ...]
    prefill: bool

    def on(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on `device`."""
        spans = tuple(replace(s, mask=None if s.mask is None else s.mask.to(device)) for s in self.spans)
        return replace(self, places=self.places.to(device), positions=self.positions.to(device), spans=spans)

    def part(self, tokens: slice, first_place: int) -> MicroBatch:
        """Where some of its tokens go in a cache that begins at `first_place`."""
        places = self.places[tokens] - first_place
        return replace(self, places=places, positions=self.positions[tokens], spans=())


class KvCache:
    """Keys and values of all sequences: a tensor [layers, 2, places, V, context, D].

    Of zeros at first: masked values still take part in a product with zero.
    """

    def __init__(self, cache: Tensor) -> None:
        self.tensor = cache

    def store(self, layer: int, batch: MicroBatch, k: Tensor, v: Tensor) -> None:
        """Keep k and v [T, V, D] at the places and positions of their tokens."""
        self.tensor[layer, 0][batch.places, :, batch.positions] = k
        self.tensor[layer, 1][batch.places, :, batch.positions] = v

    def load(self, layer: int, span: Span) -> tuple[Tensor, Tensor]:
        """The keys and values [B, V, length, D] of a span, as views."""
        return (
            self.tensor[layer, 0, span.places, :, : span.length],
            self.tensor[layer, 1, span.places, :, : span.length],
        )


def attend(layer: int, batch: MicroBatch, cache: KvCache, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Store k and v [T, V, D]; return the attention of q [T, Q, D] over each sequence: [T, Q * D]."""
    cache.store(layer, batch, k, v)
    if batch.prefill:
        return attend_prompts(batch, q, k, v)
    return _joined([_decode(q[s.tokens], *cache.load(layer, s), s.mask) for s in batch.spans])


def attend_prompts(batch: MicroBatch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention of q [T, Q, D] of whole prompts over k and v [T, V, D]: [T, Q * D]."""
    return _joined([prompt_attention(q[s.tokens], k[s.tokens], v[s.tokens], s.new) for s in batch.spans])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def prompt_attention(q: Tensor, k: Tensor, v: Tensor, new: int) -> Tensor:
    """Causal attention of whole prompts of `new` tokens each, given flat."""
    q, k, v = (x.reshape(-1, new, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def _decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one token [B, Q, D] per sequence.

    The G query heads that share keys stand where a sequence would: no key is copied, each is read once.
    """
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])  # [B, V, G, D]
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).flatten(1)


def prefill_batch(first_row: int, places: Sequence[int], lengths: Sequence[int]) -> MicroBatch:
    """Whole prompts in order of their rows; neighbours of equal length share a call."""
    spans, row, start = [], 0, 0
    for end in range(1, len(places) + 1):
        if (
            end < len(places)
            and lengths[end] == lengths[start]
            and places[end] == places[start] + end - start
        ):
            continue
        tokens = (end - start) * lengths[start]
        where = slice(places[start], places[start] + end - start)
        spans.append(Span(slice(row, row + tokens), where, lengths[start], lengths[start], None))
        row, start = row + tokens, end
    positions = torch.cat([torch.arange(length) for length in lengths])
    repeated = torch.tensor(places).repeat_interleave(torch.tensor(lengths))
    return MicroBatch(slice(first_row, first_row + row), repeated, positions, tuple(spans), prefill=True)


def decode_batch(first_row: int, places: Sequence[int], lengths: Sequence[int]) -> MicroBatch:
    """One token per sequence, whose length counts that token; neighbours of similar length share a call."""
    spans, start = [], 0
    least = most = lengths[0]
    for end in range(1, len(places) + 1):
        if end < len(places):
            least, most = min(least, lengths[end]), max(most, lengths[end])
            if places[end] == places[end - 1] + 1 and least >= SIMILAR * most:
                continue
            least = most = lengths[end]
        spans.append(_decode_span(places[start], start, lengths[start:end]))
        start = end
    positions = torch.tensor(lengths) - 1
    rows = slice(first_row, first_row + len(places))
    return MicroBatch(rows, torch.tensor(places), positions, tuple(spans), prefill=False)


def _decode_span(place: int, start: int, lengths: Sequence[int]) -> Span:
    count, longest = len(lengths), max(lengths)
    mask = None
    if min(lengths) < longest:
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]
    return Span(slice(start, start + count), slice(place, place + count), 1, longest, mask)
