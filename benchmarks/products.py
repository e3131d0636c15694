"""Products of bf16 on the tile units against torch's, and the bytes of weights that each reads.

usage: python benchmarks/products.py

Every call takes another copy of the weight, so that none is in a core's L2 (a last-level cache of more than
COPIES_BYTES would still hold them). Both are timed in turns, and the median of either is shown. torch has the
tiles too where CPUID describes them; ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 shows it without.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min import amx, cpu, layers

ROWS = (1, 8, 16, 32, 64, 128, 256, 1024)
SHAPES = ((2048, 1024), (1024, 2048), (5632, 2048), (2048, 5632), (4096, 14336))  # out, in
COPIES_BYTES = 64 << 20
SPENT_S = 0.3  # on each number of rows, by either


def time_s(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    call(x, weight)
    return time.perf_counter() - start


def by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(layers.pad_rows(x), weight)[: x.shape[0]]


def compare(x: Tensor, weights: list[Tensor]) -> tuple[float, float]:
    """Median seconds of torch and of the tiles."""
    calls = (by_torch, amx.product)
    for call in calls:
        call(x, weights[0])
    times: tuple[list[float], list[float]] = ([], [])
    while sum(map(sum, times)) < 2 * SPENT_S or len(times[0]) < 5:
        weight = weights[len(times[0]) % len(weights)]
        for call, spent in zip(calls, times, strict=True):
            spent.append(time_s(call, x, weight))
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> int:
    if not amx.usable():
        print("the tile units cannot be used here", file=sys.stderr)
        return 1
    print(f"{torch.get_num_threads()} threads, {cpu.ISA}={os.environ.get(cpu.ISA, '')}")
    print(
        f"{'out x in':>12} {'M':>5} {'torch GFLOP/s':>14} {'tiles':>7} {'torch GB/s':>11} {'tiles':>6}  ratio"
    )
    for outer, inner in SHAPES:
        nbytes = 2 * outer * inner
        weights = [torch.randn(outer, inner).bfloat16() for _ in range(max(2, -(-COPIES_BYTES // nbytes)))]
        for rows in ROWS:
            ours = compare(torch.randn(rows, inner).bfloat16(), weights)
            flops, gb = ([work / s / 1e9 for s in ours] for work in (nbytes * rows, nbytes))
            print(
                f"{outer:>5} x {inner:<5}{rows:>5} {flops[0]:>14.0f} {flops[1]:>7.0f} {gb[0]:>11.1f} "
                f"{gb[1]:>6.1f} {ours[0] / ours[1]:>6.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
