"""Facts as data, a source beside each: models, GPUs, machines, offers."""

from moeplan.planner.catalog.load import Catalog, load_catalog, load_machine
from moeplan.planner.catalog.machines import Gpu

__all__ = ["Catalog", "Gpu", "load_catalog", "load_machine"]
