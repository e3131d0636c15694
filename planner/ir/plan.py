"""The Plan level: everything the emitters need, every level included."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.planner.ir.attainment import Attainment
from moeplan.planner.ir.fleet import Fleet
from moeplan.planner.ir.placement import Placement
from moeplan.planner.ir.policy import CapacityBound, Policy, Rejection
from moeplan.planner.ir.profile import UnusedRow
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.schedule import Pipeline
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One kind of replica of the chosen fleet.

    It has a pipeline where the runtime is ours, and a bound where weights move.
    """

    name: str
    policy: Policy
    roofline: Roofline
    pipeline: Pipeline | None
    bound: CapacityBound | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A compiled spec. `facts_sha256` is of the model, machines and offers that it was chosen from.

    `unused_rows` are those of the user's profile that no prediction follows.
    """

    spec: Spec
    workload: Workload
    rejections: tuple[Rejection, ...]
    unused_rows: tuple[UnusedRow, ...]
    fleet: Fleet
    attainment: Attainment
    replicas: tuple[Replica, ...]
    placement: Placement
    facts_sha256: str
