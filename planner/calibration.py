"""A machine's figures under the keys of its file, and what changed between two sets of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from moeplan.planner.ir.machine import Kernels, Machine

Figures = Mapping[str, float]  # by dotted key, as in `cpu.kernels.bf16.2.product_flops_per_s.16`


def machine_figures(machine: Machine) -> dict[str, float]:
    """Every figure of `machine` that a machine file gives, rates as reached."""
    dram, disk = machine.level("dram"), machine.level("disk")
    figures = {
        "dram.bytes": float(dram.bytes),
        "dram.bytes_per_s": dram.bytes_per_s * dram.memory_efficiency,
        "disk.bytes": float(disk.bytes),
        "disk.bytes_per_s": disk.bytes_per_s * disk.up_efficiency,
        "disk.while_computing": machine.disk_kept,
        "disk.sigma": machine.disk_sigma,
        "cpu.cores": float(machine.cpu_cores),
    }
    figures |= {f"cpu.flops_per_s.{k}": v * dram.compute_efficiency for k, v in dram.flops_per_s.items()}
    if not machine.gpus:
        figures["cpu.launch_s"] = machine.launch_s
    figures["cpu.while_reading"] = machine.compute_kept
    for kernels in machine.kernels:
        figures |= _kernels(kernels)
    return figures


def _kernels(kernels: Kernels) -> dict[str, float]:
    prefix = f"cpu.kernels.{kernels.dtype}.{kernels.threads}."
    figures: dict[str, float] = {}
    for field in dataclasses.fields(kernels):
        value = getattr(kernels, field.name)
        if isinstance(value, tuple):
            figures |= {f"{prefix}{field.name}.{at}": rate for at, rate in value}
        elif field.name not in ("threads", "dtype"):
            figures[prefix + field.name] = value
    return figures


def nearest_machine(machines: Mapping[str, Machine], cores: float) -> Machine | None:
    """The machine without a GPU whose cores are closest in number, of several the first by name."""
    without = [machines[name] for name in sorted(machines) if not machines[name].gpus]
    return min(without, key=lambda m: abs(m.cpu_cores - cores), default=None)


def change_table(before: Figures, measured: Figures, least: float = 0.1) -> list[str]:
    """A line per figure: key, before, measured, change. Of operators only those that moved by `least`."""
    lines = [f"{'figure':50}{'before':>12}{'measured':>12}{'change':>9}"]
    quiet = 0
    for key, value in measured.items():
        known = before.get(key)
        change = value / known - 1 if known else None
        if ".kernels." in key and (change is None or abs(change) < least):
            quiet += 1
            continue
        shown = ("-", "") if known is None or change is None else (f"{known:.3g}", f"{change:+.0%}")
        lines.append(f"{key:50}{shown[0]:>12}{value:12.3g}{shown[1]:>9}")
    if quiet:
        lines.append(f"and {quiet} figures of operators, new or within {least:.0%}")
    return lines
