"""SkyPilot files: parsed back, and held to the traps that its schema and autoscaler set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from conftest import ONLINE, batch_spec

from moeplan.codegen.emit import skypilot
from moeplan.planner.ir.plan import Plan

Compile = Callable[[str], Plan]
SPOT = ONLINE + "market: {clouds: [gcp], purchase: spot}\n"
ON_DEMAND = ONLINE + "market: {clouds: [aws], purchase: on-demand}\n"


def emitted(plan: Plan) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in skypilot.emit(plan).values()]


def test_spot_service(compile_text: Compile) -> None:
    plan = compile_text(SPOT)
    (service,) = emitted(plan)
    (site,) = plan.placement.sites
    policy = service["service"]["replica_policy"]
    assert policy["min_replicas"] == site.replicas
    assert policy["num_overprovision"] == 1
    assert policy["dynamic_ondemand_fallback"] is True
    assert policy["spot_placer"] == "dynamic_fallback"
    assert service["resources"]["use_spot"] is True
    infra = [entry["infra"] for entry in service["resources"]["any_of"]]
    assert infra == [f"{zone.cloud}/{zone.region}" for zone in site.zones]
    assert len(infra) > 1


def test_target_qps_is_a_number(compile_text: Compile) -> None:
    """A mapping beside on-demand fallback passes every check and crashes the autoscaler."""
    (service,) = emitted(compile_text(SPOT))
    qps = service["service"]["replica_policy"]["target_qps_per_replica"]
    assert isinstance(qps, float)
    assert qps > 0


def test_target_qps_of_all_replicas_is_the_rate(compile_text: Compile) -> None:
    plan = compile_text(SPOT.replace("rate: 8/s", "rate: 80/s"))
    total = sum(
        service["service"]["replica_policy"]["target_qps_per_replica"] * site.replicas
        for service, site in zip(emitted(plan), plan.placement.sites, strict=True)
    )
    assert total == pytest.approx(80.0, rel=1e-3)


def test_on_demand_service_has_no_spot_keys(compile_text: Compile) -> None:
    """Fallback or a placer without use_spot is rejected."""
    for service in emitted(compile_text(ON_DEMAND)):
        assert service["resources"]["use_spot"] is False
        assert not service["service"]["replica_policy"].keys() & {
            "spot_placer",
            "dynamic_ondemand_fallback",
            "base_ondemand_fallback_replicas",
            "num_overprovision",
        }


def test_readiness_outlasts_the_cold_start(compile_text: Compile) -> None:
    plan = compile_text(SPOT)
    (service,) = emitted(plan)
    delay = service["service"]["readiness_probe"]["initial_delay_seconds"]
    assert delay >= 1.5 * plan.placement.sites[0].cold_start_s


def test_one_accelerator_per_file(compile_text: Compile) -> None:
    """The placer refuses mixtures: each file names one GPU type and count, as the machine has them."""
    plan = compile_text(SPOT)
    for service, choice in zip(emitted(plan), plan.fleet.choices, strict=True):
        machine = choice.column.policy.machine
        assert service["resources"]["accelerators"] == f"{machine.gpu}:{machine.gpus}"


def test_batch_on_rented_machines_is_a_job(compile_text: Compile) -> None:
    text = batch_spec(more=", deadline: 8h").replace("2000", "100000")
    for job in emitted(compile_text(text)):
        assert "service" not in job
        assert "run-batch" in job["run"]


@pytest.mark.parametrize("machine", ["g4dn.16xlarge"])
def test_nothing_is_emitted_that_cannot_run(compile_text: Compile, machine: str) -> None:
    """Owned machines need no SkyPilot, and offloaded GPU replicas have no runtime yet."""
    assert skypilot.emit(compile_text(batch_spec(machine=machine))) == {}
