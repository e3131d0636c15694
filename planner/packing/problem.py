"""What the solver sees of a market: pools of like machines, demands for their time, limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Like machines that share their requests; a fleet has none or some of each.

    `usd` is what one costs over the horizon however loaded it is, `share_usd` what serving the whole of each
    demand adds (empty: nothing). `loads` are the machines that the whole of each demand keeps busy; infinite
    where the pool cannot serve it. x machines may be loaded to `target`·x and to `ceiling`·x - `reserve`.
    `spare` more are bought where any are. `amounts` is what one takes of each limited resource. `steady`
    machines are not taken away; `region` is the place that they are lost with, "" for no single one.
    """

    name: str
    usd: float
    loads: tuple[float, ...]
    share_usd: tuple[float, ...] = ()
    target: float = 1.0
    ceiling: float = 1.0
    reserve: float = 0.0
    spare: int = 0
    most: int | None = None
    amounts: Mapping[str, float] = field(default_factory=dict)
    steady: bool = True
    region: str = ""

    def serves(self, demand: int) -> bool:
        """Whether any of the demand may go here: a load of infinity forbids it."""
        return math.isfinite(self.loads[demand])

    @property
    def holds_back(self) -> bool:
        """Whether the reserve binds for some number of machines: at one it is tightest."""
        return self.ceiling - self.reserve < self.target

    def capacity(self, machines: int) -> float:
        """The most load of `machines`."""
        if not machines:
            return 0.0
        return max(0.0, min(self.target * machines, self.ceiling * machines - self.reserve))

    def enough(self, load: float) -> int:
        """The fewest machines that may carry `load`."""
        least = max(load / self.target, (load + self.reserve) / self.ceiling)
        return max(1, math.ceil(least - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """`online` says of each demand whether it is served all along; others are done once.

    `limits` bound what all machines take of a resource, spares included. The share `floor` of each online
    demand goes to steady pools, and the share `survive` can still be served when any one region is lost.
    Exactly one machine serves the pools named in `single`. `before` counts the machines that are there now.
    """

    pools: tuple[Pool, ...]
    online: tuple[bool, ...]
    limits: Mapping[str, float] = field(default_factory=dict)
    floor: float = 0.0
    survive: float = 0.0
    single: frozenset[str] = frozenset()
    before: Mapping[str, int] | None = None
