"""Calibration: tiny measurements, and a machine file from which the planner reads the same figures."""

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from moeplan.planner.calibration import change_table, machine_figures, nearest_machine
from moeplan.planner.catalog import load_catalog, load_machine
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.machine import Kernels as PlannedKernels
from moeplan.planner.model_config import load_model
from moeplan.planner.strategies import runtime_costs
from moeplan.runtime_min import calibration as calibrate
from moeplan.runtime_min.calibration import kernels
from moeplan.runtime_min.calibration.accelerator import DeviceSizes, measure_device
from moeplan.runtime_min.calibration.probe import Probe, Shape
from moeplan.runtime_min.packing import _packer

_packer()  # compiled, though schedules here run as plain Python
TINY = Shape(
    layers=2,
    hidden=32,
    inner=48,
    heads=2,
    kv_heads=1,
    head_dim=16,
    experts=4,
    experts_per_token=2,
    vocab=64,
)
SIZES = kernels.Sizes(
    small=TINY,
    large=replace(TINY, hidden=64, inner=128, heads=4),
    rows=(1, 4, 16),
    prompt=8,
    sequences=(1, 8),
    decodes=(1, 4),
    prompts=(4, 8),
    contexts=(4, 512),
    near_bytes=1 << 16,
    far_bytes=(1 << 18, 1 << 20),
    seconds=0.0005,
    rounds=2,
)


@pytest.fixture(scope="module")
def noise() -> Iterator[None]:
    """Between two looks at the clock lie 0.1 us to 10 ms, whatever happened: no busy machine is worse."""
    pace, now, one_at_a_time = random.Random(0), 0.0, threading.Lock()

    def look() -> float:
        nonlocal now
        with one_at_a_time:
            now += 10 ** pace.uniform(-7, -2)
            return now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter", look)
        yield


@pytest.fixture(scope="module")
def figures(noise, tmp_path_factory):
    """Of two cores, however many there are."""
    folder = tmp_path_factory.mktemp("calibrate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "physical_cores", lambda: 2)
        found = calibrate.measure(folder, SIZES)
    assert list(folder.iterdir()) == []  # the file it reads is gone
    return found


def test_every_figure_is_positive(figures):
    numbers = list(numbers_of(figures))
    assert len(numbers) > 100
    assert all(value > 0 for value in numbers)
    assert 0 < figures["cpu"]["while_reading"] <= 1
    assert 0 < figures["disk"]["while_computing"] <= 1


def test_machine_file_round_trip(figures, tmp_path):
    """What the planner reads is what was measured, to the digits written."""
    path = tmp_path / "machine.yaml"
    figures = figures | {"dram": {**figures["dram"], "bytes_per_s": 1e15}}  # noise may put the disk above it
    path.write_text(calibrate.machine_yaml(figures))
    machine = load_machine(path, Span("spec.yaml"))
    assert machine.provenance == "calibrated"
    read = machine_figures(machine)
    written = dict(flat(figures))
    assert read.keys() == written.keys()
    assert read == pytest.approx(written, rel=0.01)


def test_kernels_have_the_planner_s_fields():
    """The two records are written and read under the same names."""
    ours = set(kernels.Kernels.__dataclass_fields__)
    assert set(PlannedKernels.__dataclass_fields__) == ours | {"threads", "dtype"}


def test_both_sides_interpolate_alike():
    table = {1: 3.0, 16: 8.0, 64: 5.0}
    for at in (0.5, 1, 2, 15, 16, 33.3, 64, 1000):
        there = runtime_costs._between(tuple(table.items()), at)
        assert kernels.between(table, at) == pytest.approx(there)
    assert kernels.ROUTE_VALUES == runtime_costs.ROUTE_VALUES
    assert kernels.NEAR_BYTES == runtime_costs.NEAR_BYTES


def test_experts_are_solved_exactly(monkeypatch):
    """From made-up times t = call + weights · p + rows · values · v, the same call, p and v come back."""
    small, large = TINY, replace(TINY, hidden=64, inner=128)
    bench = object.__new__(kernels._Bench)
    bench._sizes = replace(SIZES, small=small, large=large)
    call_s, product_s, value_s = 1e-5, 1e-9, 2e-8
    bench._taken = {("product", rows): [(product_s * rows,)] for rows in SIZES.rows}

    def both(rows):
        return tuple(
            call_s
            + s.expert_weights * product_s * rows
            + (rows * (s.hidden + s.inner) * value_s if rows > 1 else 0.0)
            for s in (small, large)
        )

    monkeypatch.setattr(bench, "_both", both, raising=False)
    found_s, products, values = bench._experts()
    assert found_s == pytest.approx(call_s)
    for rows in (4, 16):
        assert products[rows] == pytest.approx(2 / product_s)
        assert values[rows] == pytest.approx(1 / value_s)


def test_decode_calls_are_solved_exactly(monkeypatch):
    """From made-up times t = call(sequences) + values · v(sequences), calls and v come back."""
    bench = object.__new__(kernels._Bench)
    bench._sizes = SIZES
    call_s, value_s = {1: 2e-4, 4: 5e-4}, {1: 3e-8, 4: 8e-8}

    def layer_s(model, sequences, prompt, scores):
        values = (SIZES.small, SIZES.large)[model].attention_values
        return call_s.get(sequences, 1e-4) + values * value_s.get(sequences, 1e-7), 1e-4 * (1 + model)

    monkeypatch.setattr(bench, "_layer_s", layer_s, raising=False)
    decode_s, _, _, decoding, _ = bench._values({})
    assert decode_s == pytest.approx(call_s)
    assert decoding == pytest.approx({n: n / v for n, v in value_s.items()})


def test_the_planner_counts_what_the_probe_executes(tmp_path):
    """Weights of attention and experts as the planner has them for the same shape."""
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": TINY.hidden,
        "intermediate_size": TINY.inner,
        "num_hidden_layers": TINY.layers,
        "num_attention_heads": TINY.heads,
        "num_key_value_heads": TINY.kv_heads,
        "head_dim": TINY.head_dim,
        "num_local_experts": TINY.experts,
        "num_experts_per_tok": TINY.experts_per_token,
        "vocab_size": TINY.vocab,
        "max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_model(tmp_path, Span("spec.yaml"))
    assert model.parameters.attention == TINY.layers * TINY.attention_weights
    assert model.expert_parameters() == TINY.expert_weights


def test_probe_computes_every_operation():
    with torch.inference_mode():
        probe = Probe(TINY, "float32", 4, 32, 12)
        for ops in (probe.prefill(2, 8), probe.decode(4, 10)):
            assert all(seconds > 0 for seconds in ops.values())
        assert probe.experts(4)[0] > 0
        assert all(seconds > 0 for seconds in probe.generate(3, 4))


def test_accelerator_logic_on_the_cpu():
    """Copies and products of torch's CPU device stand in: rates are positive, the share at most one."""
    sizes = DeviceSizes(copy_bytes=1 << 16, width=128, rows=(1, 8), prompt=16, repeats=2)
    found = measure_device(torch.device("cpu"), sizes)
    assert 0 < found["prefill_efficiency"] <= 1
    assert set(found["flops_per_s"]) == {"bf16", "fp16", "float32"}
    assert all(value > 0 for value in numbers_of(found))


def test_a_machine_file_with_an_accelerator_is_read(figures, tmp_path):
    """As noisy as the other figures."""
    gpu = measure_device(torch.device("cpu"), DeviceSizes(copy_bytes=1 << 16, width=64, rows=(8,), repeats=1))
    notes = gpu.pop("notes")
    gpu |= {"name": "'Some GPU'", "count": 1, "memory_bytes": 8 << 30}
    gpu |= {"memory_bytes_per_s": 2e11, "host_link_bytes_per_s": 1e10}
    path = tmp_path / "machine.yaml"
    dram = {**figures["dram"], "bytes_per_s": 1e15}
    path.write_text(calibrate.machine_yaml({**figures, "dram": dram, "gpu": gpu, "notes": notes}))
    machine = load_machine(path, Span("spec.yaml"))
    assert (machine.gpu, machine.gpus) == ("Some GPU", 1)
    assert machine.level("gpu").bytes_per_s == 2e11


def test_change_table():
    before = {"dram.bytes_per_s": 2e10, "cpu.kernels.bf16.1.row_s": 1e-6, "cpu.kernels.bf16.1.pass_s": 1e-4}
    after = {
        "dram.bytes_per_s": 3e10,
        "disk.bytes": 1e11,
        "cpu.kernels.bf16.1.row_s": 2e-6,
        "cpu.kernels.bf16.1.pass_s": 1.01e-4,
    }
    _head, dram, disk, row, rest = change_table(before, after)
    assert dram.split() == ["dram.bytes_per_s", "2e+10", "3e+10", "+50%"]
    assert disk.split() == ["disk.bytes", "-", "1e+11"]
    assert row.endswith("+100%")
    assert rest.startswith("and 1 figures")


def test_nearest_machine_has_no_gpu():
    machines = load_catalog(None, Span("catalog")).machines
    assert nearest_machine(machines, 3).name == "cpu-2core"
    assert nearest_machine(machines, 40).name == "cpu-32core"
    assert nearest_machine({}, 4) is None


def numbers_of(value):
    if isinstance(value, dict):
        return itertools.chain.from_iterable(numbers_of(inner) for inner in value.values())
    return iter([value])


def flat(figures, prefix=""):
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
