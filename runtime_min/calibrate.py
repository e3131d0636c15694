"""Measure this machine as the runtime uses it; the figures become a machine for the planner."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moeplan.runtime_min.pages import Shard

FILE_BYTES = 256 << 20
DRAM_BYTES = 512 << 20
BLOCK_BYTES = 1 << 20
READERS = 4


def measure(folder: Path) -> dict[str, Any]:
    """Figures of this machine in base units, in some seconds; the disk is the one that holds `folder`."""
    import torch

    cores = physical_cores()
    torch.set_num_threads(cores)
    disk_bytes_per_s = _disk(folder)
    return {
        "cores": cores,
        "flops_per_s": {"float32": _gemm(torch.float32), "bf16": _gemm(torch.bfloat16)},
        "launch_s": _launch(),
        "dram_bytes": memory_bytes(),
        "dram_bytes_per_s": _dram(),
        "disk_bytes": shutil.disk_usage(folder).total,
        "disk_bytes_per_s": disk_bytes_per_s,
    }


def machine_yaml(figures: dict[str, Any]) -> str:
    """The figures as a machine file; every float has a dot and a signed exponent, or YAML reads a text."""
    flops = figures["flops_per_s"]
    return (
        "# Measured by `moeplan calibrate`.\n"
        "name: this-machine\n"
        "provenance: calibrated\n"
        f"cpu: {{cores: {figures['cores']}, flops_per_s: {{float32: {flops['float32']:.1e}, "
        f"bf16: {flops['bf16']:.1e}}}, launch_s: {figures['launch_s']:.1e}}}\n"
        f"dram: {{bytes: {figures['dram_bytes']}, bytes_per_s: {figures['dram_bytes_per_s']:.1e}}}\n"
        f"disk: {{bytes: {figures['disk_bytes']}, bytes_per_s: {figures['disk_bytes_per_s']:.1e}}}\n"
    )


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads counted once."""
    allowed = os.sched_getaffinity(0)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text(encoding="ascii") if siblings.exists() else str(cpu))
    return max(1, len(cores))


def memory_bytes() -> int:
    """Memory of the machine, or of the control group that limits this process."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _rate(work: Callable[[], object], amount: float, seconds: float) -> float:
    """Median of `amount` per second over repetitions that fill `seconds`, after one to warm up."""
    work()
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        rates.append(amount / (time.perf_counter() - start))
    return statistics.median(rates)


def _gemm(dtype: Any) -> float:
    """FLOP/s of a product with as many rows as a busy expert has."""
    import torch

    rows, inner, columns = 256, 1024, 4096
    x, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return _rate(lambda: torch.nn.functional.linear(x, weight), 2 * rows * inner * columns, 0.8)


def _launch() -> float:
    """Mean seconds of the torch calls that a layer makes, on so little data that overhead is all they do."""
    import torch
    import torch.nn.functional as F

    x, weight, total = torch.randn(1, 32), torch.randn(32, 32), torch.zeros(1, 32)
    row = torch.zeros(1, dtype=torch.int64)

    def calls() -> None:
        for _ in range(200):
            normed = F.rms_norm(x, (32,))
            scores = F.softmax(F.linear(normed, weight), dim=-1)
            scores.topk(2)[1].flatten().argsort(stable=True)
            total.index_add_(0, row, F.silu(normed[row]))

    with torch.inference_mode():
        return 1 / _rate(calls, 200 * 9, 0.3)


def _dram() -> float:
    """Bytes per second of all threads reading what no cache holds."""
    import torch

    values = torch.ones(DRAM_BYTES // 4, dtype=torch.float32)
    return _rate(values.sum, values.nbytes, 0.8)


def _disk(folder: Path) -> float:
    """Bytes per second of direct reads in blocks, several at a time, as the disk lane reads."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moeplan-calibrate-") as file:
        piece = os.urandom(16 << 20)
        for _ in range(FILE_BYTES // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        shard = Shard(Path(file.name))
        buffer = mmap.mmap(-1, FILE_BYTES)

        def read(offset: int) -> None:
            shard.read(offset, memoryview(buffer)[offset : offset + BLOCK_BYTES])

        with ThreadPoolExecutor(READERS) as readers:
            rate = _rate(lambda: list(readers.map(read, range(0, FILE_BYTES, BLOCK_BYTES))), FILE_BYTES, 1.5)
        shard.close()
    return rate
