"""Matrices in fewer bits: packed, and unpacked into the bf16 values that they stand for; see formats.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_min import team
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.formats import (
    BLOCK_VALUES,
    EXCEPTION_BYTES,
    HALF,
    MX_VALUES,
    SCALED,
    Packing,
    Scaled,
)

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1, the sign apart
_PLAIN_VALUES = 1 << 20  # that torch unpacks at once


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed matrix [outer, inner] in memory: `data` are its bytes.

    `scales` are those that lie apart, and `grid` tells the kernels of them: address, rows and values of a
    block, scales of a row of blocks.
    """

    data: Tensor
    shape: tuple[int, int]
    packing: Packing | Scaled
    scales: Tensor | None = None
    grid: Tensor | None = None

    def beside(self) -> int:
        """How many exceptions follow the rows, or the address of `grid`."""
        if isinstance(self.packing, Packing):
            return (len(self.data) - self.packing.least_bytes(self.shape)) // EXCEPTION_BYTES
        assert self.grid is not None
        return self.grid.data_ptr()

    @property
    def compiled(self) -> bool:
        """Whether kernels take it: whole blocks of 64 values, each with one scale."""
        if self.grid is None:
            return True
        values = int(self.grid[2])
        alone = values % BLOCK_VALUES == 0 or values >= self.shape[1] or values == MX_VALUES
        return self.shape[1] % BLOCK_VALUES == 0 and alone


def scaled(
    data: Tensor, scales: Tensor, shape: tuple[int, int], packing: Scaled, block: tuple[int, int]
) -> Packed:
    """A matrix [outer, inner] of `data` with a scale for each `block` of rows and values."""
    grid = torch.tensor([scales.data_ptr(), *block, -(-shape[1] // block[1])])
    return Packed(data, shape, packing, scales, grid)


Matrix = Tensor | Packed


def lies_ready(x: Tensor, weight: Matrix) -> bool:
    """Whether compiled kernels can multiply bf16 `x` [T, in] by the weight [out, in] where both lie."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or x.dim() != 2 or x.numel() == 0:
        return False
    if isinstance(weight, Packed):
        return weight.compiled
    return weight.dtype == x.dtype and weight.device == x.device and weight.is_contiguous()


def pack(weight: Tensor, packing: Packing, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """The rows of bf16 `weight` [outer, inner] as bytes [outer, row bytes], and the exceptions [n, 8].

    Exceptions count rows from `first_row`. Values that are not finite survive in bf12 only. Raises RunError
    where Numba is not installed.
    """
    kernel = _packer()
    if kernel is None:
        raise RunError("weights are packed by compiled code only, and numba is not installed")
    rows, far = _compiled(kernel, weight, packing)
    return rows, _exceptions(weight, far, first_row)


def _compiled(kernel: Any, weight: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
    """The rows, and where exceptions are, if any."""
    rows = torch.empty(len(weight), packing.row_bytes(weight.shape[1]), dtype=torch.uint8)
    if packing.name == "bf12":
        far = torch.empty(weight.shape, dtype=torch.bool)
        bits = weight.contiguous().view(torch.int16).numpy().view("uint16")
        return rows, far if kernel.pack_bf12(bits, rows.numpy(), far.numpy()) else None
    pack_rows = {"int8": kernel.pack_int8, "int4": kernel.pack_int4}[packing.name]
    pack_rows(weight.float().contiguous().numpy(), rows.numpy())
    return rows, None


def packed(weight: Tensor, packing: Packing) -> Packed:
    """All of a bf16 matrix."""
    rows, exceptions = pack(weight, packing)
    data = torch.cat((rows.flatten(), exceptions.flatten()))
    return Packed(data, (weight.shape[0], weight.shape[1]), packing)


def unpack(packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix [outer, inner] in `dtype`; compiled where Numba is installed."""
    if packed.grid is not None and dtype != torch.bfloat16:
        return plain(packed, dtype)  # more than bf16 holds
    kernel = _kernel() if packed.compiled else None
    if kernel is None or packed.data.device.type != "cpu":
        return plain(packed, dtype)
    outer, inner = packed.shape
    out = torch.empty(packed.shape, dtype=torch.bfloat16)
    parts, code = -(-outer // kernel.ROWS), packed.packing.code
    address = packed.data.data_ptr()
    team.run(kernel.unpack, [0, parts, address, code, outer, inner, packed.beside(), out.data_ptr()])
    return out.to(dtype)


@functools.cache
def _kernel() -> Any | None:
    return team.module("packed_kernel", "kernel_parts")


@functools.cache
def _packer() -> Any | None:
    return team.module("pack_kernel", "formats", "kernel_parts")


def plain(packed: Packed, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The same in torch alone."""
    (outer, inner), packing = packed.shape, packed.packing
    if isinstance(packing, Scaled):
        return _plain_scaled(packed, dtype)
    size = packing.least_bytes(packed.shape)
    rows = packed.data[:size].view(outer, -1)
    cut = inner // BLOCK_VALUES * packing.data_bytes
    data, scales = rows[:, :cut].view(outer, -1, packing.data_bytes), rows[:, cut:]
    values = {"bf12": _unpack_bf12, "int8": _unpack_int8, "int4": _unpack_int4}[packing.name](data, scales)
    out = values.reshape(outer, inner)
    if len(packed.data) > size:
        row, column, value = read_exceptions(packed)
        out[row, column] = value
    return out.to(dtype)


def _plain_scaled(packed: Packed, dtype: torch.dtype) -> Tensor:
    assert packed.grid is not None
    assert packed.scales is not None
    (outer, inner), out = packed.shape, torch.empty(packed.shape, dtype=dtype)
    height, width, count = packed.grid.tolist()[1:]
    data, scales = packed.data.view(outer, -1), packed.scales.view(-1, count)
    rows = max(1, _PLAIN_VALUES // inner)
    for first in range(0, outer, rows):
        some = slice(first, min(outer, first + rows))
        blocks = torch.arange(some.start, some.stop) // height
        factors = scales[blocks].repeat_interleave(width, dim=1)[:, :inner]
        if packed.packing is SCALED["mxfp4"]:
            out[some] = _fp4(data[some], factors)
        else:
            out[some] = data[some].view(torch.float8_e4m3fn).float() * factors
    return out


def _fp4(data: Tensor, exponents: Tensor) -> Tensor:
    table = torch.tensor([*_FP4, *(-value for value in _FP4)])
    pairs = torch.stack((table[data.int() & 15], table[data.int() >> 4]), dim=2)
    return torch.ldexp(pairs.flatten(1), exponents.int() - 127)


def read_exceptions(packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of those that follow the rows."""
    assert isinstance(packed.packing, Packing)
    tail = packed.data[packed.packing.least_bytes(packed.shape) :].clone().view(-1, EXCEPTION_BYTES)
    row = tail[:, :4].contiguous().view(torch.int32)[:, 0].long()
    column = tail[:, 4:6].contiguous().view(torch.int16)[:, 0].long() & 0xFFFF
    return row, column, tail[:, 6:].contiguous().view(torch.bfloat16)[:, 0]


def _exceptions(weight: Tensor, far: Tensor | None, first_row: int) -> Tensor:
    if far is None:
        return torch.empty(0, EXCEPTION_BYTES, dtype=torch.uint8)
    row, column = far.nonzero(as_tuple=True)
    parts = (
        (row + first_row).to(torch.int32).view(-1, 1).view(torch.uint8),
        column.to(torch.int16).view(-1, 1).view(torch.uint8),
        weight[row, column].view(-1, 1).view(torch.uint8),
    )
    return torch.cat(parts, dim=1)


def _unpack_bf12(data: Tensor, base: Tensor) -> Tensor:
    signs = data[..., :BLOCK_VALUES].to(torch.int16)
    exponents = _nibbles(data[..., BLOCK_VALUES:]).to(torch.int16) + base.to(torch.int16)[..., None]
    return ((signs & 0x80) << 8 | (exponents & 0xFF) << 7 | signs & 0x7F).view(torch.bfloat16)


def _unpack_int8(data: Tensor, scales: Tensor) -> Tensor:
    scale = _bf16(scales).view(len(data), -1, 1)
    return (data.view(torch.int8).float() * scale).bfloat16()


def _unpack_int4(data: Tensor, scales: Tensor) -> Tensor:
    grids = _bf16(scales).view(len(data), -1, 2, 2, 1)  # step and least value of each half
    whole = _nibbles(data).float().view(*data.shape[:2], 2, HALF)
    return whole.mul_(grids[:, :, :, 0]).add_(grids[:, :, :, 1]).bfloat16().flatten(-2)


def _bf16(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.bfloat16).float()


def _nibbles(pairs: Tensor) -> Tensor:
    return torch.cat((pairs & 15, pairs >> 4), dim=-1)
