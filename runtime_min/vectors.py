"""Products of bf16 on CPUs that know no bf16: in float32 vectors, from the weight as it lies.

torch computes such products a value at a time there, five to ten times slower than those of float32.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_min import team
from moeplan.runtime_min.cpu import cpu_flags
from moeplan.runtime_min.packing import Matrix, Packed, lies_ready

_LEAST_WORK = 1 << 16  # values of a plain weight times tokens: below it a call of torch takes less time
_LEAST_OUTER = 6  # rows of the weight that the kernel takes at once
_KNOWS_BF16 = {"avx512_bf16", "amx_bf16", "avx512f"}  # oneDNN helps itself with any AVX-512


def linear(x: Tensor, weight: Matrix) -> Tensor | None:
    """x bf16 [T, in] times weight bf16 [out, in], summed in float32: bf16 [T, out].

    None where torch is to do it. A token's result does not depend on the others.
    """
    if x.dtype != torch.bfloat16 or not usable() or not _fits(x, weight):
        return None
    return _compiled(x, weight)


@functools.cache
def usable() -> bool:
    """Whether this CPU is better served so, and Numba is there."""
    if platform.machine() not in ("x86_64", "AMD64") or not {"avx2", "fma"} <= cpu_flags():
        return False
    return not cpu_flags() & _KNOWS_BF16 and _kernel() is not None


@functools.cache
def _kernel() -> Any | None:
    return team.module("vector_kernel", "dot_kernel", "kernel_parts", "packed_kernel")


def _fits(x: Tensor, weight: Matrix) -> bool:
    return (
        lies_ready(x, weight)
        and x.shape[1] % 16 == 0
        and weight.shape[0] >= _LEAST_OUTER
        and (isinstance(weight, Packed) or x.shape[0] * weight.numel() >= _LEAST_WORK)
    )


def _compiled(x: Tensor, weight: Matrix) -> Tensor:
    kernel = _kernel()
    assert kernel is not None
    x = x.contiguous()
    (count, inner), outer, threads = x.shape, weight.shape[0], torch.get_num_threads()
    last, rows = kernel.last_tokens(count), kernel.ROWS
    blocks = -(-(count - last) // 16)
    packed = torch.empty(blocks * 16 * inner)
    out = torch.empty(count, outer, dtype=torch.bfloat16)
    chunk = max(rows, min(outer // (4 * threads), 96) // rows * rows)
    room_bytes = kernel.room_bytes(last, inner)
    room = torch.empty(threads * room_bytes, dtype=torch.uint8)
    table = [0, blocks, x.data_ptr(), packed.data_ptr(), 0, out.data_ptr(), count, last, inner, outer, chunk]
    if isinstance(weight, Packed):
        table += [weight.packing.code, weight.beside()]
        table[kernel.WEIGHT] = weight.data.data_ptr()
    else:
        table += [-1, 0]
        table[kernel.WEIGHT] = weight.data_ptr()
    table += [0, room.data_ptr(), room_bytes]
    if blocks:
        team.run(kernel.pack, table)
    table[kernel.PARTS] = -(-outer // chunk)
    team.run(kernel.product, table)
    return out
