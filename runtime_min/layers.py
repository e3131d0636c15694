"""The layers that all models share, on flat tokens: no sequence is padded to another's length.

T tokens, H hidden, I inner width of an expert, E experts, K experts per token, D head dimension
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min import amx, vectors
from moeplan.runtime_min.packing import Matrix, Packed, unpack
from moeplan.runtime_min.rope_scaling import Llama3Scaling, LongScaling, Scaling, YarnScaling


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise float32 `x` [T, H]; the result has the dtype of `weight` [H]."""
    return F.rms_norm(x, x.shape[-1:], None, eps).to(weight.dtype).mul_(weight)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Centre and normalise float32 `x` [T, H]; the result has the dtype of `weight` [H]."""
    shift = None if bias is None else bias.float()
    return F.layer_norm(x, x.shape[-1:], weight.float(), shift, eps).to(weight.dtype)


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in], plus bias [out], by the fastest way that this CPU has."""
    out = amx.linear(x, weight)
    if out is None:
        out = vectors.linear(x, weight)
    if out is None:
        plain = unpack(weight, x.dtype) if isinstance(weight, Packed) else weight
        return F.linear(pad_rows(x), plain, bias)[: x.shape[0]]
    return out if bias is None else out.add_(bias)


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


def fused_expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same of x [T, H] with gates and ups [H, 2 I] side by side and down [I, H], both transposed."""
    gate, up = linear(x, gate_up.T).chunk(2, dim=1)
    return linear(F.silu(gate).mul_(up), down.T)


def clamped_expert(
    x: Tensor, gate_up: Matrix, gate_up_bias: Tensor, down: Matrix, bias: Tensor, limit: float, gain: float
) -> Tensor:
    """down · ((up + 1) · gate · sigmoid(gain · gate)) of x [T, H], gates cut above and ups on both sides.

    Gates and ups alternate in gate_up [H, 2 I]; down is [I, H]. Packed ones lie transposed.
    Source: gpt-oss, arXiv 2508.10925, section 2.2, and transformers 5.23.0, `modeling_gpt_oss.py`.
    """
    both = linear(x, _as_rows(gate_up), gate_up_bias)  # [T, 2 I]
    gate, up = both[:, ::2].clamp_(max=limit), both[:, 1::2].clamp_(-limit, limit)
    inner = torch.sigmoid_(gate * gain).mul_(gate).mul_(up.add_(1))
    return linear(inner, _as_rows(down), bias)


def _as_rows(weight: Matrix) -> Matrix:
    """[out, in]: as MXFP4 has it, while plain ones of pairs are stored transposed."""
    return weight if isinstance(weight, Packed) else weight.T


@dataclass(frozen=True, slots=True)
class Routing:
    """The choices of all tokens, sorted by expert: expert e has those from starts[e] to starts[e + 1]."""

    tokens: Tensor  # [T * K]
    weights: Tensor  # [T * K], float32
    starts: list[int]  # [E + 1]


def sort_by_expert(weights: Tensor, experts: Tensor, count: int) -> Routing:
    """Group the choices [T, K] of all tokens by expert, tokens in order within each; there may be none."""
    if not experts.numel():
        return Routing(experts.flatten(), weights.flatten(), [0] * (count + 1))
    if count == 1:
        every = torch.arange(len(experts), device=experts.device)
        return Routing(every, weights.flatten(), [0, len(experts)])
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    ends = accumulate(torch.bincount(chosen, minlength=count).tolist())
    return Routing(order // experts.shape[1], weights.take(order), [0, *ends])


def rope_frequencies(dim: int, theta: float, scaling: Scaling | None) -> Tensor:
    """Radians per position of each pair of `dim` rotated dimensions: [dim / 2].

    Llama 3.1: waves longer than the old context / `low_freq_factor` get `factor` times longer, those shorter
    than it over `high_freq_factor` stay, between them the stretch is blended. Others: see `rope_scaling`.
    Source: transformers 5.23.0, `modeling_rope_utils.py`.
    """
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    match scaling:
        case Llama3Scaling():
            turns = scaling.original_context_tokens * inverse / (2 * math.pi)  # in the old context
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return (1 - kept) * inverse / scaling.factor + kept * inverse
        case YarnScaling():
            return _yarn(inverse, dim, theta, scaling)
        case LongScaling():
            return inverse / torch.tensor(scaling.factors)
    return inverse


def _yarn(inverse: Tensor, dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    def place(turns: float) -> float:
        """The pair, in parts, that turns so often in the old context."""
        return dim * math.log(scaling.original_context_tokens / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(scaling.fast), place(scaling.slow)
    if scaling.rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return inverse / scaling.factor * stretched + inverse * (1 - stretched)


class Rope:
    """Rotary position embedding for up to `context` positions, of the first dimensions if not of all.

    Pairs are half a head apart, or `neighbours`. Neighbours do not return to their places: queries and keys
    are permuted alike, which scores do not see.
    """

    def __init__(
        self,
        frequencies: Tensor,
        context: int,
        dtype: torch.dtype,
        factor: float = 1.0,
        neighbours: bool = False,
    ) -> None:
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        self._cos = (angles.cos() * factor).to(dtype).repeat(1, 2)  # [context, dim]
        sin = (angles.sin() * factor).to(dtype)
        self._sin = torch.cat((-sin, sin), dim=1)  # [context, dim]
        self._neighbours = neighbours
        self._last: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x [T, heads, D] to its positions [T]."""
        dim = self._cos.shape[1]
        if dim < x.shape[2]:
            return torch.cat((self(x[..., :dim], positions), x[..., dim:]), dim=-1)
        if self._neighbours:
            x = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
        cos, sin = self._at(positions)
        return (x * cos).addcmul_(x.roll(dim // 2, dims=-1), sin)

    def _at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, dim]; the layers of a pass ask for the same."""
        last = self._last
        if not last or last[0] is not positions:
            last = self._last = (positions, self._cos[positions, None], self._sin[positions, None])
        return last[1], last[2]
