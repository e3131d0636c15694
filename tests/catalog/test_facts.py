"""The built-in facts: complete, sourced, plausible, quick to load."""

from __future__ import annotations

import subprocess
import sys

import pytest

from moeplan.planner.catalog import (
    catalog_digest,
    facts_digest,
    gpu_rows,
    load_catalog,
    machine_rows,
    model_rows,
    offer_rows,
    source_rows,
)
from moeplan.planner.diagnostics import Span

WHERE = Span("spec.yaml", 1, 1)
CATALOG = load_catalog(None, WHERE)


@pytest.mark.parametrize("name", CATALOG.machines)
def test_machine_levels_run_from_fast_to_slow(name: str) -> None:
    machine = CATALOG.machines[name]
    names = [level.name for level in machine.levels]
    assert names == (["gpu", "dram", "disk"] if machine.gpus else ["dram", "disk"])
    assert machine.levels[0].up_bytes_per_s == 0.0
    for faster, slower in zip(machine.levels, machine.levels[1:], strict=False):
        assert 0 < slower.up_bytes_per_s <= faster.bytes_per_s
    assert (machine.gpu in CATALOG.gpus) == bool(machine.gpus)
    assert machine.peer_bytes_per_s > 0 or not machine.gpus


def test_every_source_named_is_cited() -> None:
    named = {s for m in CATALOG.machines.values() for s in m.source.split(", ")}
    named |= {s for g in CATALOG.gpus.values() for s in g.sources.values()}
    named |= {m.source for m in CATALOG.models.values()} | {o.source for o in CATALOG.offers}
    assert named <= set(CATALOG.sources)


def test_every_gpu_figure_has_a_source() -> None:
    for gpu in CATALOG.gpus.values():
        figures = {"memory_bytes", "memory_bytes_per_s", "host_link_bytes_per_s", "peer_bytes_per_s"}
        assert figures | {f"flops_per_s.{dtype}" for dtype in gpu.flops_per_s} <= set(gpu.sources)


def test_datasheet_rates() -> None:
    """T4: 65 TFLOP/s, 320 GB/s. L4: 121 (242 is the sparse figure), 300 GB/s. A100 80 GB: 2039 GB/s."""
    t4, l4 = CATALOG.gpus["T4"], CATALOG.gpus["L4"]
    assert (t4.flops_per_s["fp16"], t4.memory_bytes_per_s) == (65e12, 320e9)
    assert "bf16" not in t4.flops_per_s
    assert (l4.flops_per_s["bf16"], l4.memory_bytes_per_s) == (121e12, 300e9)
    assert CATALOG.gpus["A100-80GB"].memory_bytes_per_s == 2039e9


def test_cheap_gpus_are_power_limited_in_prefill() -> None:
    """Helix profiles: T4 and L4 reach about 0.42 of their peak, A100 about 0.72."""
    shares = {name: CATALOG.gpus[name].prefill_efficiency for name in ("T4", "L4", "A100")}
    assert shares == {"T4": 0.42, "L4": 0.42, "A100": 0.72}


def test_paper_host() -> None:
    """MoE-Lightning, section 5.1: a 24-core host with 192 GB; 0.8 TFLOP/s and 100 GB/s in its optimiser."""
    machine = CATALOG.machines["n1-custom-48-196608+1xT4"]
    dram = machine.level("dram")
    assert (machine.cpu_cores, dram.bytes) == (24, 192 * 2**30)
    assert dram.flops_per_s["float32"] == pytest.approx(0.8e12, rel=0.02)
    assert dram.bytes_per_s == pytest.approx(100e9, rel=0.01)


def test_a_vcpu_is_half_a_core_unless_the_host_has_one_thread_per_core() -> None:
    assert CATALOG.machines["g4dn.8xlarge"].cpu_cores == 16
    assert CATALOG.machines["Standard_NC64as_T4_v3"].cpu_cores == 64


def test_the_board_of_a_machine_may_differ_from_the_gpu() -> None:
    """Azure's NC A100 has the PCIe board, 1935 GB/s."""
    assert CATALOG.machines["Standard_NC24ads_A100_v4"].level("gpu").bytes_per_s == 1935e9


def test_measured_machine_reaches_its_rates() -> None:
    machine = CATALOG.machines["cpu-2core"]
    assert machine.provenance == "measured"
    assert {level.memory_efficiency for level in machine.levels} == {1.0}
    assert machine.level("dram").flops_per_s == {"bf16": 1.45e11, "float32": 2.0e11}


def test_offers() -> None:
    """Sorted, one price per machine and region, spot below on-demand, machines known."""
    keys = [(o.cloud, o.region, o.machine) for o in CATALOG.offers]
    assert keys == sorted(set(keys))
    assert len(keys) > 800
    assert {o.machine for o in CATALOG.offers} <= set(CATALOG.machines)
    assert {o.cloud for o in CATALOG.offers} == {"aws", "azure", "gcp"}
    for offer in CATALOG.offers:
        assert offer.spot_usd_per_hour is None or 0 < offer.spot_usd_per_hour < offer.on_demand_usd_per_hour


def test_everything_is_sorted() -> None:
    for names in (CATALOG.models, CATALOG.gpus, CATALOG.machines, CATALOG.sources):
        assert list(names) == sorted(names)


def test_listings_are_tables_of_text() -> None:
    for rows in (f(CATALOG) for f in (model_rows, gpu_rows, machine_rows, offer_rows, source_rows)):
        assert len({len(row) for row in rows}) == 1
        assert len(rows) > 10
        assert all(isinstance(cell, str) and cell for row in rows for cell in row)


def test_digest_follows_the_facts() -> None:
    machine, other = CATALOG.machines["cpu-2core"], CATALOG.machines["g4dn.xlarge"]
    assert catalog_digest(CATALOG) == catalog_digest(load_catalog(None, WHERE))
    assert facts_digest(machine, other) == facts_digest(other, machine) != facts_digest(machine)
    assert len(facts_digest(machine)) == 64


def test_loading_is_light() -> None:
    """It imports no heavy package."""
    code = """
import sys
from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
load_catalog(None, Span("x")).models["mixtral-8x7b"]
print(*{"torch", "numpy", "pandas", "numba", "pulp"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
