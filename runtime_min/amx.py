"""Products of bf16 on the tile units (AMX) of an x86-64 CPU; torch's wherever they cannot be used.

Where oneDNN finds no description of the tiles (CPUID leaf 0x1D, which some hypervisors leave empty) it does
without them. Here they are asked for and tried: see `usable`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_min import cpu, packing, team
from moeplan.runtime_min.compiled import user_cache
from moeplan.runtime_min.cpu import cpu_flags
from moeplan.runtime_min.formats import PACKINGS
from moeplan.runtime_min.packing import Matrix, Packed

FLAGS = {"amx_tile", "amx_bf16", "avx512f", "avx512bw"}
# Where oneDNN has the tiles too it is faster with more rows than these, by benchmarks/products.py.
MOST_ROWS = 128
_CHUNK_BYTES = 1 << 20  # of the weight: what a thread works on stays in its L2
_CHUNK_ROWS = 128  # at most
_PROBE_S = 120.0  # most that compiling and trying may take
_PROBE = "from moeplan.runtime_min import amx; import sys; sys.exit(not amx.right())"
_SOURCES = ("amx_kernel", "amx", "kernel_parts", "packed_kernel")
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # Linux: arch/x86/include/uapi/asm/prctl.h
# Palette 1: eight tiles of 16 rows of 64 bytes. Source: Intel SDM, LDTILECFG.
_CONFIG = ctypes.create_string_buffer(
    bytes([1]) + bytes(15) + bytes([64, 0]) * 8 + bytes(16) + bytes([16]) * 8 + bytes(8), 64
)


def linear(x: Tensor, weight: Matrix) -> Tensor | None:
    """x [T, in] times weight [out, in] as bf16 [T, out], or None where torch is to do it."""
    if x.dtype != torch.bfloat16 or not usable() or x.shape[0] > _most_rows() or not _fits(x, weight):
        return None
    return product(x, weight)


@functools.cache
def usable() -> bool:
    """Whether the tiles are there, permitted, and multiply rightly.

    Tried in a process of its own, which an illegal instruction may kill; the answer is kept in the user's
    cache by what the CPU has and the kernel's sources.
    """
    flags = cpu_flags()
    if not flags >= FLAGS or not team.has_numba() or not _permitted():
        return False
    if not _works(_kept(flags)):
        return False
    _kernel()  # loaded now, not in the first pass
    return True


def _works(kept: Path) -> bool:
    """What was found before and is `kept`, or is found now."""
    try:
        return json.loads(kept.read_text()) is True
    except (OSError, ValueError):
        works = _probe()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = kept.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(works))
        fresh.replace(kept)
    except OSError:
        pass  # tried again the next time
    return works


def right() -> bool:
    """Whether a small product is what float32 makes of it; raises nothing, but may kill the process."""
    if not _permitted():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (35, 64))
    plain = product(x, weight, torch.float32)
    difference = plain - x.float() @ weight.float().T
    lossless = packing.packed(weight, PACKINGS["bf12"])
    return difference.abs().max().item() < 1e-3 and torch.equal(product(x, lossless, torch.float32), plain)


@functools.cache
def _most_rows() -> int:
    """No limit where oneDNN is kept from the tiles: see cpu.cap_onednn."""
    allowed = os.environ.get(cpu.ISA, "DEFAULT").upper()
    return MOST_ROWS if allowed in ("DEFAULT", "ALL") or "AMX" in allowed else sys.maxsize


@functools.cache
def _permitted() -> bool:
    """Ask Linux for the tiles' state, once per process."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    return bool(call(_ARCH_PRCTL, ctypes.c_long(_REQUEST_PERMISSION), ctypes.c_long(_TILE_DATA)) == 0)


def _kept(flags: frozenset[str]) -> Path:
    digest = hashlib.sha256(" ".join([*sorted(flags), team.digest(*_SOURCES)]).encode())
    return user_cache() / f"amx-{digest.hexdigest()[:16]}.json"


def _probe() -> bool:
    try:
        child = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, timeout=_PROBE_S)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return child.returncode == 0


@functools.cache
def _kernel() -> Any:
    return team.module(*_SOURCES)


def _fits(x: Tensor, weight: Matrix) -> bool:
    return packing.lies_ready(x, weight) and x.shape[1] % 32 == 0 and weight.shape[0] % 32 == 0


def product(x: Tensor, weight: Matrix, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """x bf16 [T, in] times weight [out, in], summed in float32: [T, out] of `dtype`, bf16 or float32.

    Only where the tiles are `usable`, and for multiples of 32 in `out` and `in`: `linear` looks at both. The
    weight is read in place; its rows must be contiguous. A token's result does not depend on the others.
    """
    kernel = _kernel()
    x = x.contiguous()
    (count, inner), outer = x.shape, weight.shape[0]
    blocks = -(-count // 16)
    packed = torch.empty(blocks * 16 * inner, dtype=torch.bfloat16)
    out = torch.empty(count, outer, dtype=dtype)
    chunk = _chunk_rows(inner, outer)
    parts = -(-outer // chunk)
    scratch = torch.empty(parts * 1024, dtype=torch.float32)
    data = weight.data if isinstance(weight, Packed) else weight
    table = [
        *(0, blocks, x.data_ptr(), packed.data_ptr(), data.data_ptr(), out.data_ptr()),
        *(count, inner, outer, chunk, dtype == torch.float32, scratch.data_ptr(), ctypes.addressof(_CONFIG)),
        *(0, 0, 0, 0),
    ]
    team.run(kernel.pack, table)
    table[kernel.PARTS] = parts
    if not isinstance(weight, Packed):
        team.run(kernel.product, table)
        return out
    room = torch.empty(torch.get_num_threads() * kernel.ROWS * inner, dtype=torch.bfloat16)
    table[kernel.CODE :] = [weight.packing.code, weight.beside(), 0, room.data_ptr()]
    team.run(kernel.packed_product, table)
    return out


def _chunk_rows(inner: int, outer: int) -> int:
    """Rows of the weight that a thread takes at once, a multiple of 32: few enough to share out evenly."""
    cached = _CHUNK_BYTES // (2 * inner)
    shared = outer // (4 * torch.get_num_threads())
    return max(32, min(cached, shared, _CHUNK_ROWS) // 32 * 32)
