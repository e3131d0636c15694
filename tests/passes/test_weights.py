"""Experts in fewer bits: chosen where the spec allows it and they clearly win, in their true bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeplan.planner import costs
from moeplan.planner.catalog import Catalog
from moeplan.planner.catalog.quality import measured_quality
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.model import PACKED_BYTES
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.common import Slower
from moeplan.planner.strategies.dtypes import most_exact
from moeplan.planner.strategies.runtime_costs import kernels_of
from moeplan.planner.strategies.stream import stream_figures, stream_policy

SPEC = """\
name: job
model: {{name: {name}, dtype: {dtype}, quantize: {quantize}}}
workload: {{batch: {{requests: 64, prompt: 4, output: 128}}}}
"""


def workload_of(quantize: str, name: str = "mixtral-8x7b", dtype: str = "bf16") -> Workload:
    spec = parse_spec(SPEC.format(name=name, dtype=dtype, quantize=quantize), "spec.yaml")
    return build_workload(spec, load_inputs(spec))


def policy_of(workload: Workload, machine: Machine, gib: int = 20) -> Policy:
    found = stream_policy(workload, workload.classes[0], find_roofline(workload, machine), gib << 30)
    assert isinstance(found, Policy)
    return found


@pytest.fixture
def machine(catalog: Catalog) -> Machine:
    return catalog.machines["cpu-2core"]


def test_nothing_is_rounded_that_the_spec_does_not_allow(machine: Machine) -> None:
    policy = policy_of(workload_of("never"), machine)
    assert (policy.weights_dtype, policy.weights_options) == ("checkpoint", ())
    named = policy_of(workload_of("int4"), machine)
    assert [option.dtype for option in named.weights_options] == ["checkpoint", "int4"]
    assert policy_of(workload_of("fp8"), machine).weights_options == ()


def test_allowed_they_are_all_compared(machine: Machine) -> None:
    """Where the disk bounds decode, fewer bytes are faster; each option's rate is that of its own policy."""
    policy = policy_of(workload_of("allow"), machine)
    rates = {option.dtype: option.generated_tokens_per_s for option in policy.weights_options}
    assert list(rates) == ["checkpoint", "bf12", "int8", "int4"]
    assert rates["checkpoint"] < rates["bf12"] < rates["int8"]
    assert policy.weights_dtype == most_exact(rates) != "checkpoint"
    assert policy.generated_tokens_per_s.value == pytest.approx(rates[policy.weights_dtype])
    alone = policy_of(workload_of("never"), machine)
    assert rates["checkpoint"] == pytest.approx(alone.generated_tokens_per_s.value)


def test_bytes_are_those_of_the_packed_checkpoint(machine: Machine) -> None:
    """Scales and room for exceptions counted: per value 97/64, 66/64 and 40/64 bytes."""
    workload = workload_of("allow")
    p = workload.model.parameters
    for option in policy_of(workload, machine).weights_options:
        each = PACKED_BYTES.get(option.dtype, 2.0)  # type: ignore[call-overload]
        expected = p.routed_experts * each + 2 * (p.total() - p.routed_experts)
        assert option.bytes == pytest.approx(expected, abs=1)


def test_a_chosen_dtype_is_what_the_figures_are_of(machine: Machine) -> None:
    """Asked again at the same batch, the same policy predicts the same; as stored it would not."""
    workload = workload_of("int8")
    policy = policy_of(workload, machine)
    assert policy.weights_dtype == "int8"
    roofline, requests = find_roofline(workload, machine), workload.classes[0]
    packed, plain = (
        stream_figures(workload, requests, roofline, p, p.sequences, Slower())
        for p in (policy, replace(policy, weights_dtype="checkpoint"))
    )
    assert packed.itl_s == pytest.approx(policy.decode.seconds)
    assert plain.itl_s > 1.4 * packed.itl_s


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({"checkpoint": 1.0, "bf12": 1.09, "int8": 1.09, "int4": 1.09}, "checkpoint"),
        ({"checkpoint": 1.0, "bf12": 1.3, "int8": 1.4, "int4": 1.42}, "bf12"),
        ({"checkpoint": 1.0, "bf12": 1.3, "int8": 2.0, "int4": 3.0}, "int4"),
        ({"bf12": 1.0, "int8": 1.05, "int4": 1.2}, "int4"),
    ],
)
def test_the_more_exact_one_wins_a_near_tie(rates: dict, chosen: str) -> None:
    assert most_exact(rates) == chosen


def test_where_packing_is_not_possible() -> None:
    """Experts in one tensor, fewer than 16 bits already, rows of no whole blocks, other arithmetic."""
    assert costs.packings(workload_of("allow")) == ("bf12", "int8", "int4")
    assert costs.packings(workload_of("allow", "dbrx")) == ()
    assert costs.packings(workload_of("allow", "gpt-oss-20b")) == ()
    assert costs.packings(workload_of("allow", dtype="fp16")) == ()
    workload = workload_of("allow")
    odd = replace(workload, model=replace(workload.model, expert_intermediate=14337))
    assert costs.packings(odd) == ()
    assert costs.packings(replace(workload, model=workload.model.packed("int8"))) == ()
    wide = replace(workload.model, stored_bytes_per_other_parameter=4.0)
    assert costs.packings(replace(workload, model=wide)) == ("int8", "int4")


def test_unpacking_costs_time(machine: Machine) -> None:
    """A machine that unpacks slowly keeps the weights as they are."""
    workload = workload_of("int8")
    measured = tuple(
        replace(k, unpack_values_per_s=(("int8", rate),))
        for k in kernels_of(find_roofline(workload, machine))
        for rate in (1e6,)
    )
    assert policy_of(workload, replace(machine, kernels=measured)).weights_dtype == "checkpoint"
    fast = tuple(replace(k, unpack_values_per_s=(("int8", 1e12),)) for k in measured)
    assert policy_of(workload, replace(machine, kernels=fast)).weights_dtype == "int8"


def test_quality_has_the_command_that_measures_it() -> None:
    for name in ("int8", "int4"):
        assert {q.model for q in measured_quality()[name]} >= {"tinymoe"}
        for quality in measured_quality()[name]:
            assert quality.source.startswith("python benchmarks/packing.py ")
            assert -0.01 < quality.change < {"int8": 0.01, "int4": 0.04}[name]


LONG = """\
name: job
model: {{name: mixtral-8x7b, kv_cache: {cache}}}
workload: {{batch: {{requests: 4000, prompt: 1500, output: 500}}}}
"""


def kv_workload(cache: str) -> Workload:
    spec = parse_spec(LONG.format(cache=cache), "spec.yaml")
    return build_workload(spec, load_inputs(spec))


def test_an_int8_cache_is_the_spec_s_choice(machine: Machine) -> None:
    """By name it is taken; allowed it must clearly win; of a token it has 132 bytes for 256."""
    plain, named, allowed = (policy_of(kv_workload(cache), machine) for cache in ("same", "int8", "allow"))
    assert (plain.kv_dtype, plain.kv_options, named.kv_dtype, named.kv_options) == ("same", (), "int8", ())
    same, int8 = allowed.kv_options
    assert (same.dtype, int8.dtype) == ("same", "int8")
    assert same.bytes == 32 * 2 * 8 * 128 * 2
    assert int8.bytes == same.bytes * 132 // 256
    assert same.generated_tokens_per_s == pytest.approx(plain.generated_tokens_per_s.value)
    assert int8.generated_tokens_per_s == pytest.approx(named.generated_tokens_per_s.value)
    rates = {option.dtype: option.generated_tokens_per_s for option in allowed.kv_options}
    assert allowed.kv_dtype == most_exact(rates)
    held = {use.item: use.bytes for use in named.memory}
    assert held["KV cache"] == pytest.approx(int8.bytes * named.sequences * 2016, rel=1e-9)  # whole blocks


def test_latents_are_kept_as_they_are() -> None:
    spec = parse_spec(LONG.format(cache="int8").replace("mixtral-8x7b", "deepseek-v2-lite"), "spec.yaml")
    assert costs.kv_dtypes(build_workload(spec, load_inputs(spec))) == ("same",)
