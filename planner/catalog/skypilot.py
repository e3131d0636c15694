"""Prices from an installed SkyPilot: its catalog CSVs -> Offers.

SkyPilot keeps them under ~/.sky/catalogs/v8/{aws,gcp,azure}/vms.csv, one row per zone. On AWS and Azure a row
is a whole machine. On GCP a machine and its GPUs are priced in separate rows and their prices add up
(sky/catalog/gcp_catalog.py, get_hourly_cost and get_accelerator_hourly_cost).
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moeplan.planner.catalog.offers import CLOUDS, parse_price
from moeplan.planner.catalog.yaml_tree import Problems, read_text
from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.machine import Machine, Offer
from moeplan.planner.ir.spec import Cloud

SOURCE = "skypilot-catalog"
_COLUMNS = ("InstanceType", "AcceleratorName", "AcceleratorCount", "Price", "SpotPrice", "Region")
_GpuPrices = Mapping[tuple[str, float, str], "_Price"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SkypilotPrices:
    """What an import found.

    `problems` names every malformed row, which is left out. `unknown` lists the machine types that have
    prices there but no entry in the catalog; they are left out too.
    """

    offers: tuple[Offer, ...]
    problems: tuple[Diagnostic, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Price:
    """USD per hour; `spot` is None where there is none."""

    on_demand: float
    spot: float | None

    def plus(self, other: _Price) -> _Price:
        """Both together; no spot price unless both have one."""
        spot = None if self.spot is None or other.spot is None else self.spot + other.spot
        return _Price(self.on_demand + other.on_demand, spot)

    def cheaper(self, other: _Price | None) -> _Price:
        """The lower of each of two zones' prices."""
        if other is None:
            return self
        spots = [price.spot for price in (self, other) if price.spot is not None]
        return _Price(min(self.on_demand, other.on_demand), min(spots, default=None))


@dataclass(frozen=True, slots=True)
class _Row:
    """One well-formed row; `instance` is empty for a GCP accelerator."""

    instance: str
    gpu: str
    gpus: float
    region: str
    zone: str
    price: _Price
    span: Span


def import_skypilot(
    folder: Path, where: Span, machines: Mapping[str, Machine], date: str = ""
) -> SkypilotPrices:
    """One offer per cloud, region and machine type, at the prices of its cheapest zone, sorted.

    `date` is written into the offers; left empty, it is the day each file was last changed. Raises
    CompileError at `where` if the folder holds no price file.
    """
    problems, offers, unknown = Problems(), dict[tuple[str, str, str], Offer](), set[str]()
    files = {cloud: folder / cloud / "vms.csv" for cloud in CLOUDS}
    present = {cloud: file for cloud, file in files.items() if file.is_file()}
    if not present:
        raise CompileError(_nothing(folder, where))
    for cloud, file in present.items():
        text = read_text(file, where, problems)
        rows = tuple(_rows(text, str(file), problems)) if text is not None else ()
        day = date or _changed(file)
        for region, machine, price in _prices(cloud, rows, machines, problems, unknown):
            offers[(cloud, region, machine)] = _offer(CLOUDS[cloud], region, machine, price, day)
    return SkypilotPrices(
        offers=tuple(offers[key] for key in sorted(offers)),
        problems=problems.found(),
        unknown=tuple(sorted(unknown)),
    )


def _offer(cloud: Cloud, region: str, machine: str, price: _Price, date: str) -> Offer:
    return Offer(
        cloud=cloud,
        region=region,
        machine=machine,
        on_demand_usd_per_hour=round(price.on_demand, 6),
        spot_usd_per_hour=None if price.spot is None else round(price.spot, 6),
        source=SOURCE,
        date=date,
    )


def _changed(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).date().isoformat()


def _nothing(folder: Path, where: Span) -> Diagnostic:
    return Diagnostic(
        code="skypilot-catalog",
        span=where,
        message=f"{folder} holds no SkyPilot price file",
        hint="expected aws/vms.csv, gcp/vms.csv or azure/vms.csv, as in ~/.sky/catalogs/v8",
    )


def _prices(
    cloud: str,
    rows: Iterable[_Row],
    machines: Mapping[str, Machine],
    problems: Problems,
    unknown: set[str],
) -> Iterator[tuple[str, str, _Price]]:
    """Region, machine type and lowest price of every known machine."""
    types: dict[str, list[Machine]] = defaultdict(list)
    for machine in machines.values():
        types[machine.name.partition("+")[0]].append(machine)  # n1-standard-8+1xT4 rents n1-standard-8
    rows = tuple(rows)
    gpu_prices = {(r.gpu, r.gpus, r.zone): r.price for r in rows if not r.instance}
    best: dict[tuple[str, str], _Price] = {}
    for row in rows:
        if not row.instance:
            continue
        known = types.get(row.instance, [])
        if not known and row.gpu:
            unknown.add(row.instance)
        for machine in known:
            price = _whole_price(cloud, row, machine, gpu_prices, problems)
            if price is not None:
                key = (row.region, machine.name)
                best[key] = price.cheaper(best.get(key))
    for (region, name), price in sorted(best.items(), key=lambda item: item[0]):
        yield region, name, price


def _whole_price(
    cloud: str, row: _Row, machine: Machine, gpu_prices: _GpuPrices, problems: Problems
) -> _Price | None:
    """The price of `machine` in the zone of `row`, GPUs included; None where it cannot be had there."""
    if row.gpu or not machine.gpus or cloud != "gcp":
        if row.gpus != machine.gpus:  # names of one GPU differ: SkyPilot has no H100-NVL
            problems.add(row.span, f"{row.instance} has {row.gpus:g} GPUs, the catalog says {machine.gpus}")
            return None
        return row.price
    gpus = gpu_prices.get((machine.gpu, machine.gpus, row.zone))
    return None if gpus is None else row.price.plus(gpus)


def _rows(text: str, path: str, problems: Problems) -> Iterator[_Row]:
    """Every row with an on-demand price; malformed rows are noted, unpriced ones skipped."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            problems.add(Span(path, 1, 1), f"missing columns: {', '.join(missing)}")
            return
        for cells in reader:
            row = _row(cells, Span(path, reader.line_num, 1), problems)
            if row is not None:
                yield row
    except csv.Error as error:
        problems.add(Span(path, reader.line_num, 1), f"not CSV: {error}")


def _row(cells: Mapping[str | None, object], span: Span, problems: Problems) -> _Row | None:
    if None in cells or any(value is None for value in cells.values()):
        problems.add(span, "wrong number of columns")
        return None
    text = {str(key): _known(str(value)) for key, value in cells.items()}
    if not text["Price"]:
        return None
    price, spot = parse_price(text["Price"]), parse_price(text["SpotPrice"])
    gpus = _number(text["AcceleratorCount"]) if text["AcceleratorName"] else 0.0
    if price is None or (spot is None and text["SpotPrice"]):
        problems.add(span, f"not a price: {text['Price'][:20]}, {text['SpotPrice'][:20]}")
    elif gpus is None:
        problems.add(span, f"not a number of GPUs: '{text['AcceleratorCount'][:20]}'")
    elif not text["Region"] or not (text["InstanceType"] or text["AcceleratorName"]):
        problems.add(span, "no region, or neither a machine type nor a GPU")
    else:
        zone = text.get("AvailabilityZone") or text["Region"]
        names = text["InstanceType"], text["AcceleratorName"]
        return _Row(*names, gpus, text["Region"], zone, _Price(price, spot), span)
    return None


def _known(text: str) -> str:
    """The text, empty where pandas wrote a missing value."""
    return "" if text.strip().lower() in ("nan", "none", "null") else text.strip()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value <= 64 else None
