"""Published spot traces for tests, where MOEPLAN_SPOT_DATA names the folder that holds them."""

from __future__ import annotations

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.spec import Cloud
from moeplan.planner.ir.spot import SpotTrace
from moeplan.planner.spot_traces import read_spot_trace

FOLDER = Path(os.environ.get("MOEPLAN_SPOT_DATA", "no such folder"))
needs_data = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs MOEPLAN_SPOT_DATA")
US_ON_DEMAND = 82.5254  # USD per hour of eight H100 in us-central1, which the H100 prices are relative to

_GCP = (
    "asia-northeast1",
    "asia-south2",
    "asia-southeast1",
    "europe-west1",
    "europe-west3",
    "europe-west4",
    "us-central1",
    "us-east1",
    "us-east4",
    "us-east5",
    "us-west1",
)
_AWS = ("us-east-1", "us-east-2", "us-west-2")
REGIONS: frozenset[tuple[Cloud, str]] = frozenset(
    [*(("aws", region) for region in _AWS), *(("gcp", region) for region in _GCP)]
)


def published(name: str) -> SpotTrace:
    return read_spot_trace(FOLDER / f"{name}.csv.gz", Span("spec.yaml"), REGIONS)


def even_prices(trace: SpotTrace) -> NDArray[np.float64]:
    """Equal prices, ties broken by the order of zones; an on-demand machine costs three."""
    return 1.0 + 1e-4 * np.arange(len(trace.zones))


def h100_prices(trace: SpotTrace) -> NDArray[np.float64]:
    """Spot prices of October 2025 relative to an on-demand machine in the US."""
    with (FOLDER / "h100_gcp_prices.csv").open(newline="") as file:
        usd = {row["region"]: float(row["spot_over_us_on_demand"]) for row in csv.DictReader(file)}
    return np.array([usd[zone.region] for zone in trace.zones])


def aws3_prices(trace: SpotTrace) -> NDArray[np.float64]:
    """Mean spot prices of the trace's zones relative to on-demand (3.06 USD per hour)."""
    with gzip.open(FOLDER / "aws3_first_half_prices.csv.gz", "rt") as file:
        rows = list(csv.reader(line for line in file if not line.startswith("#")))
    assert rows[0][1:] == [zone.zone for zone in trace.zones]
    return np.array([[float(cell) for cell in row[1:]] for row in rows[1:]]).mean(axis=0) / 3.06
