"""The policy pass: memory complete, monotone in the machine, published orders of magnitude."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from conftest import ONLINE, batch_spec

from moeplan.planner.catalog import Catalog
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.policy import Policy, Rejection
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.verify import verify_policy, verify_roofline


def workload_of(text: str) -> Workload:
    spec = parse_spec(text, "spec.yaml")
    return build_workload(spec, load_inputs(spec))


def offered(text: str, machine: Machine, limit: int | None = None) -> tuple[Policy | Rejection, ...]:
    workload = workload_of(text)
    policies, refused = find_policies(workload, find_roofline(workload, machine), limit)
    for policy in policies:
        verify_policy(policy)
    return (*policies, *refused)


def offload(text: str, machine: Machine) -> Policy:
    return next(p for p in offered(text, machine) if isinstance(p, Policy) and p.engine == "runtime_min")


def changed(machine: Machine, level: str, **changes: float) -> Machine:
    levels = tuple(replace(v, **changes) if v.name == level else v for v in machine.levels)  # type: ignore[arg-type]
    return replace(machine, levels=levels)


def test_mixtral_on_a_t4_host_is_offloaded(catalog: Catalog) -> None:
    """The weights are six times the card: most experts stream, attention is mostly the CPU's (CGOPipe)."""
    policy = offload(batch_spec(), catalog.machines["g4dn.16xlarge"])
    assert policy.attention_gpu_share <= 0.25
    assert policy.experts_cpu_share <= 0.25
    assert policy.weights_on == "dram"
    assert policy.dtype == "fp16"  # a T4 has no bf16
    assert policy.sequences > 500
    # Published: 92 to 280 tokens/s on T4 hosts with half the memory or less, for these sizes.
    assert 50 < policy.generated_tokens_per_s.value < 600


@pytest.mark.parametrize(
    ("level", "field"),
    [
        ("gpu", "bytes_per_s"),
        ("gpu", "bytes"),
        ("dram", "bytes_per_s"),
        ("dram", "bytes"),
        ("dram", "up_bytes_per_s"),
    ],
)
def test_a_better_machine_is_never_slower(catalog: Catalog, level: str, field: str) -> None:
    """Doubling any one figure of the machine does not lower the predicted throughput."""
    machine = catalog.machines["gr6.8xlarge"]
    base = offload(batch_spec(), machine)
    value = getattr(machine.level(level), field)  # type: ignore[arg-type]
    better = offload(batch_spec(), changed(machine, level, **{field: value * 2}))
    # The smallest batch within half a percent of the best is taken, hence the slack.
    assert better.generated_tokens_per_s.value >= base.generated_tokens_per_s.value * 0.995


def test_a_model_that_fits_nowhere_says_what_is_short(catalog: Catalog) -> None:
    answers = offered(batch_spec(model="qwen3-coder-480b-a35b"), catalog.machines["g4dn.xlarge"])
    assert {answer.constraint for answer in answers if isinstance(answer, Rejection)} == {"gpu memory"}
    message = next(answer.message for answer in answers if isinstance(answer, Rejection))
    assert "GiB of gpu memory" in message
    assert "may be used" in message


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("deepseek-v3", "executes weights in fp8 on a CPU only"),
        ("gpt-oss-20b", "executes weights in mxfp4 on a CPU only"),
    ],
)
def test_what_the_runtime_does_not_execute_is_refused_by_name(
    catalog: Catalog, model: str, says: str
) -> None:
    answers = offered(batch_spec(model=model), catalog.machines["g6.12xlarge"])
    refused = [a for a in answers if isinstance(a, Rejection) and a.constraint == "model"]
    assert [says in a.message and model in a.message for a in refused] == [True]


def test_host_memory_that_is_too_small_is_named(catalog: Catalog) -> None:
    """Without a disk the weights must lie in host memory; the refusal says how much would do."""
    machine = catalog.machines["g6.8xlarge"]
    diskless = replace(machine, levels=tuple(v for v in machine.levels if v.name != "disk"))
    answers = offered(batch_spec(), diskless, limit=40 * 2**30)
    short = next(a for a in answers if isinstance(a, Rejection) and a.constraint == "dram memory")
    assert "host memory of" in short.hint


def test_experts_beyond_host_memory_come_from_disk(catalog: Catalog) -> None:
    policy = offload(batch_spec(model="qwen3-coder-480b-a35b"), catalog.machines["g6.12xlarge"])
    assert policy.weights_on == "disk"
    assert (policy.bottleneck.phase, policy.bottleneck.lane) == ("decode", "disk")
    # Every pass reads the experts that neither memory holds; nothing is faster than the disk.
    model = workload_of(batch_spec(model="qwen3-coder-480b-a35b")).model
    size = model.parameters.routed_experts * model.stored_bytes_per_expert_parameter
    disk = policy.machine.level("disk")
    read_s = size * policy.experts_disk_share / (disk.up_bytes_per_s * disk.up_efficiency)
    disk_s = next(lane.seconds for lane in policy.decode.lanes if lane.lane == "disk")
    assert disk_s == pytest.approx(read_s, rel=0.01)
    assert policy.decode.seconds >= disk_s


def test_experts_move_from_cpu_to_link_near_p1(catalog: Catalog) -> None:
    """Below P1 at least half of the experts stay where their weights lie; far beyond it all are streamed."""
    machine = catalog.machines["gr6.8xlarge"]
    text = batch_spec()
    p1 = find_roofline(workload_of(text), machine).turning_points[0].tokens_at_p1
    shares = [
        offload(text.replace("requests: 2000", f"requests: {round(p1 * part)}"), machine).experts_cpu_share
        for part in (0.05, 0.5, 2.0, 20.0)
    ]
    assert min(shares[:2]) >= 0.5 > shares[2]
    assert shares[-1] == 0.0


SLOW_ONLINE = ONLINE.replace("ttft: 2s, itl: 100ms", "ttft: 60s, itl: 5s")


def online_offload(catalog: Catalog, text: str) -> Policy | Rejection:
    """The offloading answer on a box whose GPU does not hold the model."""
    answers = offered(text, catalog.machines["g6.8xlarge"])
    return next(a for a in answers if isinstance(a, Policy) or a.constraint != "gpu memory")


def test_offloaded_replicas_serve_what_is_patient(catalog: Catalog) -> None:
    """61 GB of weights beside a 24 GB card: seconds per token, kept where the SLO allows it."""
    policy = online_offload(catalog, SLOW_ONLINE)
    assert isinstance(policy, Policy)
    requests = workload_of(SLOW_ONLINE).classes[0]
    for rate in policy.rates:
        assert rate.itl_s <= 5.0
        assert rate.ttft_s <= 60.0
        assert rate.itl_s > policy.decode.seconds * 0.5
        output = requests.buckets[rate.bucket].output_tokens
        in_flight = policy.data_parallel * policy.sequences
        assert rate.requests_per_s.value == pytest.approx(in_flight / (output * rate.itl_s))


def test_a_stricter_slo_never_serves_more_when_offloaded(catalog: Catalog) -> None:
    served = []
    for itl in ("5s", "2s", "1s"):
        policy = online_offload(catalog, SLOW_ONLINE.replace("itl: 5s", f"itl: {itl}"))
        served.append(policy.generated_tokens_per_s.value if isinstance(policy, Policy) else 0.0)
    assert served == sorted(served, reverse=True)
    assert served[0] > 0


def test_offloading_that_is_too_slow_says_what_it_reaches(catalog: Catalog) -> None:
    refused = online_offload(catalog, ONLINE.replace("itl: 100ms", "itl: 5ms"))
    assert isinstance(refused, Rejection)
    assert refused.constraint == "ITL"
    assert refused.hint.startswith("an SLO of itl ")


def fp8(text: str) -> str:
    return text.replace("model: qwen3-30b-a3b", "model: {name: qwen3-30b-a3b, quantize: fp8}")


def test_fp8_weights_are_chosen_where_they_serve_more(catalog: Catalog) -> None:
    """Half the bytes serve more on one H100; half the bytes fit an L40S, which 16-bit weights do not."""
    for name, changes in (("a3-highgpu-1g", True), ("g6e.xlarge", True)):
        plain, rounded = (offered(text, catalog.machines[name])[0] for text in (ONLINE, fp8(ONLINE)))
        assert isinstance(rounded, Policy)
        assert (rounded.weights_dtype == "fp8") is changes
        if isinstance(plain, Policy):
            assert plain.weights_dtype == "checkpoint"
            assert rounded.generated_tokens_per_s.value > plain.generated_tokens_per_s.value
            assert rounded.memory[0].bytes < 0.6 * plain.memory[0].bytes


def test_a_model_too_large_for_gpus_says_what_would_do(catalog: Catalog) -> None:
    """61 GB of weights: two 48 GB cards hold them, or one with half the bytes."""
    refused = offered(ONLINE, catalog.machines["g6e.xlarge"])[0]
    assert isinstance(refused, Rejection)
    assert refused.hint == "2 L40S GPUs in one machine, or `quantize: fp8` in the spec's model"


def test_a_gpu_without_eight_bit_arithmetic_keeps_the_weights(catalog: Catalog) -> None:
    """vLLM's fp8 kernels begin with Turing; a V100 is older."""
    machine = next(m for m in catalog.machines.values() if m.gpu == "V100" and m.gpus == 8)
    text = fp8(ONLINE).replace("quantize: fp8", "quantize: fp8, dtype: fp16")
    answer = offered(text, machine)[0]
    assert not isinstance(answer, Policy) or answer.weights_dtype == "checkpoint"


def test_slo_bounds_the_rate(catalog: Catalog) -> None:
    """A tighter ITL never gives more requests per second, and the chosen batch keeps both promises."""
    rates = []
    for itl in ("40ms", "60ms", "100ms", "400ms"):
        text = ONLINE.replace("itl: 100ms", f"itl: {itl}")
        policy = offered(text, catalog.machines["a2-ultragpu-1g"])[0]
        assert isinstance(policy, Policy)
        slo = workload_of(text).classes[0].slo
        assert slo is not None
        assert all(rate.itl_s <= slo.itl_s and rate.ttft_s <= slo.ttft_s for rate in policy.rates)
        rates.append(policy.generated_tokens_per_s.value)
    assert rates == sorted(rates)


def test_an_unreachable_slo_is_refused_with_what_is_reached(catalog: Catalog) -> None:
    answer = offered(ONLINE.replace("itl: 100ms", "itl: 2ms"), catalog.machines["a2-ultragpu-1g"])[0]
    assert isinstance(answer, Rejection)
    assert answer.constraint == "ITL"


@pytest.mark.parametrize("gib", [3, 6, 12, 19])
def test_stream_keeps_its_memory_limit(catalog: Catalog, gib: int) -> None:
    """OLMoE (13 GiB) on a small box: fewer bytes, fewer resident pages, never more than the limit."""
    (policy,) = offered(batch_spec(model="olmoe-1b-7b"), catalog.machines["cpu-2core"], gib * 2**30)
    assert isinstance(policy, Policy)
    assert policy.used_bytes("dram") <= gib * 2**30
    streams = policy.pages.resident_pages < policy.pages.pages_per_layer
    assert policy.weights_on == ("disk" if streams else "dram")
    assert streams or gib > 14  # all weights take 12.9 GiB


def test_more_memory_never_streams_slower(catalog: Catalog) -> None:
    machine = catalog.machines["cpu-2core"]
    speeds = []
    for gib in (3, 6, 12, 19):
        (policy,) = offered(batch_spec(model="olmoe-1b-7b"), machine, gib * 2**30)
        assert isinstance(policy, Policy)
        speeds.append(policy.generated_tokens_per_s.value)
    assert all(b >= a * 0.995 for a, b in itertools.pairwise(speeds))


def test_ttft_bounds_the_rate_too(catalog: Catalog) -> None:
    """A long prompt: prefill alone takes most of a tight TTFT."""
    text = ONLINE.replace("prompt: 2048", "prompt: 20000").replace(
        "ttft: 2s, itl: 100ms", "ttft: TTFT, itl: 10s"
    )
    machine = catalog.machines["a2-ultragpu-1g"]
    loose, tight = (offered(text.replace("TTFT", ttft), machine)[0] for ttft in ("20s", "1s"))
    assert isinstance(loose, Policy)
    assert isinstance(tight, Rejection) or tight.rates[1].batch < loose.rates[1].batch


def test_latent_cache_is_copied_to_every_gpu(catalog: Catalog) -> None:
    """DeepSeek-V3 on 8 H200 (TP 8): each GPU holds the whole latent cache of all sequences."""
    text = batch_spec(model="deepseek-v3").replace("prompt: 77, output: 128", "prompt: 30000, output: 1000")
    policy = next(p for p in offered(text, catalog.machines["p5en.48xlarge"]) if isinstance(p, Policy))
    per_sequence = 61 * 576 * 2 * 30_500
    cache = next(use.bytes for use in policy.memory if use.item == "KV cache")
    assert policy.gpus == 8
    assert policy.sequences * per_sequence <= cache / 8


def test_staged_ring_is_in_the_memory_table(catalog: Catalog) -> None:
    staged = changed(catalog.machines["g4dn.8xlarge"], "dram", bytes=128 * 2**30)
    policy = offload(batch_spec(), staged)
    assert policy.staged
    ring = next(use.bytes for use in policy.memory if use.item == "pinned pages")
    assert policy.pages.slots * policy.pages.slot_bytes <= ring * 1.001


def test_a_machine_without_the_dtype_is_refused(catalog: Catalog) -> None:
    machine = changed(catalog.machines["cpu-2core"], "dram", flops_per_s={"fp8": 1e12})  # type: ignore[arg-type]
    (answer,) = offered(batch_spec(model="olmoe-1b-7b"), machine)
    assert isinstance(answer, Rejection)
    assert "computes in neither bf16 nor another dtype of its size, but in fp8" in answer.message


def test_calls_that_cost_nothing_are_no_crash(catalog: Catalog) -> None:
    machine = replace(catalog.machines["cpu-2core"], launch_s=0.0)
    (policy,) = offered(batch_spec(model="olmoe-1b-7b"), machine)
    assert isinstance(policy, Policy)


def test_a_disk_faster_than_memory_is_held_to_it(catalog: Catalog) -> None:
    machine = changed(catalog.machines["cpu-2core"], "disk", up_bytes_per_s=1e12)
    verify_roofline(find_roofline(workload_of(batch_spec(model="olmoe-1b-7b")), machine))
