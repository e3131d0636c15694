"""Weights packed in torch alone: what the compiled kernels have to agree with to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from moeplan.runtime_min.formats import BLOCK_VALUES, CUTS, FAR, HALF, SMALLEST_STEP, Packing


def plain_pack(weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """The rows of bf16 `weight` [outer, inner] as bytes, and which values are exceptions [outer, inner]."""
    blocks = weight.reshape(weight.shape[0], -1, BLOCK_VALUES)  # [outer, blocks, 64]
    data, scales, far = {"bf12": _pack_bf12, "int8": _pack_int8, "int4": _pack_int4}[packing.name](blocks)
    return torch.cat((data.flatten(1), scales.flatten(1)), dim=1), far.view(weight.shape)


def _pack_bf12(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    bits = blocks.view(torch.int16)
    signs = ((bits >> 8) & 0x80 | bits & 0x7F).to(torch.uint8)
    exponents = (bits >> 7) & 0xFF
    base = (exponents.amax(-1, keepdim=True) - (FAR - 1)).clamp_(min=0)
    distance = exponents - base
    far = distance < 0
    nibbles = distance.masked_fill_(far, FAR).to(torch.uint8)
    return torch.cat((signs, _pairs(nibbles)), dim=-1), base.to(torch.uint8), far


def _pack_int8(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = blocks.float()
    scale = (values.abs().amax(-1, keepdim=True) / 127).bfloat16()
    whole = (values / _divisor(scale)).round_().clamp_(-127, 127).to(torch.int8)
    return whole.view(torch.uint8), scale.view(torch.uint8), torch.zeros_like(values, dtype=torch.bool)


def _pack_int4(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    halves = blocks.float().view(*blocks.shape[:2], 2, HALF)
    step, least = _least_error(halves)
    whole = ((halves - least) * _inverse(step)).round_().clamp_(0, 15).to(torch.uint8)
    scales = torch.cat((step, least), dim=-1).bfloat16()  # [outer, blocks, 2, 2]
    far = torch.zeros_like(blocks, dtype=torch.bool)
    return _pairs(whole.flatten(-2)), scales.flatten(2).view(torch.uint8), far


def _least_error(halves: Tensor) -> tuple[Tensor, Tensor]:
    """Of a few grids of 16 values in the range of each half block, the one with the least squared error."""
    low, high = halves.amin(-1, keepdim=True), halves.amax(-1, keepdim=True)
    best = step, least = torch.zeros_like(low), low
    error = torch.full_like(low, torch.inf)
    for cut in CUTS:
        shift = (high - low) * cut
        step, least = ((high - low - 2 * shift) / 15).bfloat16().float(), (low + shift).bfloat16().float()
        whole = ((halves - least) * _inverse(step)).round_().clamp_(0, 15)
        found = _sum(whole.mul_(step).add_(least).sub_(halves).square_())
        best = torch.where(found < error, step, best[0]), torch.where(found < error, least, best[1])
        error = torch.minimum(found, error)
    return best


def _sum(values: Tensor) -> Tensor:
    """Of the last dimension, by halving it: in an order that the compiled kernel has too."""
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step > SMALLEST_STEP, 1.0 / step, 0.0)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale.float())


def _pairs(nibbles: Tensor) -> Tensor:
    return nibbles[..., :HALF] | nibbles[..., HALF:] << 4
