"""The Fleet level: which replicas, how many, and which requests go where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.spec import Cloud
from moeplan.planner.ir.workload import ClassName

Market = Literal["owned", "spot", "on-demand"]
SolverStatus = Literal["optimal", "incumbent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One kind of replica that could be bought: a policy on a machine, at the best price of one market.

    `usd_per_hour` is for the whole machine, 0 for one that the user owns.
    """

    name: str
    policy: Policy
    market: Market
    cloud: Cloud | Literal[""]
    usd_per_hour: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The share of one bucket's requests that goes to one column."""

    serves: ClassName
    bucket: int
    column: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Some replicas of one column; `utilisation` is their predicted load over their capacity.

    For batch work `hours` is how long they run and `usd` what that costs; for online work hours is 0.
    """

    column: Column
    replicas: int
    utilisation: float
    hours: float
    usd: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A column that was not chosen: what it would cost alone, in the unit of its class's cost."""

    column: str
    serves: ClassName
    replicas: int
    cost_usd: float
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The cheapest replicas that serve every class.

    `usd_per_hour` is the bill while everything runs; `usd_per_million_tokens` is per generated token, per
    class. An "incumbent" is the best fleet found within the solver's time limit, not proven cheapest.
    """

    choices: tuple[Choice, ...]
    routes: tuple[Route, ...]
    alternatives: tuple[Alternative, ...]
    usd_per_hour: float
    usd_per_million_tokens: tuple[tuple[ClassName, Estimate], ...]
    target_utilisation: float
    solver_status: SolverStatus
