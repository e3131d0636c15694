"""Compiled kernels, run by the threads that torch uses, so that two pools never compete for the cores.

A kernel is a C function of one pointer, to a table of integers: addresses, sizes, and a counter from which
every thread draws its next part. So any number of threads will do, one included.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moeplan.runtime_min.compiled import compiled_apart

Kernel = Any  # a Numba CFunc of a pointer to int64


def has_numba() -> bool:
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def module(name: str, *parts: str) -> Any | None:
    """runtime_min's module `name` of kernels, compiled from it and its `parts`; None without Numba."""
    if not has_numba():
        return None
    with compiled_apart(f"kernels-{digest(name, *parts)}"):
        return importlib.import_module(f"moeplan.runtime_min.{name}")


def digest(*names: str) -> str:
    """Of the sources of runtime_min's modules `names`."""
    sources = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def run(kernel: Kernel, table: list[int]) -> None:
    """Execute `kernel` over `table` on torch's threads; returns when all have finished."""
    values = array("q", table)
    _parallel()(kernel.address, values.buffer_info()[0], torch.get_num_threads())


@functools.cache
def _parallel() -> Callable[[int, int, int], None]:
    """GOMP_parallel of the libgomp that torch has loaded; plain threads where there is none."""
    for path in sorted(Path(torch.__file__).parent.rglob("libgomp*.so*")):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return lambda kernel, table, threads: function(kernel, table, threads, 0)
    return _plain_threads


def _plain_threads(kernel: int, table: int, threads: int) -> None:
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel)
    others = [threading.Thread(target=function, args=(table,)) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    function(table)
    for thread in others:
        thread.join()
