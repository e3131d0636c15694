"""The Placement level: which regions, spot or on-demand, and what is promised on what evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moeplan.planner.ir.fleet import Market
from moeplan.planner.ir.spec import Cloud
from moeplan.planner.ir.workload import ClassName

Evidence = Literal["trace", "statistics", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Zone:
    """A place that may hold replicas, and its hourly price of one machine there.

    No `zone`: the whole region.
    """

    cloud: Cloud
    region: str
    usd_per_hour: float
    on_demand_usd_per_hour: float
    zone: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the replicas of one column run.

    `spot_overprovision` more spot replicas than needed are kept; `on_demand_fallback` lets on-demand
    replicas stand in while spot is short; `on_demand_base` of them always run. `cold_start_s` is from a
    launch request to the first answer. No zones: the user's own machine.
    """

    column: str
    serves: ClassName
    market: Market
    replicas: int
    zones: tuple[Zone, ...]
    spot_overprovision: int
    on_demand_base: int
    on_demand_fallback: bool
    cold_start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All sites. `evidence` is what the availability statement rests on; without any, nothing is promised."""

    sites: tuple[Site, ...]
    evidence: Evidence
    availability_wanted: float
    statement: str
