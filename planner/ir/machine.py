"""Machines as a hierarchy of memories with processors, fastest first, and what they cost where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moeplan.planner.ir.spec import Cloud

LevelName = Literal["gpu", "dram", "disk"]
# Overlap of products and direct reads where it was not measured: on two cores arithmetic kept 0.71-0.93 of
# its speed and the disk 0.84-1.0.
COMPUTE_KEPT, DISK_KEPT = 0.85, 0.92
Provenance = Literal["datasheet", "analytic", "calibrated", "measured"]
Table = tuple[tuple[int, float], ...]


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
class Kernels:
    """How fast the bundled runtime's operators run on `threads` of the cores, for one dtype.

    `unpack_values_per_s`, by packing, is what products of weights packed so take longer; empty where that was
    not measured. Tables map rows or tokens to a rate, or to seconds, ascending; between two entries seconds
    are interpolated, see `strategies/runtime_costs.py`. What each figure counts:
    `runtime_min/calibration/kernels.py`, which measures them.
    """

    threads: int
    dtype: str
    attention_s: float
    route_s: float
    expert_s: float
    row_s: float
    pass_s: float
    sequence_s: float
    product_flops_per_s: Table
    far_bytes_per_s: Table
    attention_flops_per_s: Table
    kv_bytes_per_s: float
    head_s: float
    attention_values_per_s: Table
    decode_values_per_s: Table
    route_values_per_s: Table
    expert_values_per_s: Table
    score_values_per_s: float
    decode_s: Table = ()
    unpack_values_per_s: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine type or one measured box.

    `levels` run from the fastest memory to the slowest: (gpu, dram, disk) or (dram, disk).
    `peer_bytes_per_s` is the GPU-to-GPU rate of one GPU (NVLink, or PCIe through the host).
    `launch_s` is the fixed cost of one operator call on the fastest processor.
    `cpu_cores` are physical cores (a cloud vCPU is half of one).
    `sigma` is the relative standard error of predictions made from these figures.
    `kernels` are measured figures of the bundled runtime's operators, none where the machine is not
    calibrated. While the disk is read, arithmetic keeps `compute_kept` of its speed; while the cores compute,
    reading keeps `disk_kept` of its own. From one time to another its rate differs by the relative standard
    deviation `disk_sigma`.
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
    kernels: tuple[Kernels, ...] = ()
    compute_kept: float = COMPUTE_KEPT
    disk_kept: float = DISK_KEPT
    disk_sigma: float = 0.0

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
