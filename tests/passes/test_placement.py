"""The placement pass: what a trace, bands of interruptions, or neither make of a spot site."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ONLINE, batch_spec

from moeplan.planner.cold_start import cold_start
from moeplan.planner.diagnostics import CompileError, InfeasibleError
from moeplan.planner.ir.plan import Plan
from moeplan.planner.pipeline import compile_plan

Compile = Callable[[str], Plan]


def test_spot_service_is_spread_under_the_caps(compile_text: Compile) -> None:
    plan = compile_text(ONLINE + "market: {clouds: [gcp], purchase: spot}\n")
    for site in plan.placement.sites:
        prices = [zone.usd_per_hour for zone in site.zones]
        assert 1 < len(prices) <= 5
        assert prices == sorted(prices)
        for zone in site.zones:
            assert zone.usd_per_hour <= max(1.5 * prices[0], 0.4 * zone.on_demand_usd_per_hour)
        assert (site.spot_overprovision, site.on_demand_fallback) == (1, True)


def test_on_demand_takes_the_cheapest_region(compile_text: Compile) -> None:
    plan = compile_text(ONLINE + "market: {clouds: [gcp], purchase: on-demand}\n")
    for site in plan.placement.sites:
        assert len(site.zones) == 1
        assert (site.spot_overprovision, site.on_demand_fallback) == (0, False)


def test_regions_of_the_spec_are_kept(compile_text: Compile) -> None:
    plan = compile_text(ONLINE + "market: {regions: [aws/us-west-2, gcp/us-central1]}\n")
    for site in plan.placement.sites:
        assert {f"{zone.cloud}/{zone.region}" for zone in site.zones} <= {"aws/us-west-2", "gcp/us-central1"}


def test_batch_spot_needs_no_spare_replica(compile_text: Compile) -> None:
    text = batch_spec(more=", deadline: 8h").replace("2000", "100000") + "market: {purchase: spot}\n"
    for site in compile_text(text).placement.sites:
        assert (site.spot_overprovision, site.on_demand_fallback) == (0, False)


def test_owned_machines_have_no_region(compile_text: Compile) -> None:
    (site,) = compile_text(batch_spec(machine="g4dn.16xlarge")).placement.sites
    assert (site.market, site.zones) == ("owned", ())


def test_nothing_is_promised_without_evidence(compile_text: Compile) -> None:
    placement = compile_text(ONLINE + "market: {purchase: spot}\n").placement
    assert placement.evidence == "none"
    assert "none is promised" in placement.statement


def test_cold_start_grows_with_the_weights(compile_text: Compile) -> None:
    """GPU-days of weights travel over the network: 263 GB take minutes longer than 61 GB."""
    small = compile_text(ONLINE).placement.sites[0].cold_start_s
    large = compile_text(ONLINE.replace("qwen3-30b-a3b", "dbrx")).placement.sites[0].cold_start_s
    assert large - small > 300


SPOT = Path(__file__).parents[2] / "examples" / "qwen3-spot"


@pytest.fixture
def compile_spot(tmp_path: Path) -> Callable[..., Plan]:
    """Compile the example with a synthetic trace, some of its text replaced."""
    (tmp_path / "spot.csv").write_text((SPOT / "spot.csv").read_text())

    def compiled(*changes: tuple[str, str]) -> Plan:
        text = (SPOT / "spec.yaml").read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return compile_plan(text, str(tmp_path / "spec.yaml"))

    return compiled


def test_a_trace_decides_and_carries_a_promise(compile_spot: Callable[..., Plan]) -> None:
    placement = compile_spot().placement
    (site,) = placement.sites
    assert placement.evidence == site.evidence == "trace"
    assert {zone.zone for zone in site.zones} < {
        "us-central1-a",
        "us-central1-b",
        "us-east4-a",
        "us-west1-a",
        "europe-west4-b",
    }
    assert site.outlook is not None
    seen = site.outlook
    assert seen.availability.low < seen.availability.value < seen.availability.high <= 1
    assert seen.promised == 0.97
    assert (seen.span_s, seen.step_s) == (21 * 86400.0, 900.0)
    assert 0 < seen.clairvoyant_usd_per_hour < seen.usd_per_hour < seen.all_on_demand_usd_per_hour
    assert "97 % is promised: a trace of 21 d in steps of 15 min" in placement.statement


def test_less_than_two_weeks_promise_nothing(compile_spot: Callable[..., Plan], tmp_path: Path) -> None:
    lines = (SPOT / "spot.csv").read_text().splitlines()
    (tmp_path / "spot.csv").write_text("\n".join(lines[: 5 + 7 * 96]) + "\n")
    placement = compile_spot(("availability: 97%", "availability: 93%")).placement
    (site,) = placement.sites
    assert site.outlook is not None
    assert site.outlook.promised == 0.0
    assert "none is promised: a trace of 7 d" in placement.statement


@pytest.mark.parametrize(
    ("old", "new", "note"),
    [
        ("instance: L4", "instance: g2-standard-4 (L4)", "was taken with g2-standard-4 (L4), not with"),
        (r",[1-9]\d*", ",1", "whether a zone has a machine, not how many"),
    ],
)
def test_evidence_of_something_else_promises_nothing(
    compile_spot: Callable[..., Plan], tmp_path: Path, old: str, new: str, note: str
) -> None:
    header, rows = (SPOT / "spot.csv").read_text().split("step,")
    zones, _, values = rows.partition("\n")
    (tmp_path / "spot.csv").write_text(f"{re.sub(old, new, header)}step,{zones}\n{re.sub(old, new, values)}")
    (site,) = compile_spot().placement.sites
    assert site.outlook is not None
    assert site.outlook.promised == 0.0
    assert any(note in line and "no base for a promise" in line for line in site.notes)


def test_what_cannot_be_reached_says_what_can_and_for_how_much(compile_spot: Callable[..., Plan]) -> None:
    with pytest.raises(InfeasibleError) as caught:
        compile_spot(("availability: 97%", "availability: 99.99%"))
    text = str(caught.value)
    assert "spec.yaml:15:17: no spot placement of 3 replicas keeps 99.99 %" in text
    assert re.search(r"\d\d\.\d+ % for \d+\.\d\d USD/h can be reached", text)
    assert re.search(r"3 on-demand machines cost \d+\.\d\d USD/h", text)


def test_an_availability_that_nobody_asked_for_is_no_error(compile_spot: Callable[..., Plan]) -> None:
    """99 % is the default: where it cannot be kept, the plan comes as close as it can and says so."""
    plan = compile_spot(("  availability: 97%\n", ""))
    (site,) = plan.placement.sites
    assert site.outlook is not None
    assert site.outlook.promised in (0.0, 0.99)
    assert "99 % is wanted" in plan.placement.statement


def test_spread_survives_any_region(compile_spot: Callable[..., Plan]) -> None:
    for share in (0.34, 0.5):
        (site,) = compile_spot(("floor: 50%", f"floor: {share}")).placement.sites
        on_spot = site.replicas + site.spot_overprovision - site.on_demand_base
        zones = sorted(site.zones, key=lambda zone: zone.usd_per_hour)
        held = [1 if n < on_spot else 0 for n in range(len(zones))]
        held[0] += max(0, on_spot - len(zones))
        for region in {zone.region for zone in zones}:
            lost = sum(n for n, zone in zip(held, zones, strict=True) if zone.region == region)
            fixed = sum(z.spot_target + z.on_demand_target for z in zones if z.region != region)
            assert on_spot - lost >= math.ceil(share * site.replicas)
            assert fixed >= math.ceil(share * site.replicas)


def test_spread_that_no_zone_list_has(compile_spot: Callable[..., Plan]) -> None:
    with pytest.raises(InfeasibleError, match="after the loss of a cloud"):
        compile_spot(("over: region", "over: cloud"))


def test_the_quota_binds_spares(compile_spot: Callable[..., Plan]) -> None:
    plan = compile_spot(("  spread:", "  quota: {L4: 16}\n  spread:"))
    (site,) = plan.placement.sites
    gpus = plan.fleet.choices[0].column.policy.machine.gpus
    assert (site.replicas + site.spot_overprovision) * gpus <= 16


def test_a_trace_of_another_gpu_is_no_evidence(compile_spot: Callable[..., Plan], tmp_path: Path) -> None:
    text = (SPOT / "spot.csv").read_text().replace("instance: L4", "instance: a3-highgpu-8g (H100)")
    (tmp_path / "spot.csv").write_text(text)
    placement = compile_spot().placement
    assert (placement.evidence, placement.sites[0].outlook) == ("none", None)
    assert "has no zone that sells" in placement.sites[0].notes[0]


def test_prices_are_of_regions_that_the_trace_knows(compile_spot: Callable[..., Plan]) -> None:
    plan = compile_spot()
    cheapest = min(zone.usd_per_hour for zone in plan.placement.sites[0].zones)
    assert plan.fleet.choices[0].column.usd_per_hour == cheapest


BANDS = """\
# of a made-up month
cloud,region,instance,interruption
gcp,us-east4,g2-standard-48,5-10%
gcp,us-central1,g2-standard-48,<5%
gcp,europe-west4,g2-standard-48,>20%
"""


def test_bands_give_a_wide_interval_and_no_promise(compile_spot: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "bands.csv").write_text(BANDS)
    bands = ("spot_trace: spot.csv", "interruptions: bands.csv")
    placement = compile_spot(bands, ("  spread: {over: region, floor: 50%}\n", "")).placement
    (site,) = placement.sites
    assert site.evidence == "statistics"
    assert site.outlook is not None
    assert site.outlook.promised == 0.0
    assert site.outlook.availability.high - site.outlook.availability.low > 0.005
    assert "none is promised: interruption bands" in placement.statement


def test_bad_bands(compile_spot: Callable[..., Plan], tmp_path: Path) -> None:
    text = BANDS.replace("5-10%", "often").replace("europe-west4", "europe-west99")
    (tmp_path / "bands.csv").write_text(text + "gcp,us-central1,g2-standard-48,<5%\n")
    with pytest.raises(CompileError) as caught:
        compile_spot(("spot_trace: spot.csv", "interruptions: bands.csv"))
    found = str(caught.value)
    assert "bands.csv:3:1: 'often' is no band" in found
    assert "bands.csv:5:1: the catalog has no offer of 'g2-standard-48' in gcp europe-west99" in found
    assert "bands.csv:6:1: a second row of this machine" in found


def test_cold_start_waits_for_the_slower_of_network_and_disk(compile_text: Compile) -> None:
    plan = compile_text(ONLINE)
    machine = plan.fleet.choices[0].column.policy.machine
    slow = replace(machine, levels=(*machine.levels[:-1], replace(machine.levels[-1], bytes_per_s=1e8)))
    assert cold_start(plan.workload, slow).weights_s == plan.workload.model.weight_bytes() / 1e8
    assert cold_start(plan.workload, machine).weights_s == plan.workload.model.weight_bytes() / 0.5e9
