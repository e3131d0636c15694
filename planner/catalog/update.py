"""New prices for an own catalog folder, from an installed SkyPilot or a CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moeplan.planner.catalog.offers import OFFERS_FILE, read_offers
from moeplan.planner.catalog.skypilot import SOURCE, import_skypilot
from moeplan.planner.catalog.yaml_tree import Problems, read_text
from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.machine import Machine, Offer


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The offers a folder should hold, sorted, and how they came about.

    `problems` names every row that was left out as malformed, `unknown` the machine types that the catalog
    has no entry for.
    """

    offers: tuple[Offer, ...]
    added: int
    changed: int
    gone: int
    problems: tuple[Diagnostic, ...]
    unknown: tuple[str, ...]


def update_offers(folder: Path, source: Path, machines: Mapping[str, Machine]) -> Update:
    """Lay the prices of `source` over those of folder/offers.csv, if there is one.

    `source` is a folder of SkyPilot's price files, or a CSV in the format of offers.csv. What an earlier
    update took from SkyPilot and SkyPilot no longer has goes; other rows stay. Raises CompileError where
    nothing can be read, or a CSV of ours has a wrong row.
    """
    if not source.exists():
        hint = "SkyPilot writes its folder at its first `sky check`; --from names another folder, or a CSV"
        message = "there are no prices"
        raise CompileError(Diagnostic(code="no-prices", span=Span(str(source)), message=message, hint=hint))
    before = _read(folder / OFFERS_FILE, None) if (folder / OFFERS_FILE).exists() else ()
    if source.is_dir():
        prices = import_skypilot(source, Span(str(source)), machines)
        new, problems, unknown = prices.offers, prices.problems, prices.unknown
        kept = [offer for offer in before if offer.source != SOURCE]
    else:
        new, problems, unknown = _read(source, machines), (), ()
        kept = list(before)
    if not new:
        message = f"{source} has no price of a known machine type"
        raise CompileError(*problems, Diagnostic(code="no-prices", span=Span(str(source)), message=message))
    old, held = _by_place(before), {**_by_place(kept), **_by_place(new)}
    return Update(
        offers=tuple(held[key] for key in sorted(held)),
        added=len(held.keys() - old.keys()),
        changed=sum(_price(held[key]) != _price(old[key]) for key in held.keys() & old.keys()),
        gone=len(old.keys() - held.keys()),
        problems=problems,
        unknown=unknown,
    )


def _read(path: Path, machines: Mapping[str, Machine] | None) -> tuple[Offer, ...]:
    problems = Problems()
    text = read_text(path, Span(str(path)), problems)
    offers = read_offers(text, str(path), problems, machines) if text is not None else ()
    problems.raise_all()
    return offers


def _by_place(offers: Iterable[Offer]) -> dict[tuple[str, str, str], Offer]:
    return {(offer.cloud, offer.region, offer.machine): offer for offer in offers}


def _price(offer: Offer) -> tuple[float, float | None]:
    return offer.on_demand_usd_per_hour, offer.spot_usd_per_hour
