"""How fast schedules are simulated: a decode pass of 94 layers and 32 micro-batches, as CGOPipe issues it.

usage: python benchmarks/simulator.py [PASSES]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

LAYERS, MICRO_BATCHES, AHEAD, SLOTS = 94, 32, 2, 34
GPU, H2D, D2H, CPU, COPIER, DISK = LANES = range(6)
PRE, OFFLOAD, ATTEND, LOAD, STAGE, READ, COPY, POST = range(8)
EIGHTH = 4  # one page in eight comes from disk

Row = list[int]


def schedule(passes: int) -> NDArray[np.int64]:
    """The rows of `passes` decode passes: op, lane, layer, item, slot and the count to wait for by lane."""
    issued = [0] * len(LANES)
    rows = [row for _ in range(passes) for row in decode_pass(issued)]
    return np.array(rows, np.int64)


def decode_pass(issued: list[int]) -> Iterator[Row]:
    pass
