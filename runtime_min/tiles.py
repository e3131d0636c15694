"""Products of bf16 on AMX tiles, of weights as they lie in memory.

For processors whose tiles torch's library leaves unused, and for few tokens, where it packs the weights anew.

T tokens, I values of each, O values of the result
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeplan.runtime_min import team
from moeplan.runtime_min.cpu import ISA, amx_is_hollow, processor_flags

FROM_TOKENS = 4  # below, a product waits for its weights, and torch's is as fast
BELOW_TOKENS = 65  # beyond, torch is faster where its library uses the tiles too
_CONFIG = bytes([1, *[0] * 15, *[64, 0] * 8, *[0] * 16, *[16] * 8, *[0] * 8])  # eight tiles of 16 x 64 bytes
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_ROWS, _STEP = 32, 32

# In a process of its own: tiles that are announced but do not work would end it.
_TRIAL = """
import torch
from moeplan.runtime_min import tiles
x, w = torch.randn(40, 64).bfloat16(), torch.randn(48, 64).bfloat16()
assert tiles.allowed()
torch.testing.assert_close(tiles.product(x, w), x.float() @ w.float().T, rtol=1e-4, atol=1e-4)
"""


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether x [T, I] times each of `weights` [O, I] can be computed here, and faster than by torch."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[0] in worth()
        and all(w.shape[0] >= _ROWS and w.shape[0] % 16 == 0 for w in weights)
        and all(w.shape[1] % _STEP == 0 and w.is_contiguous() for w in weights)
    )


@functools.cache
def worth() -> range:
    """The numbers of tokens for which tiles are used: none where there are none that work."""
    flags = {"amx_tile", "amx_bf16"} <= processor_flags()
    if not flags or not allowed() or _kernel() is None:
        return range(0)
    if amx_is_hollow() and not _tried():
        return range(0)
    capped = os.environ.get(ISA, "DEFAULT").upper()
    torch_has_them = not amx_is_hollow() and (capped in ("DEFAULT", "ALL") or "AMX" in capped)
    return range(FROM_TOKENS, BELOW_TOKENS if torch_has_them else sys.maxsize)


def _tried() -> bool:
    """Whether tiles that the processor does not describe work all the same; found out once for a system."""
    system = f"{platform.release()} {sorted(processor_flags())} {torch.__version__}"
    digest = hashlib.sha256(system.encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    answer = Path(home, "moeplan", f"tiles-{digest}")
    if not answer.exists():
        trial = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, timeout=120)
        with contextlib.suppress(OSError):
            answer.parent.mkdir(parents=True, exist_ok=True)
            answer.write_text("" if trial.returncode else "work")
        return trial.returncode == 0
    return answer.read_text() == "work"


def allowed() -> bool:
    """Ask the system for the use of tiles, which the threads of a process share."""
    answer: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return answer == 0


def packed(x: Tensor) -> Tensor:
    """x [T, I] as the units want it: [T / 16, I / 2, 16, 2], the last tokens padded with zeros."""
    extra = -x.shape[0] % 16
    x = torch.nn.functional.pad(x, (0, 0, 0, extra)) if extra else x.contiguous()
    return x.view(torch.int32).view(-1, 16, x.shape[1] // 2).transpose(1, 2).contiguous()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I] times weight [O, I]: [T, O] float32, of sums in float32."""
    return multiply(packed(x), x.shape[0], weight)


def multiply(activations: Tensor, tokens: int, weight: Tensor) -> Tensor:
    """The same of activations that are `packed`."""
    rows, values = weight.shape
    out = torch.empty(tokens, rows)
    threads = torch.get_num_threads()
    scratch = torch.empty(threads, 4, 256)
    table = [
        *(0, 0, -(-rows // _ROWS), weight.data_ptr(), activations.data_ptr(), out.data_ptr()),
        *(scratch.data_ptr(), _config().data_ptr(), rows, values, len(activations), tokens),
    ]
    team.run(_kernel().product, table)
    return out


@functools.cache
def _config() -> Tensor:
    return torch.tensor(list(_CONFIG), dtype=torch.uint8)


@functools.cache
def _kernel() -> Any:
    """The module of the compiled kernel, or None without Numba."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return None
    here = Path(__file__)
    sources = [str(here.with_name(name)) for name in ("attention_kernel.py", "tile_kernel.py")]
    with team.kept(*sources):
        from moeplan.runtime_min import tile_kernel
    return tile_kernel
