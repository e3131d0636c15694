"""Facts of the catalog, changed by a factor: prices, bandwidths, memories. `price.H100=+10%` as a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.machine import Kernels, Level, LevelName, Machine, Offer, Table
from moeplan.planner.settings import relative, split_setting
from moeplan.planner.suggest import nearest

_Change = Callable[[Machine, float], Machine]


@dataclass(frozen=True, slots=True, kw_only=True)
class FactChange:
    """`fact` times `factor`, of machines called `only` or with a GPU called so; of all where it is empty."""

    fact: str
    only: str
    factor: float

    def concerns(self, machine: Machine) -> bool:
        return self.only in ("", machine.name, machine.gpu)


def is_fact(setting: str) -> bool:
    """Whether a setting changes a fact, not the spec."""
    return setting.partition("=")[0].partition(".")[0] in FACTS


def fact_change(setting: str, option: str = "--what-if") -> FactChange:
    """The change that a setting asks for. Raises CompileError: facts are changed by percentages."""
    key, value = split_setting(setting, option)
    fact, _, only = key.partition(".")
    factor = relative(value)
    if not factor or factor <= Fraction(0):
        span = Span(f"{option} '{setting}'", 1, len(key) + 2)
        message = f"{key} is changed by a percentage, not to {value.strip()!r}"
        raise CompileError(
            Diagnostic(code="bad-setting", span=span, message=message, hint=f"for example {key}=+10%")
        )
    return FactChange(fact=fact, only=only, factor=float(factor))


def require_known(inputs: Inputs, changes: Sequence[FactChange], option: str = "--what-if") -> None:
    """Raises CompileError for a change that concerns no machine of the catalog."""
    machines = [*inputs.catalog.machines.values(), *([inputs.machine] if inputs.machine else [])]
    known = {name for machine in machines for name in (machine.name, machine.gpu) if name}
    problems = [
        Diagnostic(
            code="unknown-machine",
            span=Span(f"{option} '{change.fact}.{change.only}'"),
            message=f"no GPU or machine named {change.only!r}",
            hint=nearest(change.only, known, "`moeplan catalog machines` lists them"),
        )
        for change in changes
        if change.only and change.only not in known
    ]
    if problems:
        raise CompileError(*problems)


def with_changes(inputs: Inputs, changes: Sequence[FactChange]) -> Inputs:
    """The inputs with every change made, in order."""
    for change in changes:
        inputs = _with_change(inputs, change)
    return inputs


def _with_change(inputs: Inputs, change: FactChange) -> Inputs:
    catalog = inputs.catalog
    if change.fact in PRICES:
        offers = tuple(
            PRICES[change.fact](offer, change.factor)
            if change.concerns(catalog.machines[offer.machine])
            else offer
            for offer in catalog.offers
        )
        return replace(inputs, catalog=replace(catalog, offers=offers))

    def changed(machine: Machine) -> Machine:
        return HARDWARE[change.fact](machine, change.factor) if change.concerns(machine) else machine

    machines = {name: changed(machine) for name, machine in catalog.machines.items()}
    pinned = changed(inputs.machine) if inputs.machine else None
    return replace(inputs, catalog=replace(catalog, machines=machines), machine=pinned)


def _dearer(offer: Offer, factor: float) -> Offer:
    spot = offer.spot_usd_per_hour
    return replace(
        offer,
        on_demand_usd_per_hour=offer.on_demand_usd_per_hour * factor,
        spot_usd_per_hour=None if spot is None else spot * factor,
    )


def _dearer_spot(offer: Offer, factor: float) -> Offer:
    spot = offer.spot_usd_per_hour
    return replace(offer, spot_usd_per_hour=None if spot is None else spot * factor)


def _faster(name: LevelName) -> _Change:
    """The bandwidth of one memory; the measured rates of calibrated cores are of host memory."""

    def change(machine: Machine, factor: float) -> Machine:
        machine = _level(machine, name, lambda level: replace(level, bytes_per_s=level.bytes_per_s * factor))
        if name == "disk":
            return _link("disk")(machine, factor)
        if name == "gpu":
            return machine
        return replace(machine, kernels=tuple(_faster_kernels(k, factor) for k in machine.kernels))

    return change


def _faster_kernels(kernels: Kernels, factor: float) -> Kernels:
    far = _scaled(kernels.far_bytes_per_s, factor)
    return replace(kernels, kv_bytes_per_s=kernels.kv_bytes_per_s * factor, far_bytes_per_s=far)


def _scaled(table: Table, factor: float) -> Table:
    return tuple((at, rate * factor) for at, rate in table)


def _link(below: LevelName) -> _Change:
    """The link up from one level."""

    def change(machine: Machine, factor: float) -> Machine:
        return _level(
            machine, below, lambda level: replace(level, up_bytes_per_s=level.up_bytes_per_s * factor)
        )

    return change


def _larger(name: LevelName) -> _Change:
    def change(machine: Machine, factor: float) -> Machine:
        return _level(machine, name, lambda level: replace(level, bytes=round(level.bytes * factor)))

    return change


def _level(machine: Machine, name: LevelName, change: Callable[[Level], Level]) -> Machine:
    levels = tuple(change(level) if level.name == name else level for level in machine.levels)
    return replace(machine, levels=levels)


PRICES: Mapping[str, Callable[[Offer, float], Offer]] = {"price": _dearer, "spot_price": _dearer_spot}
HARDWARE: Mapping[str, _Change] = {
    "gpu_bandwidth": _faster("gpu"),
    "link_bandwidth": _link("dram"),
    "host_bandwidth": _faster("dram"),
    "disk_bandwidth": _faster("disk"),
    "gpu_memory": _larger("gpu"),
    "host_memory": _larger("dram"),
}
FACTS = (*PRICES, *HARDWARE)
