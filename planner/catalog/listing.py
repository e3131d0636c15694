"""Catalog -> rows of text, for `moeplan catalog models|gpus|machines|offers`, and its digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from moeplan.planner.catalog.load import Catalog
from moeplan.planner.ir.machine import Level, Machine, Offer
from moeplan.planner.ir.model import Model

Row = tuple[str, ...]


def model_rows(catalog: Catalog) -> tuple[Row, ...]:
    """A header and one row per model."""
    header = ("model", "type", "parameters", "active", "layers", "experts", "weights GB", "context", "source")
    return (header, *(_model(name, model) for name, model in catalog.models.items()))


def _model(name: str, model: Model) -> Row:
    experts = f"{model.experts_per_token}/{model.experts}" if model.experts else "-"
    return (
        name,
        model.model_type,
        f"{model.parameters.total() / 1e9:.2f} B",
        f"{model.active_parameters() / 1e9:.2f} B",
        str(model.layers),
        experts,
        f"{model.weight_bytes() / 1e9:.1f}",
        str(model.max_context_tokens),
        model.source,
    )


def gpu_rows(catalog: Catalog) -> tuple[Row, ...]:
    """A header and one row per GPU."""
    header = (
        "gpu",
        "memory GB",
        "memory GB/s",
        "fp16 TFLOP/s",
        "float32",
        "link GB/s",
        "peer GB/s",
        "prefill",
    )
    rows = (
        (
            gpu.name,
            f"{gpu.memory_bytes / 1e9:.1f}",
            f"{gpu.memory_bytes_per_s / 1e9:.0f}",
            _tera(gpu.flops_per_s, "fp16"),
            _tera(gpu.flops_per_s, "float32"),
            f"{gpu.host_link_bytes_per_s / 1e9:.1f}",
            f"{gpu.peer_bytes_per_s / 1e9:.1f}",
            f"{gpu.prefill_efficiency:.0%}",
        )
        for gpu in catalog.gpus.values()
    )
    return (header, *rows)


def machine_rows(catalog: Catalog) -> tuple[Row, ...]:
    """A header and one row per machine type."""
    header = (
        "machine",
        "gpus",
        "cores",
        "RAM GiB",
        "RAM GB/s",
        "CPU TFLOP/s",
        "disk GB",
        "disk GB/s",
        "from",
    )
    return (header, *(_machine(machine) for machine in catalog.machines.values()))


def _machine(machine: Machine) -> Row:
    dram, disk = machine.level("dram"), machine.level("disk")
    return (
        machine.name,
        f"{machine.gpus} x {machine.gpu}" if machine.gpus else "-",
        f"{machine.cpu_cores:g}",
        f"{dram.bytes / 2**30:.0f}",
        _giga(dram),
        _tera(dram.flops_per_s, "float32"),
        f"{disk.bytes / 1e9:.0f}",
        _giga(disk),
        machine.provenance,
    )


def offer_rows(catalog: Catalog) -> tuple[Row, ...]:
    """A header and one row per offer."""
    header = ("cloud", "region", "machine", "gpus", "on demand $/h", "spot $/h", "date", "source")
    return (header, *(_offer(offer, catalog.machines[offer.machine]) for offer in catalog.offers))


def _offer(offer: Offer, machine: Machine) -> Row:
    return (
        offer.cloud,
        offer.region,
        offer.machine,
        f"{machine.gpus} x {machine.gpu}" if machine.gpus else "-",
        f"{offer.on_demand_usd_per_hour:.4f}",
        "-" if offer.spot_usd_per_hour is None else f"{offer.spot_usd_per_hour:.4f}",
        offer.date,
        offer.source,
    )


def source_rows(catalog: Catalog) -> tuple[Row, ...]:
    """A header and one row per source."""
    return (("source", "citation"), *catalog.sources.items())


def _giga(level: Level) -> str:
    return f"{level.bytes_per_s / 1e9:.1f}"


def _tera(flops_per_s: Mapping[str, float], dtype: str) -> str:
    return f"{flops_per_s[dtype] / 1e12:.3g}" if dtype in flops_per_s else "-"


def catalog_digest(catalog: Catalog) -> str:
    """SHA-256 of every fact in the catalog: equal catalogs, equal digests, on any machine."""
    return facts_digest(*catalog.models.values(), *catalog.machines.values(), *catalog.offers)


def facts_digest(*facts: Model | Machine | Offer) -> str:
    """SHA-256 of some facts, such as those one plan was made from.

    Their order does not matter, nor when and where a price was read.
    """
    told = (json.dumps(_told(fact), sort_keys=True, default=_values) for fact in facts)
    lines = sorted(f"{type(fact).__name__} {text}" for fact, text in zip(facts, told, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _told(fact: Model | Machine | Offer) -> dict[str, object]:
    unsaid = ("date", "source") if isinstance(fact, Offer) else ()
    return {name: value for name, value in _values(fact).items() if name not in unsaid}


def _values(record: Any) -> dict[str, object]:
    """The fields of a record, for JSON."""
    return {field.name: getattr(record, field.name) for field in fields(record)}
