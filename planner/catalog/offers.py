"""Priced offers: our CSV format, read and written, and prices taken over from an installed SkyPilot."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from moeplan.planner.catalog.yaml_tree import Problems
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.spec import Cloud

OFFERS_FILE = "offers.csv"
COLUMNS = (
    "cloud",
    "region",
    "instance",
    "on_demand_usd_per_hour",
    "spot_usd_per_hour",
    "date",
    "source",
)
CLOUDS: dict[str, Cloud] = {cloud: cloud for cloud in get_args(Cloud)}
_HIGHEST_USD_PER_HOUR = 100_000.0
_REGION = re.compile("[a-z0-9][a-z0-9-]*")  # it names folders
_DATE = re.compile(r"\d{4}(-\d\d){0,2}")


def read_offers(
    text: str, path: str, problems: Problems, machines: Collection[str] | None
) -> tuple[Offer, ...]:
    """The offers of a CSV text, sorted. Notes every wrong row at its place.

    `machines` are the known machine types; None takes them on trust.
    """
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    offers: dict[tuple[str, str, str], Offer] = {}
    try:
        header = next(rows, [])
        if tuple(header) != COLUMNS:
            problems.add(Span(path, 1, 1), f"wrong columns: {','.join(header)[:80]}", ",".join(COLUMNS))
            return ()
        for cells in rows:
            row = _Row(path, rows.line_num, cells, problems)
            offer = row.offer(machines) if cells else None
            if offer is not None and _key(offer) in offers:
                row.wrong("instance", f"a second price of {offer.machine} in {offer.cloud} {offer.region}")
            elif offer is not None:
                offers[_key(offer)] = offer
    except csv.Error as error:
        problems.add(Span(path, rows.line_num, 1), f"not CSV: {error}")
    return tuple(offers[key] for key in sorted(offers))


def merge_offers(below: tuple[Offer, ...], above: Iterable[Offer]) -> tuple[Offer, ...]:
    """Offers of both, sorted; those of `above` replace the same machine in the same region."""
    merged = {_key(offer): offer for offer in (*below, *above)}
    return tuple(merged[key] for key in sorted(merged))


def write_offers(offers: Iterable[Offer]) -> str:
    """The offers as CSV text in our format, sorted."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for offer in sorted(offers, key=_key):
        spot = "" if offer.spot_usd_per_hour is None else _usd(offer.spot_usd_per_hour)
        price = _usd(offer.on_demand_usd_per_hour)
        writer.writerow((offer.cloud, offer.region, offer.machine, price, spot, offer.date, offer.source))
    return out.getvalue()


def _key(offer: Offer) -> tuple[str, str, str]:
    return offer.cloud, offer.region, offer.machine


def _usd(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of offers.csv."""

    path: str
    line: int
    cells: list[str]
    problems: Problems

    def offer(self, machines: Collection[str] | None) -> Offer | None:
        """The offer, or None after noting what is wrong."""
        if len(self.cells) != len(COLUMNS):
            self.problems.add(
                Span(self.path, self.line, 1), f"{len(self.cells)} columns, expected {len(COLUMNS)}"
            )
            return None
        cells = dict(zip(COLUMNS, (cell.strip() for cell in self.cells), strict=True))
        cloud = CLOUDS.get(cells["cloud"])
        if cloud is None:
            self.wrong("cloud", f"unknown cloud '{cells['cloud'][:40]}'", f"one of: {', '.join(CLOUDS)}")
        on_demand = self._price("on_demand_usd_per_hour", cells)
        spot = self._price("spot_usd_per_hour", cells) if cells["spot_usd_per_hour"] else None
        fine = self._texts(cells, machines)
        if cloud is None or on_demand is None or not fine:
            return None
        return Offer(
            cloud=cloud,
            region=cells["region"],
            machine=cells["instance"],
            on_demand_usd_per_hour=on_demand,
            spot_usd_per_hour=spot,
            source=cells["source"],
            date=cells["date"],
        )

    def _texts(self, cells: Mapping[str, str], machines: Collection[str] | None) -> bool:
        empty = [key for key in ("region", "instance", "source") if not cells[key]]
        for key in empty:
            self.wrong(key, f"'{key}' is empty")
        known = machines is None or not cells["instance"] or cells["instance"] in machines
        if not known:
            hint = "add it to machines.yaml, or leave the row out"
            self.wrong("instance", f"unknown machine type '{cells['instance'][:60]}'", hint)
        placed = not cells["region"] or bool(_REGION.fullmatch(cells["region"]))
        if not placed:
            self.wrong("region", f"'{cells['region'][:60]}' is not a region", "write us-east-1")
        dated = bool(_DATE.fullmatch(cells["date"]))
        if not dated:
            self.wrong("date", f"'{cells['date'][:40]}' is not a date", "write 2026-08-03")
        return known and placed and dated and not empty

    def _price(self, key: str, cells: Mapping[str, str]) -> float | None:
        price = parse_price(cells[key])
        if price is None:
            self.wrong(key, f"'{cells[key][:40]}' is not a price in USD per hour")
        return price

    def wrong(self, key: str, problem: str, hint: str = "") -> None:
        """Note a problem at the column of `key`."""
        before = self.cells[: COLUMNS.index(key)]
        column = 1 + sum(len(cell) + 1 for cell in before)
        self.problems.add(Span(self.path, self.line, column), problem, hint)


def parse_price(text: str) -> float | None:
    """USD per hour, None where `text` is no sensible price."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 < value <= _HIGHEST_USD_PER_HOUR else None


def offer_machines(offers: Iterable[Offer]) -> Iterator[str]:
    """Machine types that have a price, each once, sorted."""
    yield from sorted({offer.machine for offer in offers})
