"""The layers that all models share, on flat tokens: no sequence is padded to another's length.

T tokens, H hidden, I inner width of an expert, E experts, K experts per token, D head dimension
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min import amx, vectors
from moeplan.runtime_min.model_config import RopeScaling
from moeplan.runtime_min.packing import Matrix, Packed, unpack


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise float32 `x` [T, H]; the result has the dtype of `weight` [H]."""
    return F.rms_norm(x, x.shape[-1:], None, eps).to(weight.dtype).mul_(weight)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [T, in] times weight [out, in], by the fastest way that this CPU has."""
    for way in (amx.linear, vectors.linear):
        if (done := way(x, weight)) is not None:
            return done
    plain = unpack(weight).to(x.dtype) if isinstance(weight, Packed) else weight
    return F.linear(pad_rows(x), plain)[: x.shape[0]]


def pad_rows(x: Tensor) -> Tensor:
    """Round the rows of a half precision product up to one of few numbers.

    oneDNN compiles and keeps a kernel for each number of rows it meets: 2 ms and 0.7 MB each where it was
    measured, more than most products take, and routing brings new numbers forever.
    """
    if x.dtype == torch.float32:
        return x
    extra = round_rows(x.shape[0]) - x.shape[0]
    return F.pad(x, (0, 0, 0, extra)) if extra else x


def round_rows(rows: int) -> int:
    """The next power of two up to 16, then the next of about four steps to each power of two."""
    power = 1 << max(0, rows - 1).bit_length()  # the next power of two
    step = power if rows <= 16 else max(16, power // 8)
    return -(-rows // step) * step


def expert(x: Tensor, w1: Matrix, w2: Matrix, w3: Matrix) -> Tensor:
    """w2 · (silu(w1 · x) * (w3 · x)) for x [T, H], w1 and w3 [I, H], w2 [H, I]."""
    inner = F.silu(linear(x, w1), inplace=True)  # [T, I]
    return linear(inner.mul_(linear(x, w3)), w2)


@dataclass(frozen=True, slots=True)
class Routing:
    """The choices of all tokens, sorted by expert: expert e has those from starts[e] to starts[e + 1]."""

    tokens: Tensor  # [T * K]
    weights: Tensor  # [T * K], float32
    starts: list[int]  # [E + 1]


def choose_experts(x: Tensor, gate: Tensor, top: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """The `top` experts of each token and their weights: [T, K] float32, [T, K].

    Weights are the experts' shares among all; where `renormalise`, among those chosen, so that they sum to 1.
    """
    scores = F.softmax(linear(x, gate).float(), dim=-1)  # [T, E]
    weights, experts = scores.topk(top, dim=-1)
    return (weights.div_(weights.sum(dim=-1, keepdim=True)) if renormalise else weights), experts


def sort_by_expert(weights: Tensor, experts: Tensor, count: int) -> Routing:
    """Group the choices [T, K] of all tokens by expert, tokens in order within each."""
    if count == 1:
        every = torch.arange(len(experts), device=experts.device)
        return Routing(every, weights.flatten(), [0, len(experts)])
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=count).cumsum(0).tolist()
    return Routing(order // experts.shape[1], weights.flatten()[order], [0, *ends])


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair of dimensions: [D / 2].

    Scaled as Llama 3.1 is: waves longer than the old context / `low_freq_factor` get `factor` times longer,
    those shorter than it over `high_freq_factor` stay, between them the stretch is blended.
    Source: transformers 5.23.0, `_compute_llama3_parameters`.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return inverse
    turns = scaling.original_context_tokens * inverse / (2 * math.pi)  # in the old context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * inverse / scaling.factor + kept * inverse


class Rope:
    """Rotary position embedding for up to `context` positions."""

    def __init__(self, frequencies: Tensor, context: int, dtype: torch.dtype) -> None:
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies).repeat(1, 2)
        self._cos, self._sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [context, D]

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [T, heads, D] to its positions [T]."""
        low, high = x.chunk(2, dim=-1)
        cos, sin = self._cos[positions, None], self._sin[positions, None]  # [T, 1, D]
        return x * cos + torch.cat((-high, low), dim=-1) * sin
