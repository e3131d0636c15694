"""The profile pass: measured rows reach the fleet, and predictions that come true change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ONLINE, batch_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.codegen.emit import emit_all
from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.profile import FIGURES, FigureName
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.workload import Bucket, Workload
from moeplan.planner.measured_laws import CALIBRATED_SIGMA, MEASURED_SIGMA
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.profile import Profiled, apply_profile
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.profile_file import COLUMNS, ProfileRow
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.common import resized
from moeplan.planner.strategies.figures import figures_at
from moeplan.planner.verify import verify_policy

CASES = {
    "vllm": (ONLINE.replace("8/s", "1/s"), "a2-ultragpu-1g"),
    "vllm, copies": (ONLINE, "a3-highgpu-8g"),
    "vllm, batch": (batch_spec(model="qwen3-30b-a3b"), "a2-ultragpu-1g"),
    "offload": (batch_spec(), "g4dn.16xlarge"),
    "offload, online": (ONLINE.replace("ttft: 2s, itl: 100ms", "ttft: 60s, itl: 5s"), "g6.8xlarge"),
    "stream": (batch_spec(model="olmoe-1b-7b"), "cpu-2core"),
}


class Case:
    """One machine, one workload, its policies as predicted; and rows made of what the model says."""

    def __init__(self, catalog: Catalog, text: str, machine: str) -> None:
        spec = parse_spec(text, "spec.yaml")
        self.workload: Workload = build_workload(spec, load_inputs(spec))
        self.requests = self.workload.classes[0]
        self.roofline: Roofline = find_roofline(self.workload, catalog.machines[machine])
        policies, _ = find_policies(self.workload, self.roofline, None)
        wanted = "runtime_min" if self.requests.name == "batch" and "mixtral" in text else policies[0].engine
        self.policy: Policy = next(p for p in policies if p.engine == wanted)

    def row(self, line: int, bucket: Bucket, batch: int, **factors: float) -> ProfileRow:
        """What would be measured at a point if the named figures were `factors` times the predicted."""
        like = resized(self.requests, bucket)
        said = figures_at(self.workload, self.roofline, self.policy, like, bucket, batch)
        figures: dict[FigureName, float] = {
            name: said.get(name) * factors[name] for name in FIGURES if name in factors
        }
        return ProfileRow(
            line=line,
            machine=self.policy.machine.name,
            model=self.workload.model.name,
            engine=self.policy.engine,
            gpus=self.policy.gpus,
            prompt_tokens=bucket.prompt_tokens,
            output_tokens=bucket.output_tokens,
            batch=batch,
            figures=figures,
        )

    def own_rows(self, **factors: float) -> list[ProfileRow]:
        """A row at each point that the policy is planned for: its buckets, and their mean."""
        requests, policy = self.requests, self.policy
        mean = Bucket(
            prompt_tokens=requests.mean_prompt_tokens(),
            output_tokens=requests.mean_output_tokens(),
            share=1.0,
        )
        points = [(requests.buckets[rate.bucket], rate.batch) for rate in policy.rates]
        points = list(
            dict.fromkeys([(replace(b, share=1.0), n) for b, n in [*points, (mean, policy.sequences)]])
        )
        return [self.row(n + 2, bucket, batch, **factors) for n, (bucket, batch) in enumerate(points)]

    def apply(self, *rows: ProfileRow) -> Profiled:
        done = apply_profile(self.workload, [self.roofline], [self.policy], rows)
        for policy in done.policies:
            verify_policy(policy)
        return done

    def promise_nothing(self) -> None:
        """Relax the SLO, if there is one, so that no batch is lowered."""
        if slo := self.requests.slo:
            self.requests = replace(self.requests, slo=replace(slo, ttft_s=1e9, itl_s=1e9))
            self.workload = replace(self.workload, classes=(self.requests,))

    def corrected(self, *rows: ProfileRow) -> Policy:
        (policy,) = self.apply(*rows).policies
        return policy


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, catalog: Catalog) -> Case:
    return Case(catalog, *CASES[request.param])


def values(policy: Policy) -> list[float]:
    rates = (policy.prefill_tokens_per_s, policy.decode_tokens_per_s, policy.generated_tokens_per_s)
    return [
        *(rate.value for rate in rates),
        *(v for r in policy.rates for v in (r.requests_per_s.value, r.ttft_s, r.itl_s, r.batch)),
        policy.sequences,
    ]


def test_no_rows_change_nothing(case: Case) -> None:
    assert case.apply() == Profiled(policies=(case.policy,), rejections=(), unused=())


def test_predictions_that_come_true_change_only_provenance(case: Case) -> None:
    """Every figure measured as predicted, at every point: the same values, measured, with their interval."""
    policy = case.corrected(*case.own_rows(**dict.fromkeys(FIGURES, 1.0)))
    assert values(policy) == pytest.approx(values(case.policy))
    for rate in (policy.generated_tokens_per_s, *(r.requests_per_s for r in policy.rates)):
        assert (rate.provenance, rate.sigma) == ("measured", MEASURED_SIGMA)
    assert {c.method for c in policy.corrections} == {"exact"}
    unchanged = replace(
        policy,
        prefill_tokens_per_s=case.policy.prefill_tokens_per_s,
        decode_tokens_per_s=case.policy.decode_tokens_per_s,
        generated_tokens_per_s=case.policy.generated_tokens_per_s,
        rates=case.policy.rates,
        corrections=(),
    )
    assert unchanged == case.policy


def test_an_exact_row_replaces_the_prediction(case: Case) -> None:
    """Half the requests, twice the wait: what was measured is what is expected."""
    rows = case.own_rows(requests_per_s=0.5, itl_s=1.5, ttft_s=1.25)
    if case.requests.slo:
        rows = case.own_rows(requests_per_s=0.5, itl_s=0.9, ttft_s=0.9)
    policy = case.corrected(*rows)
    copies = case.policy.data_parallel
    for rate, row in zip(policy.rates, rows, strict=False):
        if case.requests.name == "online":
            assert rate.requests_per_s.value == pytest.approx(copies * row.figures["requests_per_s"])
        assert rate.ttft_s == pytest.approx(row.figures["ttft_s"])
        assert rate.itl_s == pytest.approx(row.figures["itl_s"])
    halved = case.policy.generated_tokens_per_s.value / 2
    assert policy.generated_tokens_per_s.value == pytest.approx(halved)
    assert policy.generated_tokens_per_s.provenance == "measured"


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_phases_make_up_the_whole(case: Case, factor: float) -> None:
    """Both phases measured `factor` as fast: requests/s and tokens/s follow, latencies inversely."""
    rows = case.own_rows(prefill_tokens_per_s=factor, decode_tokens_per_s=factor)
    case.promise_nothing()
    policy = case.corrected(*rows)
    for new, old in zip(policy.rates, case.policy.rates, strict=True):
        assert new.requests_per_s.value == pytest.approx(factor * old.requests_per_s.value)
        assert (new.ttft_s, new.itl_s) == pytest.approx((old.ttft_s / factor, old.itl_s / factor))
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "generated_tokens_per_s"):
        assert getattr(policy, name).value == pytest.approx(factor * getattr(case.policy, name).value)
        assert getattr(policy, name).provenance == "measured"


def test_requests_alone_tell_latency_by_littles_law(case: Case) -> None:
    """As many in flight, half as many a second: each is there twice as long. Calibrated, not measured."""
    case.promise_nothing()
    policy = case.corrected(*case.own_rows(requests_per_s=0.5))
    for new, old in zip(policy.rates, case.policy.rates, strict=True):
        assert new.requests_per_s.provenance == "measured"
        assert (new.ttft_s, new.itl_s) == pytest.approx((2 * old.ttft_s, 2 * old.itl_s))
    assert policy.decode_tokens_per_s.provenance == "calibrated"


def test_one_phase_alone_leaves_the_whole_as_unsure_as_the_other(case: Case) -> None:
    policy = case.corrected(*case.own_rows(decode_tokens_per_s=1.0))
    assert policy.decode_tokens_per_s.provenance == "measured"
    assert policy.prefill_tokens_per_s == case.policy.prefill_tokens_per_s
    assert policy.generated_tokens_per_s.provenance == case.policy.generated_tokens_per_s.provenance
    assert policy.generated_tokens_per_s.sigma == case.policy.generated_tokens_per_s.sigma


def test_a_nearby_row_scales_by_the_ratio_at_its_own_point(case: Case) -> None:
    """A row at 1.5 times the size and 0.7 times the batch, 0.8 as fast as predicted there."""
    rate, bucket = case.policy.rates[0], case.requests.buckets[0]
    away = Bucket(
        prompt_tokens=1.5 * bucket.prompt_tokens, output_tokens=0.75 * bucket.output_tokens, share=1.0
    )
    both = {"prefill_tokens_per_s": 0.8, "decode_tokens_per_s": 0.8}
    slower = case.row(2, away, max(1, round(0.7 * rate.batch)), **both)
    case.promise_nothing()
    policy = case.corrected(slower)
    new = policy.rates[0]
    assert new.requests_per_s.value == pytest.approx(0.8 * rate.requests_per_s.value)
    assert (new.requests_per_s.provenance, new.requests_per_s.sigma) == ("calibrated", CALIBRATED_SIGMA)
    assert {c.method for c in policy.corrections} == {"nearby"}


def test_three_rows_fit_and_reach_further(case: Case) -> None:
    """Rows at a quarter of the size and less; the fit carries their 0.7 over, calibrated by its residuals."""
    bucket = case.requests.buckets[0]
    rows = [
        case.row(
            n + 2,
            Bucket(prompt_tokens=max(1.0, bucket.prompt_tokens / size), output_tokens=20.0, share=1.0),
            batch,
            prefill_tokens_per_s=factor,
            decode_tokens_per_s=factor,
        )
        for n, (size, batch, factor) in enumerate([(4, 1, 0.68), (5, 2, 0.72), (6, 4, 0.70), (8, 8, 0.70)])
    ]
    before = case.policy.generated_tokens_per_s.value
    assert case.corrected(*rows[:2]) == case.policy
    case.promise_nothing()
    policy = case.corrected(*rows)
    assert policy.generated_tokens_per_s.value == pytest.approx(0.7 * before, rel=0.12)
    assert policy.generated_tokens_per_s.provenance == "calibrated"
    assert policy.generated_tokens_per_s.sigma > MEASURED_SIGMA
    assert {(c.method, c.lines) for c in policy.corrections} == {("fit", (2, 3, 4, 5))}


def test_a_slower_machine_takes_fewer_in_flight(catalog: Catalog) -> None:
    """Measured 2.5 times slower, the planned batch would be late: the largest that is not is taken."""
    case = Case(catalog, *CASES["vllm"])
    policy = case.corrected(*case.own_rows(itl_s=2.5))
    slo = case.requests.slo
    assert slo is not None
    for new, old in zip(policy.rates, case.policy.rates, strict=True):
        assert new.batch < old.batch
        assert new.itl_s <= slo.itl_s
        bucket = case.requests.buckets[new.bucket]
        one_more = figures_at(case.workload, case.roofline, case.policy, case.requests, bucket, new.batch + 1)
        assert 2.5 * one_more.itl_s > slo.itl_s
        assert new.requests_per_s.value < old.requests_per_s.value
        assert new.requests_per_s.value == pytest.approx(new.batch / (bucket.output_tokens * new.itl_s))
        assert new.requests_per_s.provenance == "calibrated"
    assert policy.sequences == max(rate.batch for rate in policy.rates)


def test_a_machine_that_is_late_with_one_request_is_refused(catalog: Catalog) -> None:
    case = Case(catalog, *CASES["vllm"])
    done = case.apply(*case.own_rows(itl_s=100.0))
    assert not done.policies
    (refused,) = done.rejections
    assert refused.constraint == "ITL"
    assert "by the profile, requests of 512 + 128 tokens reach ITL" in refused.message
    assert refused.excess > 1
    assert not done.unused


def test_rows_that_say_nothing_are_told_with_the_reason(catalog: Catalog) -> None:
    case = Case(catalog, *CASES["vllm"])
    row = case.own_rows(itl_s=1.0)[0]
    done = case.apply(
        replace(row, line=2, model="mixtral-8x7b"),
        replace(row, line=3, machine="g4dn.xlarge"),
        replace(row, line=4, engine="runtime_min"),
        replace(row, line=5, prompt_tokens=100_000.0),
    )
    assert done.policies == (case.policy,)
    assert [row.line for row in done.unused] == [2, 3, 4, 5]
    reasons = [row.reason for row in done.unused]
    assert "measured with mixtral-8x7b" in reasons[0]
    assert "g4dn.xlarge is not a machine of this plan" in reasons[1]
    assert "runtime_min over 1 GPUs is not what is planned" in reasons[2]
    assert "over a factor of 2 away" in reasons[3]


@settings(max_examples=25)
@given(st.floats(0.2, 1.0), st.floats(0.2, 1.0))
def test_slower_rows_never_give_a_faster_plan(catalog: Catalog, slow: float, slower: float) -> None:
    case = Case(catalog, *CASES["vllm"])
    speeds = []
    for factor in (slow, slow * slower):
        done = case.apply(*case.own_rows(prefill_tokens_per_s=factor, decode_tokens_per_s=factor))
        speeds.append(done.policies[0].generated_tokens_per_s.value if done.policies else 0.0)
    assert speeds[1] <= speeds[0] * (1 + 1e-9)


def test_the_fleet_follows_the_measurements(
    compile_text: Callable[[str], Plan], tmp_path: Path, catalog: Catalog
) -> None:
    """What looked cheapest and was measured at a tenth of it is bought no more."""
    text = ONLINE + "market: {purchase: on-demand, clouds: [gcp]}\n"
    before = compile_text(text)
    chosen = before.replicas[0].policy
    rows = [",".join(COLUMNS)]
    for rate in chosen.rates:
        bucket = before.workload.classes[0].buckets[rate.bucket]
        copy = rate.requests_per_s.value / chosen.data_parallel
        where = f"{chosen.machine.name},qwen3-30b-a3b,vllm,{chosen.gpus}"
        size = f"{bucket.prompt_tokens},{bucket.output_tokens},{rate.batch}"
        rows.append(f"{where},{size},,,{copy / 10},,")
    (tmp_path / "profile.csv").write_text("\n".join(rows) + "\n")
    after = compile_text(text + "profile: profile.csv\n")
    assert chosen.machine.name not in {r.policy.machine.name for r in after.replicas}
    assert after.fleet.usd_per_hour >= before.fleet.usd_per_hour


def test_the_report_says_which_rows_did_what(compile_text: Callable[[str], Plan], tmp_path: Path) -> None:
    text = ONLINE.replace("8/s", "1/s") + "machine: a2-ultragpu-1g\n"
    batch = compile_text(text).replicas[0].policy.rates[0].batch
    row = "a2-ultragpu-1g,qwen3-30b-a3b,vllm,1,512,128,{batch},,{decode},,,"
    rows = [row.format(batch=batch, decode=3000), row.format(batch=1, decode=100)]
    (tmp_path / "p.csv").write_text("\n".join([",".join(COLUMNS), *rows]))
    files = emit_all(compile_text(text + "profile: p.csv\n"))
    assert "Corrected by the rows of `p.csv`" in files["report.md"]
    assert "- decode_tokens_per_s: measured at this point (line 2), 0." in files["report.md"]
    assert "## Rows of `p.csv` that were not used\n\n- line 3: " in files["report.md"]
    assert '"method": "exact"' in files["plan.json"]
