"""The attainment pass: fleets that keep their SLO in simulation, as cheap as exhaustive search finds them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import attainment
import numpy as np
import pytest
from conftest import ONLINE, batch_spec

from moeplan.codegen.emit import emit_all
from moeplan.planner.diagnostics import InfeasibleError
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy
from moeplan.planner.passes.attainment import margin_of
from moeplan.planner.pipeline import compile_plan
from moeplan.planner.spec import parse_spec
from moeplan.planner.verify import VerificationError, verify_attainment

DATA = Path(os.environ.get("MOEPLAN_ACCURACY_DATA", "no such folder")) / "traces"
MARKET = "market: {clouds: [gcp], gpus: [A100-80GB, H100], purchase: on-demand}\n"
TRACE = """\
name: chat
model: qwen3-30b-a3b
workload:
  online:
    trace: t.csv
    rate: 10/s
    slo: {{ttft: {ttft}, itl: 100ms, attainment: 99%}}
""" + MARKET.replace("{", "{{").replace("}", "}}")


def bursty(folder: Path, burst: int, ttft: str = "1s") -> Path:
    """A spec whose requests come in bursts of so many at once, 10 a second on average."""
    rows = [f"{n // burst * burst / 10},{500 + n % 700},{20 + n % 90}" for n in range(6000)]
    (folder / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    spec = folder / "spec.yaml"
    spec.write_text(TRACE.format(ttft=ttft))
    return spec


def compiled(spec: Path) -> Plan:
    return compile_plan(spec.read_bytes(), str(spec))


def test_what_the_plan_says_is_what_it_was_chosen_for(compile_text: Callable[[str], Plan]) -> None:
    plan = compile_text(ONLINE + MARKET)
    (found,) = plan.attainment.classes
    assert (found.arrivals, found.requests, found.wanted_share) == ("gamma", 20_000, 0.99)
    assert found.bears_surge
    assert found.surge.attained_share >= 0.99
    assert found.planned.attained_share >= found.surge.attained_share
    assert found.usd_per_hour == plan.fleet.usd_per_hour
    assert [pool.column for pool in plan.attainment.pools] == [c.column.name for c in plan.fleet.choices]
    assert found.margin == pytest.approx(0.15 + 1.0)


def test_bursts_need_more_than_their_mean_rate(tmp_path: Path) -> None:
    """The same requests a second: one by one the first fleet does; in bursts more engines are needed, and
    the plan says what went before."""
    even = compiled(bursty(tmp_path, 1))
    (found,) = even.attainment.classes
    burst = compiled(bursty(tmp_path, 200))
    (repaired,) = burst.attainment.classes
    assert repaired.fleets_tried > 1
    assert repaired.unsimulated_share < 0.99 <= repaired.surge.attained_share
    assert burst.fleet.usd_per_hour > repaired.unsimulated_usd_per_hour
    assert burst.fleet.usd_per_hour > even.fleet.usd_per_hour
    assert min(pool.capacity_share for pool in burst.attainment.pools) < min(
        pool.capacity_share for pool in even.attainment.pools
    )
    assert found.arrivals == "trace"


def test_what_no_fleet_attains_is_infeasible(tmp_path: Path) -> None:
    """Two thousand requests at once, and one machine: the answer says how far from it the best is."""
    spec = bursty(tmp_path, 2000)
    spec.write_text(spec.read_text().replace(MARKET, "machine: a2-ultragpu-1g\n"))
    with pytest.raises(InfeasibleError, match=r"no fleet keeps the SLO for 99 % of the requests") as caught:
        compiled(spec)
    text = str(caught.value)
    assert "slo-missed" in text
    assert "spec.yaml:7:" in text
    assert "attainment: " not in text  # no spec may ask for so little


def test_the_hint_can_be_kept(tmp_path: Path) -> None:
    spec = bursty(tmp_path, 600, "20s")
    spec.write_text(spec.read_text().replace(MARKET, "machine: a2-ultragpu-1g\n"))
    with pytest.raises(InfeasibleError) as caught:
        compiled(spec)
    share = caught.value.diagnostics[0].hint.split("attainment: ")[1].split(",")[0]
    spec.write_text(spec.read_text().replace("attainment: 99%", f"attainment: {share}"))
    (found,) = compiled(spec).attainment.classes
    assert found.planned.attained_share >= found.wanted_share


def test_a_plan_that_bears_no_surge_says_so(tmp_path: Path) -> None:
    """One machine and a TTFT between those of the planned rate and of the surge: planned, with a warning."""
    spec = bursty(tmp_path, 20, "30s")
    arrival = np.cumsum(np.random.RandomState(3).gamma(1 / 16, 16 / 10, 6000))
    rows = [f"{at},{500 + n % 700},{20 + n % 90}" for n, at in enumerate(arrival)]
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows))
    text = spec.read_text().replace(MARKET, "machine: a2-ultragpu-1g\n").replace("itl: 100ms", "itl: 500ms")
    spec.write_text(text)
    (easy,) = compiled(spec).attainment.classes
    assert easy.bears_surge
    between = (easy.planned.ttft.p99_s + easy.surge.ttft.p99_s) / 2
    spec.write_text(text.replace("ttft: 30s", f"ttft: {between:.3f}s"))
    plan = compiled(spec)
    (found,) = plan.attainment.classes
    assert not found.bears_surge
    assert found.surge.attained_share < 0.99 <= found.planned.attained_share
    assert "**No fleet that can be had attains it in the surge.**" in emit_all(plan)["report.md"]


def test_batch_work_is_not_simulated(compile_text: Callable[[str], Plan]) -> None:
    plan = compile_text(batch_spec("cpu-2core", "olmoe-1b-7b"))
    assert plan.attainment.classes == ()
    assert plan.attainment.pools == ()


def test_the_margin_is_a_standard_error_but_not_too_much(compile_text: Callable[[str], Plan]) -> None:
    policy: Policy = compile_text(ONLINE + MARKET).fleet.choices[0].column.policy
    sigmas = (0.0, 0.05, 0.10, 0.25)
    margins = [
        margin_of(replace(policy, generated_tokens_per_s=replace(policy.generated_tokens_per_s, sigma=sigma)))
        for sigma in sigmas
    ]
    assert margins == pytest.approx([1.0, np.exp(0.05), np.exp(0.10), 1.15])


def test_spares_do_not_serve(compile_text: Callable[[str], Plan]) -> None:
    plan = compile_text(ONLINE + MARKET.replace("on-demand", "spot"))
    for choice, pool in zip(plan.fleet.choices, plan.attainment.pools, strict=True):
        assert pool.engines == (choice.replicas - 1) * choice.column.policy.data_parallel


def test_a_plan_that_misses_is_a_bug(compile_text: Callable[[str], Plan]) -> None:
    plan = compile_text(ONLINE + MARKET)
    (found,) = plan.attainment.classes
    missed = replace(found, surge=replace(found.surge, attained_share=0.9))
    with pytest.raises(VerificationError, match="SLO is attained"):
        verify_attainment(plan.fleet, replace(plan.attainment, classes=(missed,)))


def ratio(case: attainment.Case) -> float:
    return case.fleet.usd_per_hour / attainment.cheapest(case, surge=True)[0]


@pytest.mark.parametrize("burst", [1, 60])
def test_near_the_cheapest_that_attains(tmp_path: Path, burst: int) -> None:
    """Every mix of three columns up to the plan's cost is simulated: none that attains is much cheaper."""
    spec = bursty(tmp_path, burst)
    parsed = parse_spec(spec.read_bytes(), str(spec))
    case = attainment.fleet_of(parsed, load_inputs(parsed))
    assert 1.0 <= ratio(case) <= 1.15


@pytest.mark.skipif(not DATA.is_dir(), reason="needs MOEPLAN_ACCURACY_DATA")
@pytest.mark.parametrize("name", sorted(attainment.CASES))
def test_public_traces(name: str) -> None:
    """At their own rates, Azure's and Mooncake's traces attain, within 15 % of the cheapest that does."""
    model, slo, rates = attainment.CASES[name]
    case = attainment.compiled(DATA / f"{name}.csv.gz", model, slo, rates[0])
    assert case.found.surge.attained_share >= 0.99
    assert 1.0 <= ratio(case) <= 1.15
