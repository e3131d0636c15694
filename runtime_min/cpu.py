"""One trap of some virtual machines, found before torch is imported. Standard library only.

A hypervisor may show the AMX flags and yet leave CPUID leaf 0x1D, which describes the tiles, empty. oneDNN
trusts the flags, configures tiles of size zero and dies with SIGILL at the first bf16 or fp16 product.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
from collections.abc import Callable
from pathlib import Path

ISA = "ONEDNN_MAX_CPU_ISA"
AMX_TILE = 1 << 24  # CPUID leaf 7, EDX

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

Cpuid = Callable[[int, int], tuple[int, int, int, int]]

# void cpuid(uint32 leaf, uint32 subleaf, uint32 out[4]), System V calling convention
_CPUID = bytes.fromhex(
    "53"  # push rbx
    "4989d0"  # mov r8, rdx
    "89f8 89f1"  # mov eax, edi; mov ecx, esi
    "0fa2"  # cpuid
    "418900 41895804 41894808 4189500c"  # mov [r8], eax; [r8+4], ebx; [r8+8], ecx; [r8+12], edx
    "5b c3"  # pop rbx; ret
)


def cap_onednn() -> None:
    """Keep oneDNN from AMX on a machine that only pretends to have it, unless the user chose an ISA."""
    if ISA not in os.environ and amx_is_hollow():
        # Not AVX512_CORE_BF16: that is slower in fp16.
        os.environ[ISA] = "AVX512_CORE_FP16"


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next allocation; elsewhere do nothing.

    Activations of a few megabytes are freed and allocated all the time. By default the largest go back to the
    system, and each new one costs a page fault per 4 KiB: a third of the attention of a prefill was that.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def amx_is_hollow() -> bool:
    """Whether AMX is advertised without a usable tile palette."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return False
    try:
        return is_hollow(_native_cpuid())
    except OSError:  # executable memory is forbidden: distrust AMX under any hypervisor
        return {"amx_tile", "hypervisor"} <= cpu_flags()


def is_hollow(cpuid: Cpuid) -> bool:
    """The rule itself: AMX in leaf 7, but no palette, or one of zero rows, names or bytes, in leaf 0x1D."""
    if cpuid(0, 0)[0] < 7 or not cpuid(7, 0)[3] & AMX_TILE:
        return False
    if cpuid(0, 0)[0] < 0x1D or cpuid(0x1D, 0)[0] < 1:
        return True
    sizes, row_bytes_and_names, rows, _ = cpuid(0x1D, 1)
    halves = (
        sizes & 0xFFFF,
        sizes >> 16,
        row_bytes_and_names & 0xFFFF,
        row_bytes_and_names >> 16,
        rows & 0xFFFF,
    )
    return not all(halves)


def _native_cpuid() -> Cpuid:
    """CPUID executed on this processor; raises OSError where memory cannot be made executable."""
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_CPUID)
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    function = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(address)

    def cpuid(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        out = (ctypes.c_uint32 * 4)()
        function(leaf, subleaf, ctypes.addressof(out))
        assert code  # the mapping has to outlive the call
        return out[0], out[1], out[2], out[3]

    return cpuid


def cpu_flags() -> frozenset[str]:
    """What Linux lists of an x86-64 processor; elsewhere empty."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    return frozenset(next((line for line in text.splitlines() if line.startswith("flags")), "").split())
