"""Attention of one new token per sequence over a KV cache in blocks: compiled, or in plain torch.

A cache of keys, and one of values, is a tensor [blocks, V, block_tokens, D]: a block holds the keys of
`block_tokens` neighbouring tokens of one sequence, those of a head in one run of memory. `tables` [B, M]
names the blocks of each sequence in order; entries past its length are not looked at.

B sequences, Q query heads, V key and value heads, G = Q / V query heads to each, D head dimension
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min import team

Scales = tuple[Tensor, Tensor]  # of keys and of values
WIDTHS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # vectors of 16 in 64 bytes of a row
PARTS_PER_THREAD = 4  # so that a thread that is interrupted leaves parts to the others


def prepare() -> None:
    """Load the compiled kernel; the first time ever it is compiled, for some seconds."""
    _kernel()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """Attention of q [B, Q, D] over the first `lengths` [B] tokens of each sequence, one or more: [B, Q * D].

    Tokens before `starts` [B], which lie in the first block, are left out. `sinks` [Q] are scores of a key
    that every query has besides, of value 0. Values of an int8 cache are multiples of their rows' `scales`
    [blocks, V, block_tokens]. Products and sums are float32, the result has q's dtype. `tables` is int32.
    Compiled by Numba where it is installed, for bf16, float32 and int8 caches whose rows are multiples of 64
    bytes, in blocks of a multiple of 16 tokens; `plain` computes the rest.
    """
    kernel = _kernel() if _fits(q, k_cache, v_cache) else None
    if kernel is None:
        return plain(q, k_cache, v_cache, tables, lengths, starts, sinks, scales)
    lengths = lengths.to(torch.int64).contiguous()
    tables = tables.to(torch.int32).contiguous()
    return _compiled(kernel, q, k_cache, v_cache, tables, lengths, starts, sinks, scales)


def plain(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    scales: Scales | None = None,
) -> Tensor:
    """The same in torch alone, one sequence at a time."""
    rows, begins = [], [0] * len(q) if starts is None else starts.tolist()
    for i, (begin, length) in enumerate(zip(begins, lengths.tolist(), strict=True)):
        blocks = tables[i, : -(-length // k_cache.shape[2])].long()
        k, v = k_cache[blocks].float(), v_cache[blocks].float()
        if scales is not None:
            k, v = k * scales[0][blocks, ..., None], v * scales[1][blocks, ..., None]
        k = k.transpose(0, 1).flatten(1, 2)[:, begin:length]  # [V, tokens, D]
        v = v.transpose(0, 1).flatten(1, 2)[:, begin:length]
        grouped = q[i].reshape(k.shape[0], -1, q.shape[2])  # [V, G, D]
        if sinks is None:
            rows.append(F.scaled_dot_product_attention(grouped.float(), k, v).flatten())
            continue
        scores = grouped.float() @ k.transpose(1, 2) / q.shape[2] ** 0.5  # [V, G, tokens]
        scores = torch.cat((scores, sinks.float().view(*scores.shape[:2], 1)), dim=2)
        rows.append((scores.softmax(dim=2)[..., :-1] @ v).flatten())
    return torch.stack(rows).to(q.dtype)


def _fits(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> bool:
    block_tokens, size = k_cache.shape[2:]
    return (
        q.device.type == "cpu"
        and k_cache.dtype == v_cache.dtype
        and k_cache.dtype in WIDTHS
        and block_tokens % 16 == 0
        and size * k_cache.element_size() % 64 == 0
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
    )


@functools.cache
def _kernel() -> Any | None:
    """The module of the compiled kernel, or None without Numba."""
    return team.module("attention_kernel", "kernel_parts")


def _compiled(
    kernel: Any,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    scales: Scales | None,
) -> Tensor:
    heads, block_tokens, size = k_cache.shape[1:]
    group = q.shape[1] // heads
    given = q.float().contiguous()
    out = torch.empty_like(given)
    begins = None if starts is None else starts.to(torch.int64).contiguous()
    extra = None if sinks is None else sinks.float().contiguous()
    parts = PARTS_PER_THREAD * torch.get_num_threads()
    space = group * (2 * size + block_tokens + 2) + 2 * group * (size + 2)
    scratch, opened = torch.empty(parts * space), torch.empty(2 * parts, dtype=torch.int64)
    table = [
        *(0, 0, parts, given.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()),
        *(tables.data_ptr(), tables.shape[1], lengths.data_ptr(), len(q), heads, group, size, block_tokens),
        *(WIDTHS[k_cache.dtype], out.data_ptr(), scratch.data_ptr(), opened.data_ptr()),
        *(0 if given is None else given.data_ptr() for given in (begins, extra, *(scales or (None, None)))),
    ]
    team.run(kernel.attend, table)
    return out.flatten(1).to(q.dtype)
