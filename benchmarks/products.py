"""Products of bf16 by this CPU's compiled kernel against torch's, and the bytes of weights that each reads.

usage: python benchmarks/products.py [--packed bf12|int8|int4]

The kernel is that of the tile units (AMX), or, where the CPU knows no bf16 at all, that of float32 vectors.
With --packed its weights are packed so, torch's are not.
Every call takes another copy of the weight, so that none is in a core's L2 (a last-level cache of more than
COPIES_BYTES would still hold them). Both are timed in turns, and the median of either is shown. torch has the
tiles too where CPUID describes them; ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 shows it without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime_min import amx, cpu, layers, vectors
from moeplan.runtime_min.formats import MX_VALUES, PACKINGS, SCALED
from moeplan.runtime_min.packing import Matrix, packed, scaled

ROWS = (1, 8, 16, 32, 64, 128, 256, 1024)
SHAPES = ((2048, 1024), (1024, 2048), (5632, 2048), (2048, 5632), (4096, 14336))  # out, in
COPIES_BYTES = 64 << 20
SPENT_S = 0.3  # on each number of rows, by either


def time_s(call: Callable[[Tensor, Any], Tensor], x: Tensor, weight: Matrix) -> float:
    start = time.perf_counter()
    call(x, weight)
    return time.perf_counter() - start


def by_torch(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(layers.pad_rows(x), weight)[: x.shape[0]]


def by_vectors(x: Tensor, weight: Matrix) -> Tensor:
    return vectors._compiled(x, weight)


def by_tiles(x: Tensor, weight: Matrix) -> Tensor:
    return amx._compiled(x, weight, torch.bfloat16)


def compare(x: Tensor, weights: list[Tensor], ours: list[Matrix]) -> tuple[float, float]:
    """Median seconds of torch and of the kernel."""
    kernel = by_tiles if amx.usable() else by_vectors
    calls = ((by_torch, weights), (kernel, ours))
    for call, given in calls:
        call(x, given[0])
    times: tuple[list[float], list[float]] = ([], [])
    while sum(map(sum, times)) < 2 * SPENT_S or len(times[0]) < 5:
        for (call, given), spent in zip(calls, times, strict=True):
            spent.append(time_s(call, x, given[len(spent) % len(given)]))
    return statistics.median(times[0]), statistics.median(times[1])


def in_fewer_bits(weight: Tensor, name: str) -> Matrix:
    """The weight packed; in the formats of other checkpoints random values of its shape."""
    if name in PACKINGS:
        return packed(weight, PACKINGS[name])
    outer, inner = weight.shape
    data = torch.randint(0, 120, (SCALED[name].data_bytes((outer, inner)),), dtype=torch.uint8)
    if name == "mxfp4":
        exponents = torch.full((outer * inner // MX_VALUES,), 120, dtype=torch.uint8)
        return scaled(data, exponents, (outer, inner), SCALED[name], (1, MX_VALUES))
    scales = torch.full((-(-outer // 128) * -(-inner // 128),), 1e-3)
    return scaled(data, scales, (outer, inner), SCALED[name], (128, 128))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--packed", choices=[*PACKINGS, *SCALED])
    options = parser.parse_args()
    if not amx.usable() and not vectors.usable():
        print("torch does the products of this CPU", file=sys.stderr)
        return 1
    print(f"{torch.get_num_threads()} threads, {cpu.ISA}={os.environ.get(cpu.ISA, '')}")
    heads = ("torch GFLOP/s", "kernel", "torch GB/s", "kernel", "ratio")
    print(f"{'out x in':>12} {'M':>5} " + " ".join(f"{head:>13}" for head in heads))
    for outer, inner in SHAPES:
        nbytes = 2 * outer * inner
        weights = [torch.randn(outer, inner).bfloat16() for _ in range(max(2, -(-COPIES_BYTES // nbytes)))]
        name = options.packed
        given: list[Matrix] = [in_fewer_bits(weight, name) for weight in weights] if name else [*weights]
        for rows in ROWS:
            ours = compare(torch.randn(rows, inner).bfloat16(), weights, given)
            flops, gb = ([work / s / 1e9 for s in ours] for work in (nbytes * rows, nbytes))
            print(
                f"{outer:>5} x {inner:<5}{rows:>5} {flops[0]:>13.0f} {flops[1]:>13.0f} {gb[0]:>13.1f} "
                f"{gb[1]:>13.1f} {ours[0] / ours[1]:>13.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
