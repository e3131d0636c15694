"""The fleet pass: Mélange's example, brute force on small cases, limits, infeasibility in words."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from conftest import ONLINE, batch_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.codegen.emit import emit_all
from moeplan.planner.catalog import Catalog
from moeplan.planner.diagnostics import CompileError, InfeasibleError
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.fleet import Fleet
from moeplan.planner.ir.machine import Machine, Offer
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import BucketRate, Policy
from moeplan.planner.ir.spec import MarketSpec, Spec
from moeplan.planner.ir.workload import Bucket, Workload
from moeplan.planner.passes.fleet import choose_fleet
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.pipeline import compile_plan
from moeplan.planner.spec import parse_spec
from moeplan.planner.verify import verify_fleet

ON_DEMAND = MarketSpec(purchase="on-demand")


class Market:
    """Columns with given throughputs and prices, and a workload of given shares, made of real records."""

    def __init__(self, catalog: Catalog, rate_per_s: float, shares: list[float]) -> None:
        self.spec = parse_spec(ONLINE, "spec.yaml")
        workload = build_workload(self.spec, load_inputs(self.spec))
        buckets = tuple(
            Bucket(prompt_tokens=100.0 * (n + 1), output_tokens=100.0, share=s) for n, s in enumerate(shares)
        )
        requests = replace(workload.classes[0], buckets=buckets, rate_per_s=rate_per_s)
        self.workload: Workload = replace(workload, classes=(requests,))
        machine = catalog.machines["a2-ultragpu-1g"]
        policies, _ = find_policies(workload, find_roofline(workload, machine), None)
        self.template, self.machine = policies[0], machine
        self.policies: list[Policy] = []
        self.offers: list[Offer] = []

    def add(
        self, name: str, usd_per_hour: float, requests_per_s: list[float], spot: float | None = None
    ) -> None:
        machine: Machine = replace(self.machine, name=name, gpu=name)
        rates = tuple(
            BucketRate(
                bucket=n,
                requests_per_s=Estimate(value=t, sigma=0.1, provenance="measured"),
                batch=1,
                ttft_s=0.1,
                itl_s=0.05,
            )
            for n, t in enumerate(requests_per_s)
        )
        measured = replace(self.template.generated_tokens_per_s, provenance="measured")
        self.policies.append(
            replace(self.template, machine=machine, rates=rates, generated_tokens_per_s=measured)
        )
        self.offers.append(
            Offer(
                cloud="gcp",
                region="r",
                machine=name,
                on_demand_usd_per_hour=usd_per_hour,
                spot_usd_per_hour=spot,
                source="test",
                date="2026-01-01",
            )
        )

    def choose(self, market: MarketSpec = ON_DEMAND) -> Fleet:
        spec: Spec = replace(self.spec, market=market)
        fleet = choose_fleet(spec, self.workload, self.policies, (), self.offers)
        verify_fleet(spec, self.workload, fleet)
        return fleet


def melange(catalog: Catalog) -> Market:
    """The release's example input: 30 requests/s, four buckets, A10G and A100."""
    market = Market(catalog, 30.0, [0.2, 0.1, 0.5, 0.2])
    market.add("A10G", 1.01, [2, 1, 5, 2])
    market.add("A100", 3.67, [20, 20, 40, 20])
    return market


def test_melange_example_at_085(catalog: Catalog) -> None:
    """Fractional optimum at a target utilisation of 0.85 (that of measured figures): 3 A10G + 1 A100."""
    fleet = melange(catalog).choose()
    assert {c.column.policy.machine.name: c.replicas for c in fleet.choices} == {"A10G": 3, "A100": 1}
    assert fleet.usd_per_hour == pytest.approx(6.70)


def test_single_type_alternatives_are_priced(catalog: Catalog) -> None:
    """A100 alone: loads 1.125/0.85 -> 2 replicas; A10G alone: 12/0.85 -> 15 replicas."""
    costs = {a.column: a.cost_usd for a in melange(catalog).choose().alternatives}
    assert costs["online-a100-on-demand"] == pytest.approx(2 * 3.67)
    assert costs["online-a10g-on-demand"] == pytest.approx(15 * 1.01)


def brute_force(market: Market, target: float) -> float:
    """Cheapest replica counts for which the routing LP is feasible, tried one by one with two columns.

    With two columns the LP is a fractional knapsack: fill column A with the buckets that are relatively
    cheapest there, and see whether column B holds the rest.
    """
    rate = market.workload.classes[0].rate_per_s
    shares = [b.share for b in market.workload.classes[0].buckets]
    loads = [
        [rate * s / r.requests_per_s.value for s, r in zip(shares, policy.rates, strict=True)]
        for policy in market.policies
    ]
    prices = [offer.on_demand_usd_per_hour for offer in market.offers]
    best = math.inf
    for a, b in itertools.product(range(40), repeat=2):
        cost = a * prices[0] + b * prices[1]
        if cost < best and _holds(loads[0], loads[1], a * target, b * target):
            best = cost
    return best


def _holds(first: list[float], second: list[float], room_first: float, room_second: float) -> bool:
    order = sorted(range(len(first)), key=lambda n: first[n] / second[n])
    rest = 0.0
    for n in order:
        part = min(1.0, room_first / first[n])
        room_first -= part * first[n]
        rest += (1.0 - part) * second[n]
    return rest <= room_second + 1e-9


def test_equals_brute_force_on_small_cases(catalog: Catalog) -> None:
    draw = random.Random(1)
    for _ in range(25):
        weights = [draw.random() + 0.1 for _ in range(4)]
        market = Market(catalog, draw.uniform(1, 20), [w / sum(weights) for w in weights])
        market.add("a", draw.uniform(0.5, 2), [draw.uniform(1, 6) for _ in range(4)])
        market.add("b", draw.uniform(2, 5), [draw.uniform(4, 20) for _ in range(4)])
        assert market.choose().usd_per_hour == pytest.approx(brute_force(market, 0.85), abs=1e-4)


def test_spot_pays_for_the_replica_to_spare(catalog: Catalog) -> None:
    """One replica is needed. Spot at 60 % of on-demand needs two: dearer. At 40 %: cheaper."""
    for spot, expected in ((0.6, "on-demand"), (0.4, "spot")):
        market = Market(catalog, 1.0, [1.0])
        market.add("x", 1.0, [4.0], spot=spot)
        (choice,) = market.choose(MarketSpec()).choices
        assert choice.column.market == expected


def test_limits_say_what_would_be_enough(catalog: Catalog) -> None:
    """The hint's own figure compiles, and a little less does not."""
    quota = {"A100": 0, "A10G": 12}
    with pytest.raises(
        InfeasibleError, match=r"quota of A100 to 1, or raise the quota of A10G to 15"
    ) as caught:
        melange(catalog).choose(replace(ON_DEMAND, quota=quota))
    assert "market.quota" not in str(caught.value)
    for more in ({"A100": 0, "A10G": 15}, {"A100": 1, "A10G": 12}):
        melange(catalog).choose(replace(ON_DEMAND, quota=more))
    with pytest.raises(InfeasibleError):
        melange(catalog).choose(replace(ON_DEMAND, quota={"A100": 0, "A10G": 14}))
    with pytest.raises(InfeasibleError, match=r"raise the budget to \$6.70/h"):
        melange(catalog).choose(replace(ON_DEMAND, budget_usd_per_hour=6.69))
    melange(catalog).choose(replace(ON_DEMAND, budget_usd_per_hour=6.70))


def test_a_size_that_nothing_serves_is_named(catalog: Catalog) -> None:
    market = Market(catalog, 4.0, [0.5, 0.5])
    market.add("small", 0.1, [10.0, 0.0])
    with pytest.raises(InfeasibleError, match=r"requests of 200 \+ 100 tokens .50.0% of the online work"):
        market.choose()


def test_headroom_and_a_previous_plan(catalog: Catalog) -> None:
    """At 0.8/0.85 of the room two A100 are cheapest (7.34); from them on a move that saves 9 % of 7.34 pays,
    counted with the 5 % of each machine moved: three A10G, and one A100 less."""
    market = melange(catalog)

    def counts(**options: Any) -> dict[str, int]:
        spec = replace(market.spec, market=ON_DEMAND)
        fleet = choose_fleet(spec, market.workload, market.policies, (), market.offers, **options)
        return {c.column.policy.machine.name: c.replicas for c in fleet.choices}

    assert counts(headroom=0.8 / 0.85) == {"A100": 2}
    assert counts(previous={"online-a100-on-demand": 2}) == {"A10G": 3, "A100": 1}
    assert counts(previous={"online-a100-on-demand": 2}, headroom=0.8 / 0.85) == {"A100": 2}


def test_why_this_fleet(catalog: Catalog) -> None:
    """Best single type 2 A100 = 7.34; without A10G the same; A100 used at 0.85 of what it may."""
    fleet = melange(catalog).choose(replace(ON_DEMAND, budget_usd_per_hour=9.0))
    why = fleet.sensitivity
    assert why.single is not None
    assert why.single.cost == pytest.approx(7.34)
    assert why.runner_up is not None
    assert why.runner_up.cost == pytest.approx(7.34)
    assert [(c.constraint, c.saving) for c in why.constraints] == [("budget", 0.0)]
    assert fleet.cost == pytest.approx(fleet.cost_bound) == pytest.approx(6.70)


@pytest.mark.parametrize("gpu", ["A10G", "A100"])
def test_flips_are_where_they_are_said_to_be(catalog: Catalog, gpu: str) -> None:
    """Rates a little better than the factor keep the fleet, a little worse ones change it."""
    fleet = melange(catalog).choose()
    (slower,) = (f for f in fleet.sensitivity.flips if f.gpu == gpu and f.factor < 1)

    def chosen(factor: float) -> dict[str, int]:
        market = Market(catalog, 30.0, [0.2, 0.1, 0.5, 0.2])
        for name, usd, rates in (("A10G", 1.01, [2, 1, 5, 2]), ("A100", 3.67, [20, 20, 40, 20])):
            market.add(name, usd, [r * (factor if name == gpu else 1.0) for r in rates])
        return {c.column.name: c.replicas for c in market.choose().choices}

    here = {c.column.name: c.replicas for c in fleet.choices}
    assert chosen(slower.factor * 1.01) == here
    assert chosen(slower.factor * 0.99) != here


def test_quota_and_budget_bind(catalog: Catalog) -> None:
    assert all(
        c.column.policy.machine.name == "A10G"
        for c in melange(catalog).choose(replace(ON_DEMAND, quota={"A100": 0})).choices
    )
    with pytest.raises(InfeasibleError, match="the budget leaves no fleet"):
        melange(catalog).choose(replace(ON_DEMAND, budget_usd_per_hour=5.0))
    with pytest.raises(InfeasibleError, match="the GPU quota leaves no fleet"):
        melange(catalog).choose(replace(ON_DEMAND, quota={"A100": 0, "A10G": 14}))
    with pytest.raises(InfeasibleError, match="GPU quota and budget together"):
        melange(catalog).choose(replace(ON_DEMAND, quota={"A100": 0, "A10G": 3}, budget_usd_per_hour=3.0))


def test_a_bucket_that_a_column_cannot_serve_goes_elsewhere(catalog: Catalog) -> None:
    """A throughput of 0 forbids the pair; it is never a tiny number."""
    market = Market(catalog, 4.0, [0.5, 0.5])
    market.add("small", 0.1, [10.0, 0.0])
    market.add("large", 5.0, [10.0, 10.0])
    routes = {(r.bucket, r.column): r.share for r in market.choose().routes}
    assert routes.get((1, "online-large-on-demand")) == 1.0


def test_order_of_columns_does_not_matter(catalog: Catalog) -> None:
    market = melange(catalog)
    first = market.choose()
    market.policies.reverse()
    market.offers.reverse()
    assert market.choose() == first


@pytest.mark.parametrize("hours", [0.5, 1, 2, 8])
def test_batch_meets_its_deadline(hours: float) -> None:
    text = batch_spec(more=f", deadline: {hours}h").replace("2000", "200000")
    spec = parse_spec(text, "spec.yaml")
    inputs = load_inputs(spec)
    workload = build_workload(spec, inputs)
    offers = inputs.catalog.offers
    machines = [inputs.catalog.machines[n] for n in sorted({o.machine for o in offers})]
    found = [find_policies(workload, find_roofline(workload, m), None) for m in machines]
    policies = [p for accepted, _ in found for p in accepted]
    fleet = choose_fleet(spec, workload, policies, (), offers)
    verify_fleet(spec, workload, fleet)
    assert all(choice.hours <= hours for choice in fleet.choices)
    # No single column that meets the deadline, and that an engine executes, is cheaper than the fleet.
    bill = sum(choice.usd for choice in fleet.choices)
    able = [other for other in fleet.alternatives if "predicted only" not in other.note]
    assert all(other.cost_usd >= bill - 1e-3 for other in able)


@pytest.mark.parametrize(
    ("market", "deadline"), [("machine: g4dn.16xlarge", "10min"), ("market: {gpus: [H100]}", "5min")]
)
def test_the_deadline_hint_is_enough(compile_text: Callable[[str], Plan], market: str, deadline: str) -> None:
    """What the hint says is enough, compiles."""
    sizes = "requests: 5000, prompt: 700, output: 200"
    text = f"name: x\nmodel: mixtral-8x7b\nworkload: {{batch: {{{sizes}, deadline: TIME}}}}\n{market}\n"
    with pytest.raises(InfeasibleError, match="the deadline leaves no fleet") as caught:
        compile_text(text.replace("TIME", deadline))
    enough = re.search("hint: (.*) is enough for one machine", str(caught.value))
    assert enough is not None
    compile_text(text.replace("TIME", enough.group(1)))


# Regressions: small work, large work, three-way splits, long and short deadlines


@pytest.mark.parametrize(
    "text",
    [
        "batch: {requests: 10, prompt: 512, output: 128, deadline: 30d}",
        "batch: {requests: 1, prompt: 1, output: 1, deadline: 365d}",
        "batch: {requests: 3000000, prompt: 700, output: 200, deadline: 4h}",
        "online: {rate: 0.01/h, sizes: [{prompt: 100, output: 100}], slo: {ttft: 2s, itl: 100ms}}",
        "online: {rate: 300/s, sizes: [{prompt: 1500, output: 200}], slo: {ttft: 2s, itl: 50ms}}",
        "online: {rate: 1/h, sizes: [{prompt: 900, output: 200, share: 99.8%},"
        " {prompt: 90, output: 20, share: 0.2%}], slo: {ttft: 5s, itl: 100ms}}",
    ],
)
@pytest.mark.parametrize(
    "market", ["{}", "{purchase: on-demand}", "{gpus: [A100-80GB, H100, L40S, A100, A10G]}"]
)
def test_any_amount_of_work(compile_text: Callable[[str], Plan], text: str, market: str) -> None:
    compile_text(f"name: x\nmodel: mixtral-8x7b\nworkload: {{{text}}}\nmarket: {market}\n")


def test_three_way_split(compile_text: Callable[[str], Plan]) -> None:
    text = (
        "name: x\nmodel: mixtral-8x7b\n"
        "workload: {batch: {requests: 3000000, prompt: 700, output: 200, deadline: 4h}}\n"
        "market: {gpus: [A100-80GB, H100, L40S, A100, A10G],"
        " quota: {H100: 6, A100-80GB: 7, A100: 20, L40S: 12}}\n"
    )
    try:
        plan = compile_text(text)
    except InfeasibleError:
        return
    assert sum(route.share for route in plan.fleet.routes) == pytest.approx(1.0)


def test_quota_is_shared_by_both_classes(compile_text: Callable[[str], Plan]) -> None:
    text = (
        "name: x\nmodel: qwen3-30b-a3b\nworkload:\n"
        "  batch: {requests: 50000, prompt: 800, output: 300, deadline: 12h}\n"
        "  online: {rate: 10/s, sizes: [{prompt: 600, output: 200}], slo: {ttft: 2s, itl: 60ms}}\n"
        "market: {clouds: [gcp], gpus: [H100], quota: {H100: 3}}\n"
    )
    plan = compile_text(text)
    assert sum(c.replicas * c.column.policy.machine.gpus for c in plan.fleet.choices) <= 3


@given(st.integers(0, 2**32))
@settings(max_examples=15)
def test_random_specs_end_in_a_plan_or_an_answer(seed: int) -> None:
    """Models, sizes, rates, deadlines and markets at random: a verified plan, or diagnostics, never a bug."""
    draw = random.Random(seed)
    model = draw.choice(
        ["mixtral-8x7b", "olmoe-1b-7b", "gpt-oss-20b", "deepseek-v2-lite", "llama-3.1-8b", "dbrx"]
    )
    size = f"prompt: {draw.choice([1, 300, 3000])}, output: {draw.choice([1, 100, 900])}"
    count, deadline = draw.choice([1, 7, 10**4, 10**7]), draw.choice(["1h", "30d"])
    batch = f"batch: {{requests: {count}, {size}, deadline: {deadline}}}"
    rate = draw.choice(["0.01/h", "1/min", "9/s", "700/s"])
    online = (
        f"online: {{rate: {rate}, sizes: [{{{size}}}], slo: {{ttft: 3s, itl: {draw.choice([20, 200])}ms}}}}"
    )
    work = draw.choice([batch, online, f"{batch}, {online}"])
    gpus = draw.sample(["T4", "L4", "A10G", "L40S", "A100", "A100-80GB", "H100"], draw.randint(1, 6))
    quota = {gpu: draw.choice([0, 1, 8, 300]) for gpu in draw.sample(gpus, draw.randint(0, len(gpus)))}
    parts = [f"gpus: [{', '.join(gpus)}]", f"purchase: {draw.choice(['any', 'spot', 'on-demand'])}"]
    parts += [f"quota: {{{', '.join(f'{g}: {n}' for g, n in quota.items())}}}"] if quota else []
    parts += [f"budget: ${draw.choice([2, 40, 900])}/h"] if draw.random() < 0.3 else []
    text = f"name: x\nmodel: {model}\nworkload: {{{work}}}\nmarket: {{{', '.join(parts)}}}\n"
    with contextlib.suppress(CompileError):
        emit_all(compile_plan(text, "spec.yaml"))


BOTH = """\
name: x
model: qwen3-30b-a3b
workload:
  batch: {{requests: 20000, prompt: 800, output: 300, deadline: {deadline}}}
  online: {{rate: 10/s, sizes: [{{prompt: 600, output: 200}}], slo: {{ttft: 2s, itl: 60ms}}}}
market: {{clouds: [gcp], gpus: [H100, A100-80GB]{more}}}
"""


def test_batch_work_fills_idle_hours(compile_text: Callable[[str], Plan]) -> None:
    """With two days to go all of it fits what the online fleet leaves idle, and costs nothing more."""
    plan = compile_text(BOTH.format(deadline="2d", more=""))
    alone = compile_text(BOTH.format(deadline="2d", more="").replace("  batch", "  # batch"))
    assert plan.fleet.usd_per_hour == pytest.approx(alone.fleet.usd_per_hour)
    filled = [r for r in plan.fleet.routes if r.serves == "batch"]
    assert {r.column for r in filled} <= {c.column.name for c in alone.fleet.choices}
    choice = plan.fleet.choices[0]
    assert alone.fleet.choices[0].utilisation < choice.utilisation <= choice.target
    routing = json.loads(emit_all(plan)["routing.json"])
    assert routing["replicas"][0]["takes_batch_work_when_idle"]
    # Its longest request is now one of the batch, 800 + 300 tokens.
    service = next(text for path, text in emit_all(plan).items() if path.startswith("skypilot/"))
    assert "--max-model-len 1100 " in service
    assert "--scheduling-policy priority" in service


def test_hurried_batch_work_buys_machines(compile_text: Callable[[str], Plan]) -> None:
    """Whichever is cheaper: machines of its own, or more online replicas than the online work needs."""
    patient, hurried = (compile_text(BOTH.format(deadline=d, more="")) for d in ("2d", "20min"))
    assert hurried.fleet.usd_per_hour > patient.fleet.usd_per_hour
    assert all(c.hours <= 1 / 3 for c in hurried.fleet.choices if c.column.policy.serves == "batch")
    assert sum(r.share for r in hurried.fleet.routes if r.serves == "batch") == pytest.approx(1.0)


def test_floor_and_lost_regions(compile_text: Callable[[str], Plan]) -> None:
    more = ", on_demand_floor: 50%, survive: 40%"
    plan = compile_text(BOTH.format(deadline="2d", more=more))
    steady = {c.column.name for c in plan.fleet.choices if c.column.market == "on-demand"}
    online = [r for r in plan.fleet.routes if r.serves == "online"]
    assert sum(r.share for r in online if r.column in steady) >= 0.5 - 1e-3
    regions = {c.column.region for c in plan.fleet.choices if c.column.policy.serves == "online"}
    assert len(regions) > 1
    for choice, site in zip(plan.fleet.choices, plan.placement.sites, strict=True):
        if choice.column.region:
            assert [f"{z.cloud}/{z.region}" for z in site.zones] == [choice.column.region]
    assert {c.constraint for c in plan.fleet.sensitivity.constraints} == {"on_demand_floor", "survive"}
    with pytest.raises(InfeasibleError, match="the on-demand floor leaves no fleet"):
        compile_text(BOTH.format(deadline="2d", more=f", purchase: spot{more}"))
    with pytest.raises(InfeasibleError, match="the loss of a region leaves no fleet"):
        compile_text(BOTH.format(deadline="2d", more=", regions: [gcp/us-central1], survive: 10%"))


def test_offloaded_gpus_are_bought_where_allowed(compile_text: Callable[[str], Plan]) -> None:
    """By default no engine that has never run is chosen; where allowed it is, if cheaper, and outputs say
    that it has never run."""
    text = (
        "name: x\nmodel: mixtral-8x7b\nworkload: {{batch: {{requests: 20000, prompt: 77, output: 128}}}}\n"
        "market: {{gpus: [T4, L4, A100-80GB], purchase: on-demand{more}}}\n"
    )
    default = compile_text(text.format(more=""))
    allowed = compile_text(text.format(more=", offload: allow"))
    assert not any(c.column.policy.rehearsed_only for c in default.fleet.choices)
    assert allowed.fleet.cost <= default.fleet.cost + 1e-6
    for choice in allowed.fleet.choices:
        if choice.column.policy.rehearsed_only:
            files = emit_all(allowed)
            assert "never run on a GPU" in files["report.md"]
            assert json.loads(files["routing.json"])["replicas"][0]["predicted_never_run_on_a_gpu"]


def test_one_owned_machine_that_is_too_slow_says_by_how_much() -> None:
    text = batch_spec(machine="g4dn.16xlarge", more=", deadline: 1min")
    spec = parse_spec(text, "spec.yaml")
    inputs = load_inputs(spec)
    workload = build_workload(spec, inputs)
    assert inputs.machine is not None
    policies, refused = find_policies(workload, find_roofline(workload, inputs.machine), None)
    with pytest.raises(
        InfeasibleError, match=r"spec.yaml:\d+:\d+: the deadline leaves no fleet .*\n.*is enough"
    ):
        choose_fleet(spec, workload, policies, refused, ())
