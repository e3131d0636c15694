"""What each task of a pass takes alone, in the form that the simulator reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_OP, _ITEM = 0, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCost:
    """One task alone: its seconds, for each item where items differ, and the share of DRAM bandwidth that it
    uses meanwhile."""

    seconds: float = 0.0
    dram_share: float = 0.0
    seconds_of_item: tuple[float, ...] = ()


TaskCosts = Mapping[str, TaskCost]


def sharing(seconds: float, dram_s: float) -> TaskCost:
    """A task of `seconds` whose bytes take `dram_s` at the full bandwidth of DRAM."""
    longest = max(seconds, dram_s)
    return TaskCost(seconds=longest, dram_share=dram_s / longest if longest else 0.0)


def of_rows(rows: NDArray[np.int64], ops: Sequence[str], costs: TaskCosts) -> tuple[Floats, Floats]:
    """Seconds [n] and demands [n, 1] of a schedule's rows. Raises KeyError where an operation has no cost."""
    seconds, shares = np.zeros(len(rows)), np.zeros((len(rows), 1))
    for op in np.unique(rows[:, _OP]):
        at, cost = rows[:, _OP] == op, costs[ops[op]]
        each = np.asarray(cost.seconds_of_item or (cost.seconds,))
        seconds[at] = each[rows[at, _ITEM]] if cost.seconds_of_item else each[0]
        shares[at] = cost.dram_share
    return seconds, shares
