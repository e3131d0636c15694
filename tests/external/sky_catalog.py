"""Our offers in the layout of SkyPilot's catalog (v8), for its offline checks.

Zones are invented: three in each region. Azure has none in SkyPilot. On GCP SkyPilot adds up the prices of a
machine and of its GPUs, so each price is split.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moeplan.planner.catalog import Catalog
from moeplan.planner.ir.machine import Machine, Offer

CLOUD_NAMES = {"aws": "AWS", "gcp": "GCP", "azure": "Azure"}
# What SkyPilot calls them; written down here apart from the emitter, which must find the same names.
GPU_NAMES = {"H100-NVL": "H100"}
_COLUMNS = ("InstanceType", "AcceleratorName", "AcceleratorCount", "vCPUs", "MemoryGiB", "GpuInfo")
_COLUMNS += ("Price", "SpotPrice", "Region", "AvailabilityZone")
_Row = Sequence[object]


def zones(cloud: str, region: str) -> list[str]:
    """The zones that the catalog has of a region."""
    if cloud == "azure":
        return [""]
    return [f"{region}{'-' if cloud == 'gcp' else ''}{letter}" for letter in "abc"]


def write_catalog(folder: Path, catalog: Catalog) -> None:
    """Write aws/, gcp/, azure/ and common/ under `folder`."""
    for cloud in CLOUD_NAMES:
        offers = [offer for offer in catalog.offers if offer.cloud == cloud]
        rows = _gcp_rows(offers, catalog.machines) if cloud == "gcp" else _rows(offers, catalog.machines)
        columns = _COLUMNS[:-1] if cloud == "azure" else _COLUMNS
        _write(folder / cloud / "vms.csv", columns, (row[: len(columns)] for row in rows))
        _write(folder / cloud / "images.csv", ("Tag", "Region", "OS", "ImageId"), _images(cloud, offers))
    codes = ("OnDemandInstanceCode", "SpotInstanceCode")
    _write(folder / "aws" / "instance_quota_mapping.csv", ("InstanceType", *codes), ())
    _write(folder / "gcp" / "accelerator_quota_mapping.csv", ("Accelerator", "Region", *codes), ())
    _write(folder / "common" / "accelerators.csv", ("AcceleratorName", "Clouds"), _accelerators(catalog))


def _rows(offers: Iterable[Offer], machines: Mapping[str, Machine]) -> Iterable[_Row]:
    """A row per machine type and zone, later zones a little dearer on the spot market."""
    for offer in offers:
        machine = machines[offer.machine]
        prices = offer.on_demand_usd_per_hour, offer.spot_usd_per_hour
        for number, zone in enumerate(zones(offer.cloud, offer.region)):
            what = machine.name, _gpu(machine), machine.gpus, *_host(machine), ""
            yield (*what, *_dearer(prices, number), offer.region, zone)


def _gcp_rows(offers: Sequence[Offer], machines: Mapping[str, Machine]) -> Iterable[_Row]:
    """Half of the cheapest machine's price is the GPUs', the rest the machine's own."""
    gpus: dict[tuple[str, int, str], list[Offer]] = defaultdict(list)
    for offer in offers:
        machine = machines[offer.machine]
        gpus[_gpu(machine), machine.gpus, offer.region].append(offer)
    for (gpu, count, region), same in sorted(gpus.items()):
        on_demand = min(offer.on_demand_usd_per_hour for offer in same) / 2
        spot = min((o.spot_usd_per_hour for o in same if o.spot_usd_per_hour is not None), default=0.0) / 2
        for zone in zones("gcp", region):
            yield "", gpu, count, "", "", "", on_demand, spot or "", region, zone
        for offer in same:
            host = offer.machine.partition("+")[0], "", "", *_host(machines[offer.machine]), ""
            rest = offer.on_demand_usd_per_hour - on_demand, (offer.spot_usd_per_hour or 0.0) - spot
            for number, zone in enumerate(zones("gcp", region)):
                yield (*host, *_dearer(rest, number), region, zone)


def _dearer(prices: tuple[float, float | None], number: int) -> tuple[float, float | str]:
    on_demand, spot = prices
    return on_demand, "" if spot is None else round(spot * (1 + number / 100), 6)


def _gpu(machine: Machine) -> str:
    return GPU_NAMES.get(machine.gpu, machine.gpu)


def _host(machine: Machine) -> tuple[float, float]:
    return machine.cpu_cores * 2, machine.level("dram").bytes / 2**30


def _images(cloud: str, offers: Iterable[Offer]) -> Iterable[_Row]:
    """Placeholders for the images that SkyPilot would start machines from."""
    regions = [""] if cloud == "gcp" else sorted({offer.region for offer in offers})
    tags = {"gcp": ["gpu-ubuntu-2204", "cpu-ubuntu-2204"], "azure": ["gpu-ubuntu-v2", "cpu-ubuntu-v2"]}
    for region in regions:
        for tag in tags.get(cloud, ["gpu-ubuntu", "cpu-ubuntu"]):
            yield f"skypilot:custom-{tag}", region, "ubuntu", "image"


def _accelerators(catalog: Catalog) -> Iterable[_Row]:
    clouds: dict[str, set[str]] = defaultdict(set)
    for offer in catalog.offers:
        clouds[_gpu(catalog.machines[offer.machine])].add(CLOUD_NAMES[offer.cloud])
    return [(name, str(sorted(names))) for name, names in sorted(clouds.items())]


def _write(path: Path, header: _Row, rows: Iterable[_Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
