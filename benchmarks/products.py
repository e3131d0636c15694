"""Products of bf16 by the runtime and by torch: rate, weights read per second, and their ratio.

usage: python benchmarks/products.py

Weights in turn out of 256 MiB, so that they come from memory as in a pass. Timed in alternation; medians
of nine. Whether the runtime uses its tiles at a number of tokens is in the last column.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from moeplan.runtime_min.cpu import cap_onednn

cap_onednn()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from moeplan.runtime_min import tiles  # noqa: E402
from moeplan.runtime_min.layers import pad_rows  # noqa: E402

SHAPES = [(2048, 1024), (1024, 2048), (5632, 2048), (2048, 5632)]
TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
MEMORY_BYTES = 256 << 20
CALLS, ROUNDS = 6, 9


def main() -> None:
    if not tiles.worth():
        print("no AMX tiles here: all products are torch's")
        return
    print(f"{torch.get_num_threads()} threads")
    print("  rows values tokens   tiles GFLOP/s  GB/s of weights   torch GFLOP/s  GB/s   ratio  used")
    for rows, values in SHAPES:
        weights = torch.randn(MEMORY_BYTES // (2 * rows * values), rows, values).bfloat16()
        for tokens in TOKENS:
            x = torch.randn(tokens, values).bfloat16()
            ours, theirs = seconds(weights, x, [tiles.product, padded])
            work, nbytes = 2 * tokens * rows * values / 1e9, 2 * rows * values / 1e9
            print(
                f"{rows:6}{values:7}{tokens:7}{work / ours:16.0f}{nbytes / ours:17.1f}{work / theirs:16.0f}"
                f"{nbytes / theirs:6.1f}{theirs / ours:8.2f}  {'yes' if tokens in tiles.worth() else 'no'}",
                flush=True,
            )


def padded(x: Tensor, weight: Tensor) -> Tensor:
    """Torch's product as the runtime calls it."""
    return F.linear(pad_rows(x), weight)


@torch.inference_mode()
def seconds(weights: Tensor, x: Tensor, products: list[Callable[[Tensor, Tensor], Tensor]]) -> list[float]:
    """Median seconds of a call of each, in alternation."""
    taken: list[list[float]] = [[] for _ in products]
    at = 0
    for _ in range(ROUNDS + 1):
        for times, product in zip(taken, products, strict=True):
            start = time.perf_counter()
            for _ in range(CALLS):
                product(x, weights[at % len(weights)])
                at += 1
            times.append((time.perf_counter() - start) / CALLS)
    return [statistics.median(times[1:]) for times in taken]


if __name__ == "__main__":
    main()
