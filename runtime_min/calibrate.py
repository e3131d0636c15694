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
# Operator calls that the planner counts in a decode layer of eight experts: attention, routing, experts.
CALLS_PER_LAYER = 30 + 12 + 8 * 8


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
    """Mean seconds of one operator call: a decode layer of the runtime's own on so little data that calling
    is nearly all it does, divided by the calls that the planner counts for it.

    On one thread: with more, and another process on their cores, each call can wait milliseconds for them.
    """
    import torch

    from moeplan.runtime_min.attention import KvCache, attend, decode_batch
    from moeplan.runtime_min.layers import Rope, choose_experts, expert, linear, rms_norm, sort_by_expert

    sequences, hidden, experts, dim, context = 16, 128, 8, 16, 64
    norm, square, gate = torch.ones(hidden), torch.randn(hidden, hidden) / 8, torch.randn(experts, hidden)
    narrow, residual = torch.randn(2 * dim, hidden) / 8, torch.randn(sequences, hidden)
    cache, rope = (
        KvCache(1, sequences, 2, context, dim, torch.float32),
        Rope(dim, 1e4, context, torch.float32),
    )
    batch = decode_batch(0, range(sequences), [context] * sequences)

    def layer() -> None:
        x = rms_norm(residual, norm, 1e-5)
        q, k, v = (linear(x, w).view(sequences, -1, dim) for w in (square, narrow, narrow))
        q, k = rope(q, batch.positions), rope(k, batch.positions)
        y = residual + linear(attend(0, batch, cache, q, k, v), square)
        normed = rms_norm(y, norm, 1e-5)
        routing = sort_by_expert(*choose_experts(normed, gate, 2), experts)
        for e in range(experts):
            rows = slice(routing.starts[e], routing.starts[e + 1])
            tokens = routing.tokens[rows]
            out = expert(normed.index_select(0, tokens), square, square, square).float()
            y.index_add_(0, tokens, out.mul_(routing.weights[rows, None]))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        seconds = 1 / _rate(layer, CALLS_PER_LAYER, 0.5)
    torch.set_num_threads(threads)
    return seconds


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
