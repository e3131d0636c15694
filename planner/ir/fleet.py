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
CostUnit = Literal["USD per hour", "USD"]
UNSIMULATED = " by throughput, queues not simulated"  # how the cost of a fleet not chosen is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One kind of replica that could be bought: a policy on a machine, at the best price of one market.

    `usd_per_hour` is for the whole machine, 0 for one that the user owns. A column of one `region` stays
    there; others ("") are priced at the cheapest region and may be spread.
    """

    name: str
    policy: Policy
    market: Market
    cloud: Cloud | Literal[""]
    usd_per_hour: float
    region: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The share of one bucket's requests that goes to one column."""

    serves: ClassName
    bucket: int
    column: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Some replicas of one column, `spare` of them beyond what the load needs. `utilisation` is the predicted
    load over the capacity of the others, `target` the most that was planned with.

    For batch work `hours` is how long they run and `usd` what that costs; for online work hours is 0.
    """

    column: Column
    replicas: int
    spare: int
    utilisation: float
    target: float
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
class Mix:
    """Some other fleet, spares included, and its cost in the fleet's unit."""

    parts: tuple[tuple[str, int], ...]
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstraintCost:
    """What the fleet would cost less by without one constraint of the spec."""

    constraint: str
    saving: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """How wrong the throughputs of one GPU type must be for another fleet to be the answer.

    `factor` is the true throughput over the predicted one: below 1 the fleet would be too full or too dear,
    above 1 a cheaper one would do. `likely`: it lies within the prediction's 90 % interval.
    """

    gpu: str
    factor: float
    likely: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """A size whose throughput on one column is worth measuring: its standard error in machines is
    `uncertain_machines`."""

    serves: ClassName
    bucket: int
    column: str
    uncertain_machines: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """Why this fleet: other fleets, what constraints cost, what would change the answer.

    `single` is the cheapest fleet of one column for each class, None where no one column can do a class.
    """

    single: Mix | None
    runner_up: Mix | None
    constraints: tuple[ConstraintCost, ...]
    flips: tuple[Flip, ...]
    doubts: tuple[Doubt, ...]


UNEXPLAINED = Sensitivity(single=None, runner_up=None, constraints=(), flips=(), doubts=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The cheapest replicas that serve every class.

    `usd_per_hour` is the bill while everything runs; `usd_per_million_tokens` is per generated token, per
    class. `cost` is what was minimised, in `cost_unit`: USD per hour, a batch's bill spread over its deadline
    (a day without one), or where there is batch work only the bill. No fleet costs less than `cost_bound`, up
    to a hundredth of a cent that ties are broken with; `gap` is what of `cost` lies above it. An "incumbent"
    is the best fleet found within the solver's limit in nodes, not proven cheapest. `spot_assumption` says
    how interruptions are priced into batch work on spot machines; empty where there is none.
    """

    choices: tuple[Choice, ...]
    routes: tuple[Route, ...]
    alternatives: tuple[Alternative, ...]
    usd_per_hour: float
    usd_per_million_tokens: tuple[tuple[ClassName, Estimate], ...]
    target_utilisation: float
    solver_status: SolverStatus
    cost: float
    cost_unit: CostUnit
    cost_bound: float
    gap: float
    spot_assumption: str
    sensitivity: Sensitivity
