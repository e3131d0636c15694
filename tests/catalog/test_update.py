"""Renewed prices: what is new, changed and gone, and what of the user's own stays."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moeplan.planner.catalog import import_skypilot, load_catalog, update_offers, write_offers
from moeplan.planner.catalog.offers import COLUMNS
from moeplan.planner.diagnostics import CompileError, Span

sys.path.insert(0, str(Path(__file__).parents[1] / "external"))
import sky_catalog

WHERE = Span("here")
CATALOG = load_catalog(None, WHERE)
HEAD = ",".join(COLUMNS) + "\n"
OWN = "aws,us-east-1,g4dn.xlarge,9,,2026-01-01,my contract\n"
GONE = "aws,us-east-9,g4dn.xlarge,1,,2026-01-01,skypilot-catalog\n"
STAYS = "aws,us-east-9,g5.xlarge,1,,2026-01-01,my contract\n"


@pytest.fixture(scope="module")
def skypilot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v8")
    sky_catalog.write_catalog(folder, CATALOG)
    return folder


def test_our_prices_survive_skypilots_layout(skypilot: Path) -> None:
    """Written as SkyPilot has them, GCP's split in two, every price comes back."""
    found = import_skypilot(skypilot, WHERE, CATALOG.machines)
    assert (found.problems, found.unknown) == ((), ())
    prices = {(o.cloud, o.region, o.machine): o for o in found.offers}
    assert len(prices) == len(CATALOG.offers) > 800
    for offer in CATALOG.offers:
        same = prices[offer.cloud, offer.region, offer.machine]
        assert same.on_demand_usd_per_hour == pytest.approx(offer.on_demand_usd_per_hour, abs=2e-6)
        if offer.spot_usd_per_hour is not None:
            assert same.spot_usd_per_hour == pytest.approx(offer.spot_usd_per_hour, abs=2e-6)


def test_an_update_twice_changes_nothing(skypilot: Path, tmp_path: Path) -> None:
    first = update_offers(tmp_path, skypilot, CATALOG.machines)
    assert (first.added, first.changed, first.gone) == (len(first.offers), 0, 0)
    (tmp_path / "offers.csv").write_text(write_offers(first.offers))
    second = update_offers(tmp_path, skypilot, CATALOG.machines)
    assert (second.added, second.changed, second.gone) == (0, 0, 0)
    assert second.offers == first.offers


def test_own_rows_stay_and_skypilots_go_with_it(skypilot: Path, tmp_path: Path) -> None:
    (tmp_path / "offers.csv").write_text(HEAD + OWN + GONE + STAYS)
    found = update_offers(tmp_path, skypilot, CATALOG.machines)
    assert (found.changed, found.gone) == (1, 1)
    assert [o.machine for o in found.offers if o.region == "us-east-9"] == ["g5.xlarge"]
    assert (
        next(o for o in found.offers if (o.region, o.machine) == ("us-east-1", "g4dn.xlarge")).source
        != "my contract"
    )


def test_prices_from_a_csv(tmp_path: Path) -> None:
    (tmp_path / "offers.csv").write_text(HEAD + GONE + STAYS)
    (tmp_path / "new.csv").write_text(HEAD + OWN + STAYS.replace(",1,", ",2,"))
    found = update_offers(tmp_path, tmp_path / "new.csv", CATALOG.machines)
    assert (len(found.offers), found.added, found.changed, found.gone) == (3, 1, 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there are no prices"),
        (HEAD, "no price of a known machine type"),
        (HEAD + OWN.replace("g4dn", "g99"), "new.csv:2:15: unknown machine type 'g99.xlarge'"),
        (HEAD + OWN.replace(",9,", ",-9,"), "is not a price"),
        ("a,b\n", "wrong columns"),
        ("\x00", "new.csv:1:"),
    ],
)
def test_what_cannot_be_read_changes_nothing(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "new.csv").write_text(text)
    with pytest.raises(CompileError, match=message):
        update_offers(tmp_path, tmp_path / "new.csv", CATALOG.machines)
