"""Weights, machine -> seconds from a launch request to the first answer."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.workload import Workload

# Round figures; SkyServe (EuroSys'25) reports 183 s for Llama-2-7B under vLLM on AWS, these give 182 s.
_BOOT_S = 90.0
_ENGINE_START_S = 45.0
_IMAGE_BYTES = 10e9
_NETWORK_BYTES_PER_S = 0.5e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """The parts of a cold start, one after the other."""

    boot_s: float
    image_s: float
    weights_s: float
    engine_s: float

    @property
    def seconds(self) -> float:
        return self.boot_s + self.image_s + self.weights_s + self.engine_s


def cold_start(workload: Workload, machine: Machine | None = None) -> ColdStart:
    """Boot, image pull, weights, engine start. Weights come over the network onto the disk, whichever is
    slower, and are read from it as they arrive."""
    arrival = _NETWORK_BYTES_PER_S
    if machine is not None and any(level.name == "disk" for level in machine.levels):
        arrival = min(arrival, machine.level("disk").bytes_per_s)
    return ColdStart(
        boot_s=_BOOT_S,
        image_s=_IMAGE_BYTES / _NETWORK_BYTES_PER_S,
        weights_s=workload.model.weight_bytes() / arrival,
        engine_s=_ENGINE_START_S,
    )
