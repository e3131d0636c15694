"""A predicted figure that says where it comes from and how sure it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moeplan.planner.ir.machine import Provenance

# 90 % of a normal distribution lies within this many standard errors.
Z90 = 1.645


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """`value` with its 90 % interval, log-normal with relative standard error `sigma`."""

    value: float
    sigma: float
    provenance: Provenance

    @property
    def low(self) -> float:
        return self.value * math.exp(-Z90 * self.sigma)

    @property
    def high(self) -> float:
        return self.value * math.exp(Z90 * self.sigma)
