"""Latent attention (MLA, DeepSeek-V2, arXiv 2405.04434, section 2.1) over a cache of latents.

In decode each head's matrix of keys is multiplied with its query, and that of values with what was attended:
the latents of a sequence are then read once for all heads. Prompts expand their latents to keys and values.

T tokens, B sequences, Q heads, L width of a latent without and W with what is rotated
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moeplan.runtime_min.decode_attention import decode_attention
from moeplan.runtime_min.layers import linear
from moeplan.runtime_min.model_config import Latent
from moeplan.runtime_min.packing import Matrix, Packed, unpack
from moeplan.runtime_min.paged import PagedBatch, PagedCache, attend_spans


def attend_latent(
    layer: int, batch: PagedBatch, cache: PagedCache, q: Tensor, latents: Tensor, up: Matrix, sizes: Latent
) -> Tensor:
    """Store latents [T, W]; return the attention of q [T, Q, plain + rotated]: [T, Q * value].

    `up` [Q * (plain + value), L] makes keys and values of latents.
    """
    matrix = unpack(up, q.dtype) if isinstance(up, Packed) else up
    kept = latents[:, None]
    cache.store(layer, batch, kept)
    if batch.spans:

        def expanded(kept: Tensor) -> tuple[Tensor, Tensor]:
            return expand(kept[:, 0], matrix, q.shape[1], sizes)

        return attend_spans(layer, batch, cache, q, (kept,), expand=expanded, scale=sizes.score_scale)
    wide = absorbed_queries(q, matrix, sizes)
    out = decode_attention(wide, *cache.layer(layer), batch.tables, batch.lengths)
    return values_of(out.view(wide.shape).to(q.dtype), matrix, sizes)


def absorbed_queries(q: Tensor, up: Tensor, sizes: Latent) -> Tensor:
    """Queries [B, Q, plain + rotated] as they meet latents: [B, Q, W] float32, to be divided by the root of W
    as those that meet keys are."""
    plain, rotated = q.tensor_split((sizes.plain,), 2)
    keys = up.view(q.shape[1], -1, sizes.kv)[:, : sizes.plain]
    wide = torch.cat((torch.bmm(plain.transpose(0, 1), keys).transpose(0, 1), rotated), dim=2)
    return wide.float() * (sizes.score_scale * math.sqrt(wide.shape[2]))


def values_of(attended: Tensor, up: Tensor, sizes: Latent) -> Tensor:
    """What was attended of latents [B, Q, W] as values [B, Q * value]."""
    values = up.view(attended.shape[1], -1, sizes.kv)[:, sizes.plain :]
    latents = attended[..., : sizes.kv].transpose(0, 1)
    return torch.bmm(latents, values.transpose(1, 2)).transpose(0, 1).flatten(1)


def expand(latents: Tensor, up: Tensor, heads: int, sizes: Latent) -> tuple[Tensor, Tensor]:
    """Keys [T, Q, plain + rotated] and values [T, Q, value] of latents [T, W]."""
    both = linear(latents[:, : sizes.kv].contiguous(), up).view(len(latents), heads, -1)
    plain, values = both.tensor_split((sizes.plain,), 2)
    rotated = latents[:, None, sizes.kv :].expand(-1, heads, -1)
    return torch.cat((plain, rotated), dim=2), values
