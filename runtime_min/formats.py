"""Formats of packed matrices: how many bytes they take. Standard library only.

A packed matrix is a flat tensor of bytes. Each row of `inner` values is cut into blocks of 64: first the data
of all blocks, then the scales of all of them. What it stands for are bf16 values, the same on every path.

bf12  lossless: a byte of sign and mantissa for each value, 4 bits of its exponent's distance to the block's
      base; distance 15 marks an exception. After the rows follow the exceptions, 8 bytes each: row (4),
      column (2), value (2), in order.
int8  a signed byte for each value, a bf16 scale for each block
int4  4 bits for each value, a bf16 step and a bf16 least value for each half block: bits · step + least

Bits of 4 come in pairs: byte i of a block's 32 has value i below and value 32 + i above.

Matrices that other checkpoints have in fewer bits keep their scales in a tensor of their own, and stand for
float32 values, rounded to the compute dtype where they are used:

fp8    float8 e4m3; a scale for each block of rows and columns (DeepSeek-V3, arXiv 2412.19437, section 3.3)
mxfp4  float4 e2m1, value 2i in the lower half of byte i; a power of two for 32 of a row (OCP MX 1.0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeplan.runtime_min.plan_file import STORED_BYTES

BLOCK_VALUES = 64  # of a row, which have scales of their own
HALF = BLOCK_VALUES // 2
EXCEPTION_BYTES = 8
FAR = 15  # the distance that marks an exception
CUTS = (0.0, 0.03, 0.06, 0.1, 0.15)  # of a range, at both ends: the grids that int4 chooses from
SMALLEST_STEP = 1e-37  # of a grid that has more than its least value


@dataclass(frozen=True, slots=True)
class Packing:
    """Bytes of a block of 64 values: its data and its scales. `code` is the kernels' number for it."""

    name: str
    code: int
    data_bytes: int
    scale_bytes: int

    def row_bytes(self, inner: int) -> int:
        return inner // BLOCK_VALUES * (self.data_bytes + self.scale_bytes)

    def least_bytes(self, shape: tuple[int, ...]) -> int:
        """A matrix [outer, inner] without exceptions."""
        return shape[0] * self.row_bytes(shape[1])

    def most_bytes(self, shape: tuple[int, ...]) -> int:
        """What a plan has room for."""
        return int(STORED_BYTES[self.name] * shape[0] * shape[1])


PACKINGS = {
    packing.name: packing
    for packing in (
        Packing("bf12", 0, BLOCK_VALUES + HALF, 1),
        Packing("int8", 1, BLOCK_VALUES, 2),
        Packing("int4", 2, HALF, 8),
    )
}


@dataclass(frozen=True, slots=True)
class Scaled:
    """A format whose scales lie apart: the dtype that its values have in a checkpoint, and how many a byte
    has. `code` is the kernels' number for it."""

    name: str
    code: int
    stored_as: str
    per_byte: int

    def data_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.per_byte


SCALED = {scaled.name: scaled for scaled in (Scaled("fp8", 3, "F8_E4M3", 1), Scaled("mxfp4", 4, "U8", 2))}
EXPONENTS = "exponents"  # the scales of mxfp4: bytes s that stand for 2^(s - 127)
MX_VALUES = 32  # that share one of them


def fits(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape can be packed."""
    return len(shape) == 2 and shape[1] % BLOCK_VALUES == 0 and shape[1] <= 1 << 16
