"""Facts as data, a source beside each: models, GPUs, machines, offers."""

from moeplan.planner.catalog.listing import (
    catalog_digest,
    facts_digest,
    gpu_rows,
    machine_rows,
    model_rows,
    offer_rows,
    source_rows,
)
from moeplan.planner.catalog.load import Catalog, load_catalog, load_machine
from moeplan.planner.catalog.machines import Gpu
from moeplan.planner.catalog.offers import OFFERS_FILE, read_offers, write_offers
from moeplan.planner.catalog.skypilot import SkypilotPrices, import_skypilot
from moeplan.planner.catalog.update import Update, update_offers

__all__ = [
    "OFFERS_FILE",
    "Catalog",
    "Gpu",
    "SkypilotPrices",
    "Update",
    "catalog_digest",
    "facts_digest",
    "gpu_rows",
    "import_skypilot",
    "load_catalog",
    "load_machine",
    "machine_rows",
    "model_rows",
    "offer_rows",
    "read_offers",
    "source_rows",
    "update_offers",
    "write_offers",
]
