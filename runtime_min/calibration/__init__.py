"""Measure this machine as the runtime uses it; the figures become a machine for the planner."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeplan.runtime_min.cpu import keep_freed_memory
from moeplan.runtime_min.pages import Shard

if TYPE_CHECKING:
    from moeplan.runtime_min.calibration.kernels import Sizes

FILE_BYTES = 512 << 20
DRAM_BYTES = 512 << 20
# As the compiler's plans have them.
BLOCK_BYTES = 1 << 20
READERS = 4
SLOTS_BYTES = 32 << 20
CALLS_PER_ATTENTION = 30  # operators that an attention call launches, about

Figures = Mapping[str, Any]  # the machine file's keys, groups as mappings


def measure(folder: Path, sizes: Sizes | None = None) -> dict[str, Any]:
    """The figures of a machine file, in base units; the disk is the one that holds `folder`.

    Takes some tens of seconds. Processor figures are for one thread and for one per core.
    """
    import torch

    from moeplan.runtime_min.calibration import kernels
    from moeplan.runtime_min.calibration.accelerator import measure_accelerator

    sizes = sizes or kernels.Sizes()
    cores = physical_cores()
    torch.set_num_threads(cores)
    keep_freed_memory()
    dtypes = ("float32", "bf16")
    with _reading(folder, sizes) as read_file:
        rates = _rates(read_file)
        by_dtype = kernels.measure_kernels(sorted({1, cores}), dtypes, sizes)
        rates += _rates(read_file)
        kept, kept_rate = _beside(read_file, sizes)
    peaks = {name: max(found[cores].product_flops_per_s.values()) for name, found in by_dtype.items()}
    figures = {
        "cpu": {
            "cores": cores,
            "flops_per_s": peaks,
            "launch_s": by_dtype["float32"][1].attention_s / CALLS_PER_ATTENTION,
            "while_reading": _as_share(kept),
            "kernels": {
                name: {threads: dataclasses.asdict(k) for threads, k in found.items()}
                for name, found in by_dtype.items()
            },
        },
        "dram": {"bytes": memory_bytes(), "bytes_per_s": _dram(sizes)},
        "disk": _disk(folder, rates, kept_rate),
    }
    accelerator = measure_accelerator()
    if accelerator:
        return figures | {"gpu": accelerator, "notes": accelerator.pop("notes")}
    return figures


def machine_yaml(figures: Figures, source: str = "Measured by `moeplan calibrate`.") -> str:
    """The figures as a machine file: `load_machine` of the planner reads the same figures from it."""
    head = f"# {source}\nname: this-machine\nprovenance: calibrated\n"
    groups = {key: value for key, value in figures.items() if key != "notes"}
    notes = "".join(f"# {key}: {_flow(value)}\n" for key, value in figures.get("notes", {}).items())
    return head + "".join(f"{key}:{_block(value, 2)}\n" for key, value in groups.items()) + notes


def _block(value: Any, indent: int) -> str:
    """A value of YAML: tables of rates in one line, groups of them below one another."""
    if not isinstance(value, Mapping):
        return " " + _flow(value)
    if not any(isinstance(inner, Mapping) for inner in value.values()):
        return " " + _flow(value)
    return "".join(f"\n{' ' * indent}{key}:{_block(inner, indent + 2)}" for key, inner in value.items())


def _flow(value: Any) -> str:
    """A value in one line. Every float has a dot and a signed exponent, or YAML would read a text."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    return f"{value:.2e}" if isinstance(value, float) else str(value)


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


def _dram(sizes: Sizes) -> float:
    """Bytes per second of all threads reading what no cache holds."""
    import torch

    from moeplan.runtime_min.calibration.kernels import seconds

    values = torch.ones(min(DRAM_BYTES, sizes.far_bytes[-1]) // 4, dtype=torch.float32)
    return values.nbytes / seconds(values.sum, 8 * sizes.seconds)


def _disk(folder: Path, rates: Sequence[float], while_computing: float) -> dict[str, Any]:
    """Size and rate of the disk, how much that differs between readings, and what is left beside products."""
    rate = statistics.median(rates)
    return {
        "bytes": shutil.disk_usage(folder).total,
        "bytes_per_s": rate,
        "while_computing": _as_share(while_computing / rate),
        "sigma": statistics.stdev(map(math.log, rates)),
    }


def _as_share(kept: float) -> float:
    return min(1.0, max(0.1, kept))


ReadFile = Callable[[], float]  # reads a file once; bytes per second


def _rates(read_file: ReadFile) -> list[float]:
    return [read_file() for _ in range(3)]


@contextmanager
def _reading(folder: Path, sizes: Sizes) -> Iterator[ReadFile]:
    """A function that reads a new file on the disk of `folder`."""
    file_bytes = min(FILE_BYTES, sizes.far_bytes[-1])
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moeplan-calibrate-") as file:
        piece = os.urandom(min(file_bytes, 16 << 20))
        for _ in range(file_bytes // len(piece)):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        with _readers(Path(file.name), file_bytes) as read_file:
            yield read_file


@contextmanager
def _readers(path: Path, nbytes: int) -> Iterator[ReadFile]:
    """A function that reads the file, in the disk lane's pattern: blocks, some at a time, into slots."""
    shard = Shard(path)
    buffer = mmap.mmap(-1, SLOTS_BYTES)

    def read(offset: int) -> None:
        at = offset % SLOTS_BYTES
        shard.read(offset, memoryview(buffer)[at : at + BLOCK_BYTES])

    try:
        with ThreadPoolExecutor(READERS) as readers:
            yield lambda: nbytes / _timed(lambda: list(readers.map(read, range(0, nbytes, BLOCK_BYTES))))
    finally:
        shard.close()


def _beside(read_file: ReadFile, sizes: Sizes) -> tuple[float, float]:
    """The share of its speed that a product keeps while the file is read, and the rate of reading then."""
    import torch

    from moeplan.runtime_min.layers import linear

    x, weight = torch.randn(64, sizes.large.hidden), torch.randn(sizes.large.inner, sizes.large.hidden)
    alone = statistics.median(_timed(lambda: linear(x, weight)) for _ in range(50))
    reading = threading.Event()
    rates: list[float] = []

    def read() -> None:
        rates.extend(_rates(read_file))
        reading.set()

    thread = threading.Thread(target=read)
    count, start = 0, time.perf_counter()
    thread.start()
    while not reading.is_set():
        linear(x, weight)
        count += 1
    elapsed = time.perf_counter() - start
    thread.join()
    return count * alone / elapsed, statistics.median(rates)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
