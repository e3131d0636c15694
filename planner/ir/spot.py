"""What is known of spot machines: traces of what zones could launch, and how often zones interrupt."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.ir.spec import Cloud

UNLIMITED = 30_000  # of a zone whose trace tells only whether there is one


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ZoneName:
    """A zone of a region; `zone` is empty where only the region is known."""

    cloud: Cloud
    region: str
    zone: str = ""

    def __str__(self) -> str:
        return f"{self.cloud}/{self.region}" + (f"/{self.zone}" if self.zone else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotTrace:
    """Machines that each zone could launch, step by step.

    `counted` is false where the file says only whether one can be had: then any number counts as available,
    which is the most that the file can mean. `start` and `instance` are as the file has them, or empty.
    `notes` say what the reader had to do.
    """

    zones: tuple[ZoneName, ...]
    step_s: float
    capacity: NDArray[np.int16] = field(repr=False, compare=False)  # [steps, zones]
    counted: bool
    start: str = ""
    instance: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.capacity)

    @property
    def span_s(self) -> float:
        return self.steps * self.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """How often spot machines of a type were interrupted in a region in a month: a share from `low` to
    `high`."""

    cloud: Cloud
    region: str
    machine: str
    low: float
    high: float
