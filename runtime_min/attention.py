"""Attention over a KV cache whose places stay put while sequences come and go.

B sequences, S tokens of each, T = B * S tokens, D head dimension,
Q query heads, V key and value heads, G = Q / V query heads to each of these
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min.model_config import Sight

EVERYTHING = Sight()
SIMILAR = 0.75  # a decode call spans sequences whose lengths differ by less: the longest sets the work of all


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring sequences that attend in one call; `tokens` are their rows within the micro-batch.

    In prefill each has `new` tokens. In decode each has one, `places` are their rows of the KV cache, and
    keys reach up to `length`, of which `mask` (None: all) says which are its.
    """

    tokens: slice
    new: int
    places: slice
    length: int
    mask: Tensor | None  # [B, 1, 1, length]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tokens of one attention call, and for each its place in the KV cache."""

    places: Tensor  # [T]
    positions: Tensor  # [T]
    spans: tuple[Span, ...]

    def on(self, device: torch.device) -> MicroBatch:
        """The same with its tensors on `device`."""
        spans = tuple(replace(s, mask=None if s.mask is None else s.mask.to(device)) for s in self.spans)
        return MicroBatch(self.places.to(device), self.positions.to(device), spans)

    def part(self, tokens: slice, first_place: int) -> MicroBatch:
        """Where some of its tokens go in a cache that begins at `first_place`."""
        return MicroBatch(self.places[tokens] - first_place, self.positions[tokens], ())


class KvCache:
    """Keys and values of all sequences: a tensor [layers, 2, places, V, context, D]; of latents, which are
    both, [layers, 1, places, 1, context, D].

    Of zeros at first: masked values still take part in a product with zero.
    """

    def __init__(self, cache: Tensor) -> None:
        self.tensor = cache

    def store(self, layer: int, batch: MicroBatch, kept: Sequence[Tensor]) -> None:
        """Keep k and v, or latents, [T, V, D] at the places and positions of their tokens."""
        for kind, values in enumerate(kept):
            self.tensor[layer, kind][batch.places, :, batch.positions] = values

    def load(self, layer: int, span: Span) -> tuple[Tensor, Tensor]:
        """The keys and values [B, V, length, D] of a span, as views."""
        return (
            self.tensor[layer, 0, span.places, :, : span.length],
            self.tensor[layer, -1, span.places, :, : span.length],
        )


def attend(
    layer: int,
    batch: MicroBatch,
    cache: KvCache,
    q: Tensor,
    kept: Sequence[Tensor],
    sight: Sight = EVERYTHING,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store new keys and values, or latents, [B, V, D]; return the attention of q [B, Q, D], a token of each
    sequence: [B, Q * D]."""
    cache.store(layer, batch, kept)
    parts = [
        _decode(q[s.tokens], *cache.load(layer, s), _seen_of(batch, s, sight), sinks) for s in batch.spans
    ]
    return joined(parts)


def attend_prompts(
    batch: MicroBatch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sight: Sight = EVERYTHING,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention of q [T, Q, D] of whole prompts over k and v [T, V, D]: [T, Q * D]."""
    spans = ((q[s.tokens], k[s.tokens], v[s.tokens], s.new) for s in batch.spans)
    return joined([prompt_attention(*span, sight, sinks, scale) for span in spans])


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    new: int,
    sight: Sight = EVERYTHING,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of whole prompts of `new` tokens each, given flat. Scores are multiplied by `scale`,
    1 / sqrt(D) if it is None. Values may be narrower than keys."""
    width = v.shape[2]
    if width < k.shape[2]:
        v = F.pad(v, (0, k.shape[2] - width))  # torch has its fast form for equal widths only
    q, k, v = (x.reshape(-1, new, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # [B, heads, S, D]
    mask = None if new <= (sight.window or sight.chunk or new) else seen(sight, 0, 0, new, q.device)
    out = scored(q, k, v, mask, sinks, mask is None, scale)[..., :width]
    return out.transpose(1, 2).flatten(0, 1).flatten(1)


def seen(sight: Sight, first_key: int, start: int, new: int, device: torch.device) -> Tensor:
    """Which keys from `first_key` on each of `new` queries from position `start` on sees: [new, keys]."""
    positions = torch.arange(start, start + new, device=device)[:, None]
    keys = torch.arange(first_key, start + new, device=device)
    return (keys <= positions) & (keys >= first_seen(sight, positions))


def first_seen(sight: Sight, positions: Tensor) -> Tensor:
    """The first key that queries at `positions` see."""
    if sight.chunk:
        return positions // sight.chunk * sight.chunk
    return (positions - sight.window + 1).clamp(min=0) if sight.window else torch.zeros_like(positions)


def scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of q [B, Q, S, D] over k and v [B, V, keys, D], with a sink for each query head.

    A sink is a key before all others, whose value is 0 and whose score is the same for each query: queries
    get a further dimension for it, that other keys have at 0.
    """
    grouped = q.shape[1] != k.shape[1]
    if sinks is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    score = (sinks / scale).to(q.dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1)
    first = int(causal)  # a query before all others, so that a sink is not after the first
    q = F.pad(torch.cat((q, score), dim=3), (0, 0, first, 0))
    k, v = F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 1, 1, 0))
    k[:, :, 0, -1] = 1
    mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out[:, :, first:, :-1]


def _seen_of(batch: MicroBatch, span: Span, sight: Sight) -> Tensor | None:
    """What the new tokens of a span see of their keys: [B, 1, 1, length]."""
    if not sight.window and not sight.chunk:
        return span.mask
    first = first_seen(sight, batch.positions[span.tokens])[:, None, None, None]
    visible = torch.arange(span.length, device=first.device) >= first
    return visible if span.mask is None else visible & span.mask


def _decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    """Attention of one token [B, Q, D] per sequence.

    The G query heads that share keys stand where a sequence would: no key is copied, each is read once.
    With sinks, which differ between them, they cannot, and keys are copied: those of one sequence at a time.
    """
    if sinks is not None:
        masks = [None] * len(q) if mask is None else [mask[i : i + 1] for i in range(len(q))]
        parts = [
            scored(q[i : i + 1, :, None], k[i : i + 1], v[i : i + 1], masks[i], sinks) for i in range(len(q))
        ]
        return torch.cat(parts).flatten(1)
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])  # [B, V, G, D]
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).flatten(1)


def prefill_batch(places: Sequence[int], lengths: Sequence[int]) -> MicroBatch:
    """Whole prompts in order of their rows; neighbours of equal length share a call."""
    spans, row = [], 0
    for new, some in groupby(lengths):
        end = row + new * len(list(some))
        spans.append(Span(slice(row, end), new, slice(0), 0, None))
        row = end
    positions = torch.cat([torch.arange(length) for length in lengths])
    repeated = torch.tensor(places).repeat_interleave(torch.tensor(lengths))
    return MicroBatch(repeated, positions, tuple(spans))


def decode_batch(places: Sequence[int], lengths: Sequence[int]) -> MicroBatch:
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
    return MicroBatch(torch.tensor(places), torch.tensor(lengths) - 1, tuple(spans))


def _decode_span(place: int, start: int, lengths: Sequence[int]) -> Span:
    count, longest = len(lengths), max(lengths)
    mask = None
    if min(lengths) < longest:
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None]
    tokens, places = slice(start, start + count), slice(place, place + count)
    return Span(tokens, 1, places, longest, mask)
