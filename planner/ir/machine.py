"""Machines as a hierarchy of memories with processors, fastest first, and what they cost where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moeplan.planner.ir.spec import Cloud

LevelName = Literal["gpu", "dram", "disk"]
Provenance = Literal["datasheet", "analytic", "calibrated", "measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One memory and the processor that works out of it, all figures *nominal* and per machine.

    For a machine with several GPUs the gpu level is one GPU. `flops_per_s` maps a dtype to the dense peak
    (empty for a disk). `up_bytes_per_s` is the link to the next faster level, per GPU for the link into a
    GPU; 0.0 on the fastest level. Efficiencies are the share of each nominal rate that kernels reach:
    `memory_efficiency` of matrix products, the others of routed experts and of decode attention.
    """

    name: LevelName
    bytes: int
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    up_bytes_per_s: float
    memory_efficiency: float
    expert_memory_efficiency: float
    attention_memory_efficiency: float
    compute_efficiency: float
    prefill_efficiency: float
    up_efficiency: float
    # Prefill of offloaded weights reaches less than prefill in memory (fits of MoE-Lightning's runs).
    offload_prefill_efficiency: float = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine type or one measured box.

    `levels` run from the fastest memory to the slowest: (gpu, dram, disk) or (dram, disk).
    `peer_bytes_per_s` is the GPU-to-GPU rate of one GPU (NVLink, or PCIe through the host).
    `launch_s` is the fixed cost of one operator call on the fastest processor.
    `cpu_cores` are physical cores (a cloud vCPU is half of one).
    `sigma` is the relative standard error of predictions made from these figures.
    """

    name: str
    gpu: str
    gpus: int
    cpu_cores: float
    levels: tuple[Level, ...]
    peer_bytes_per_s: float
    launch_s: float
    provenance: Provenance
    sigma: float
    source: str

    def level(self, name: LevelName) -> Level:
        """The level called `name`; raises KeyError where the machine has none."""
        for level in self.levels:
            if level.name == name:
                return level
        raise KeyError(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """One priced way to rent one machine type in one region."""

    cloud: Cloud
    region: str
    machine: str
    on_demand_usd_per_hour: float
    spot_usd_per_hour: float | None
    source: str
    date: str
