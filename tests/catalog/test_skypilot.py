"""Prices from SkyPilot's catalog files: cheapest zone, GCP's two-part prices, malformed rows named."""

from __future__ import annotations

from pathlib import Path

import pytest

from moeplan.planner.catalog import SkypilotPrices, import_skypilot, load_catalog, read_offers, write_offers
from moeplan.planner.catalog.yaml_tree import Problems
from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.ir.machine import Offer

WHERE = Span("command line")
MACHINES = load_catalog(None, WHERE).machines

# The columns and the quoting of skypilot-catalog v8; invented prices.
AWS = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch
g4dn.xlarge,T4,1.0,4.0,16.0,"{'Gpus': [{'Name': 'T4', 'Count': 1}]}",0.526,0.20,us-east-1,us-east-1b,x86_64
g4dn.xlarge,T4,1.0,4.0,16.0,"{'Gpus': [{'Name': 'T4', 'Count': 1}]}",0.526,0.19,us-east-1,us-east-1a,x86_64
g4dn.xlarge,T4,1.0,4.0,16.0,,0.615,,eu-west-1,eu-west-1a,x86_64
g4dn.xlarge,T4,1.0,4.0,16.0,,,0.1,eu-west-2,eu-west-2a,x86_64
m6i.2xlarge,,,8.0,32.0,,0.384,0.1,us-east-1,us-east-1a,x86_64
p9.huge,X100,8.0,8.0,32.0,,98.0,10.1,us-east-1,us-east-1a,x86_64
"""
GCP = """\
InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,AvailabilityZone,Price,SpotPrice
g2-standard-24,24.0,96.0,,,,us-central1,us-central1-a,1.0,0.4
g2-standard-24,24.0,96.0,,,,us-central1,us-central1-b,1.0,0.3
g2-standard-24,24.0,96.0,,,,us-east4,us-east4-c,1.1,0.4
n1-standard-8,8.0,30.0,,,,us-central1,us-central1-a,0.38,0.08
,,,L4,1.0,L4,us-central1,us-central1-a,0.6,0.2
,,,L4,2.0,L4,us-central1,us-central1-a,1.2,0.4
,,,T4,1.0,T4,us-central1,us-central1-a,0.35,nan
"""


def imported(tmp_path: Path, aws: str = AWS, gcp: str = GCP) -> SkypilotPrices:
    for cloud, text in (("aws", aws), ("gcp", gcp)):
        (tmp_path / cloud).mkdir(exist_ok=True)
        (tmp_path / cloud / "vms.csv").write_text(text)
    return import_skypilot(tmp_path, WHERE, MACHINES, date="2026-08-03")


def price(prices: SkypilotPrices, region: str, machine: str) -> tuple[float, float | None] | None:
    found = [o for o in prices.offers if (o.region, o.machine) == (region, machine)]
    return (found[0].on_demand_usd_per_hour, found[0].spot_usd_per_hour) if found else None


def test_cheapest_zone(tmp_path: Path) -> None:
    prices = imported(tmp_path)
    assert price(prices, "us-east-1", "g4dn.xlarge") == (0.526, 0.19)
    assert price(prices, "eu-west-1", "g4dn.xlarge") == (0.615, None)
    assert price(prices, "eu-west-2", "g4dn.xlarge") is None  # no on-demand price: not an offer of ours
    assert not prices.problems
    assert prices.unknown == ("p9.huge",)


def test_gcp_prices_add_up(tmp_path: Path) -> None:
    """Two L4 at 1.2 beside the machine at 1.0, in the one zone that has both; a T4 on an N1 likewise."""
    prices = imported(tmp_path)
    assert price(prices, "us-central1", "g2-standard-24") == (2.2, 0.8)
    assert price(prices, "us-east4", "g2-standard-24") is None
    assert price(prices, "us-central1", "n1-standard-8+1xT4") == (0.73, None)


def test_same_rows_same_offers_in_any_order(tmp_path: Path) -> None:
    head, *rows = AWS.splitlines(keepends=True)
    offers = imported(tmp_path).offers
    assert imported(tmp_path, aws="".join([head, *reversed(rows)])).offers == offers
    assert list(offers) == sorted(offers, key=lambda o: (o.cloud, o.region, o.machine))


def test_round_trip_through_our_format(tmp_path: Path) -> None:
    offers, problems = imported(tmp_path).offers, Problems()
    assert read_offers(write_offers(offers), "offers.csv", problems, MACHINES) == offers
    problems.raise_all()


def test_built_in_offers_are_written_as_they_stand() -> None:
    offers, problems = load_catalog(None, WHERE).offers, Problems()
    assert read_offers(write_offers(offers), "offers.csv", problems, None) == offers
    assert write_offers(()) == write_offers(tuple[Offer, ...]())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.526,0.20", "cheap,0.20", "aws/vms.csv:2:1: not a price: cheap, 0.20"),
        ("0.526,0.20", "-1,0.20", "not a price: -1"),
        ("0.526,0.20", "0.526,inf", "not a price: 0.526, inf"),
        ("T4,1.0", "T4,one", "not a number of GPUs: 'one'"),
        ("T4,1.0", "T4,2.0", "g4dn.xlarge has 2 GPUs, the catalog says 1"),
        ("us-east-1,us-east-1b", ",us-east-1b", "no region"),
        (",us-east-1b,x86_64", "", "wrong number of columns"),
        (",x86_64", ",x86_64,more", "wrong number of columns"),
    ],
)
def test_malformed_rows_are_named_and_left_out(tmp_path: Path, old: str, new: str, message: str) -> None:
    """The second zone's row still gives its price."""
    prices = imported(tmp_path, aws=AWS.replace(old, new, 1))
    assert message in "\n".join(map(str, prices.problems))
    assert len(prices.problems) == 1
    assert price(prices, "us-east-1", "g4dn.xlarge") == (0.526, 0.19)


@pytest.mark.parametrize("text", ["", "\n", "a,b\n1,2\n", "\0", '"'])
def test_files_of_another_kind(tmp_path: Path, text: str) -> None:
    prices = imported(tmp_path, aws=text)
    assert prices.problems
    assert price(prices, "us-central1", "g2-standard-24") is not None


def test_no_files_at_all(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="holds no SkyPilot price file"):
        import_skypilot(tmp_path, WHERE, MACHINES)


def test_dated_by_the_file(tmp_path: Path) -> None:
    imported(tmp_path)
    offers = import_skypilot(tmp_path, WHERE, MACHINES).offers
    assert all(len(offer.date) == 10 for offer in offers)
