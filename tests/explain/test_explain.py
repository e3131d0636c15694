"""Explanations are what compiling the changed spec says: the same plan, every byte, or the same refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ONLINE, batch_spec

from moeplan.codegen.emit import plan_json
from moeplan.planner.diagnostics import CompileError, InfeasibleError
from moeplan.planner.explain.case import Source, decide, solve
from moeplan.planner.explain.explain import explain
from moeplan.planner.explain.outcomes import decision
from moeplan.planner.explain.sensitivity import flips
from moeplan.planner.explain.study import Study
from moeplan.planner.explain.why_not import forced
from moeplan.planner.ir.plan import Plan
from moeplan.planner.pipeline import compile_plan

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL_MARKET = ONLINE + "market: {clouds: [gcp], gpus: [A100-80GB, H100], purchase: spot}\n"


def study(text: str, folder: Path) -> Study:
    return Study(Source(text.encode(), str(folder / "spec.yaml")))


def example(name: str) -> tuple[str, Path]:
    folder = EXAMPLES / name
    return (folder / "spec.yaml").read_text(), folder


def files(answer: Plan | InfeasibleError) -> str:
    """The plan as its file, or what is told instead, without the place in the spec."""
    if isinstance(answer, Plan):
        return plan_json.emit(answer)["plan.json"]
    return "\n".join(f"{d.message} {d.hint}" for d in answer.diagnostics)


def compiled(text: str, folder: Path) -> str:
    try:
        return files(compile_plan(text, str(folder / "spec.yaml")))
    except InfeasibleError as error:
        return files(error)


GPUS = "gpus: [L4, A10G, L40S, A100, A100-80GB, H100]"


@pytest.mark.parametrize(
    ("name", "why_not", "was", "becomes"),
    [
        ("qwen3-online", "L40S", GPUS, "gpus: [L40S]"),
        ("qwen3-online", "L4", GPUS, "gpus: [L4]"),
        ("qwen3-online", "a3-highgpu-1g", GPUS, "machines: [a3-highgpu-1g]"),
        ("qwen3-online", "T4", GPUS, "gpus: [T4]"),
        ("mixtral-t4", "gr6.8xlarge", "machine: g4dn.16xlarge", "machine: gr6.8xlarge"),
        ("mixtral-t4", "g4dn.xlarge", "machine: g4dn.16xlarge", "machine: g4dn.xlarge"),
        ("mixtral-l4", "T4", "machine: gr6.8xlarge", "machine: g4dn.16xlarge"),
        ("dbrx-4xt4", "g5.48xlarge", "machine: n1-custom-64-425984+4xT4", "machine: g5.48xlarge"),
        ("tinymoe", "g6.xlarge", "machine: cpu-2core", "machine: g6.xlarge"),
    ],
)
def test_why_not_is_a_compilation_with_that_choice_forced(
    name: str, why_not: str, was: str, becomes: str
) -> None:
    """On every example: the plan that is told equals the one compiled from the spec that says so."""
    text, folder = example(name)
    assert was in text
    told = forced(study(text, folder), why_not)
    assert files(told.answer) == compiled(text.replace(was, becomes), folder)


def test_why_not_of_a_name_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"no GPU or machine named 'H1000'.*\n.*did you mean 'H100'"):
        forced(study(SMALL_MARKET, tmp_path), "H1000")


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXAMPLES.glob("*/spec.yaml")))
def test_the_quick_fleet_is_the_compiled_one(name: str) -> None:
    """What sensitivities compare decides as the whole compiler does."""
    text, folder = example(name)
    case = Source(text.encode(), str(folder / "spec.yaml")).case()
    plan, fleet = solve(case), decide(case)
    assert isinstance(plan, Plan)
    assert decision(fleet).partition(",")[0] == decision(plan.fleet).partition(",")[0]
    if plan.fleet.usd_per_hour:
        assert decision(fleet) == decision(plan.fleet)


@pytest.mark.parametrize(
    "more", ["market: {gpus: [T4], purchase: spot}\n", "market: {gpus: [L4, H100], quota: {H100: 0}}\n"]
)
def test_the_quick_fleet_where_little_holds_the_model(more: str, tmp_path: Path) -> None:
    """Also where only offloading is left, or nothing at all."""
    case = study(
        ONLINE.replace("itl: 100ms", "itl: 30s").replace("ttft: 2s", "ttft: 9min") + more, tmp_path
    ).base
    whole = solve(case)
    assert decision(decide(case)) == decision(whole.fleet if isinstance(whole, Plan) else whole)


def test_what_if_is_a_compilation_of_the_changed_text(tmp_path: Path) -> None:
    source = Source(SMALL_MARKET.encode(), str(tmp_path / "spec.yaml"))
    answer = solve(source.case(["workload.online.rate=80/s", "workload.online.slo.itl=-50%"]))
    changed = SMALL_MARKET.replace("rate: 8/s", "rate: 80/s").replace("itl: 100ms", "itl: 50ms")
    assert files(answer) == compiled(changed, tmp_path)


def test_dearer_machines_are_billed_so(tmp_path: Path) -> None:
    """All prices up by a tenth: the same fleet for a tenth more, or another; never cheaper than before."""
    source = Source(SMALL_MARKET.encode(), str(tmp_path / "spec.yaml"))
    before, after = solve(source.case()), solve(source.case(["price=+10%"]))
    assert isinstance(before, Plan)
    assert isinstance(after, Plan)
    assert after.fleet.usd_per_hour == pytest.approx(1.1 * before.fleet.usd_per_hour)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("price=5", "price is changed by a percentage"),
        ("price.H1000=+5%", "no GPU or machine named 'H1000'"),
        ("gpu_memory=-100%", "is changed by a percentage"),
        ("prize=+5%", "unknown key 'prize'"),
    ],
)
def test_facts_that_cannot_be_changed(setting: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=says):
        Source(SMALL_MARKET.encode(), str(tmp_path / "spec.yaml")).case([setting])


@pytest.fixture(scope="module")
def market_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return study(SMALL_MARKET, tmp_path_factory.mktemp("market"))


def test_sensitivity_is_what_solving_at_both_sides_says(market_study: Study) -> None:
    """Each flip compiled anew: at the percentage told another fleet, just before it the same."""
    found = [flip for flip in flips(market_study) if flip.percent is not None]
    assert found
    here = decision(market_study.fleet)
    for flip in found:
        unchanged = market_study.case(f"{flip.key}={flip.unchanged_percent:+g}%")
        changed = market_study.case(f"{flip.key}={flip.percent:+g}%")
        assert decision(decide(unchanged)) == here
        assert decision(decide(changed)) != here
        assert abs(flip.percent) > abs(flip.unchanged_percent)


def test_an_explanation_agrees_with_the_plan(market_study: Study) -> None:
    found = explain(market_study)
    assert found.outcome.usd_per_hour == market_study.plan.fleet.usd_per_hour
    assert [question.text for question in found.questions] == ["why this GPU"]
    chosen = [option for question in found.questions for option in question.options if option.chosen]
    assert [option.outcome.usd_per_hour for option in chosen] == [found.outcome.usd_per_hour]
    assert all(
        option.outcome.refusal or option.outcome.usd_per_hour >= found.outcome.usd_per_hour
        for question in found.questions
        for option in question.options
    )
    for batches, replica in zip(found.batches, market_study.plan.replicas, strict=True):
        here = next(point for point in batches.points if point.batch == batches.chosen)
        assert here.excluded == ""
        assert here.tokens_per_s == pytest.approx(replica.policy.generated_tokens_per_s.value, rel=1e-6)


@pytest.mark.parametrize("machine", ["g4dn.16xlarge", "cpu-2core"])
def test_batches_of_an_offloaded_or_streamed_replica(machine: str, tmp_path: Path) -> None:
    """The chosen number in flight reaches what the policy says, and more of them what is told against it."""
    found = explain(study(batch_spec(machine=machine), tmp_path))
    assert found.questions == ()
    (batches,) = found.batches
    here = next(point for point in batches.points if point.batch == batches.chosen)
    assert here.excluded == ""
    assert here.tokens_per_s == pytest.approx(found.outcome.tokens_per_s, rel=0.02)


def test_inputs_that_cannot_be_scaled_end_the_search(tmp_path: Path) -> None:
    """Three requests, a deadline near the longest that there is: no probe beyond what a spec can say."""
    text = batch_spec(machine="cpu-2core", more=", deadline: 300d").replace("2000", "3")
    found = {(flip.key, flip.unchanged_percent): flip for flip in flips(study(text, tmp_path))}
    assert ("workload.batch.requests", -75.0) in found
    assert ("workload.batch.deadline", 10.0) in found
