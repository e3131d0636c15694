"""The placement pass: regions under the price caps, a spot replica to spare, no promise without evidence."""

from __future__ import annotations

from collections.abc import Callable

from conftest import ONLINE, batch_spec

from moeplan.planner.ir.plan import Plan

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
