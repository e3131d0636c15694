"""The Placement level: which zones, spot or on-demand, and what is promised on what evidence."""

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

    `zone` is empty where only the region is known. `spot_target` and `on_demand_target` are how many machines
    a deployment without SkyServe's policy keeps here (autoscaling groups, managed instance groups).
    """

    cloud: Cloud
    region: str
    usd_per_hour: float
    on_demand_usd_per_hour: float
    zone: str = ""
    spot_target: int = 0
    on_demand_target: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """90 % of outcomes are expected within `low` to `high`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a site's spot replicas are expected to do, on evidence of `span_s` in steps of `step_s`.

    `availability` is the share of a week with enough ready replicas. `promised` is what the plan stands for,
    0 where the evidence cannot carry a promise. `shortfall` is the mean share of replicas missing. Bills are
    of the site, per hour: expected (of which on-demand stand-ins), with on-demand machines only, and the
    least of any policy that knows the future (0: not computed). `independent_availability` is what
    independence of zones would have promised.
    """

    basis: str
    start: str
    span_s: float
    step_s: float
    availability: Interval
    promised: float
    shortfall: float
    usd_per_hour: float
    stand_ins_usd_per_hour: float
    all_on_demand_usd_per_hour: float
    clairvoyant_usd_per_hour: float
    preemptions_per_day: float
    independent_availability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticTargets:
    """What the fixed targets of a site's zones come to, for a deployment without SkyServe's policy.

    `shortfall` is the mean share of replicas missing in the worst 5 % of scenarios.
    """

    usd_per_hour: float
    shortfall: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where the replicas of one column run.

    `spot_overprovision` more spot replicas than needed are kept; `on_demand_fallback` lets on-demand
    replicas stand in while spot is short; `on_demand_base` of them always run. `cold_start_s` is from a
    launch request to the first answer. No zones: the user's own machine. `outlook` is None where nothing is
    known of the zones. `notes` say which zones were left out and why, and what else there is to know.
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
    evidence: Evidence = "none"
    outlook: Outlook | None = None
    static: StaticTargets | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All sites. `evidence` is the weakest that the availability statement rests on; without any, nothing is
    promised."""

    sites: tuple[Site, ...]
    evidence: Evidence
    availability_wanted: float
    statement: str
