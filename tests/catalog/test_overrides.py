"""A user's own catalog and machine files: what they change, and how every mistake in them is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.catalog import Catalog, load_catalog, load_machine
from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.ir.machine import Machine

WHERE = Span("spec.yaml", 7, 3)

MACHINE = """\
# Measured by `moeplan calibrate`.
name: my-box
provenance: calibrated
cpu: {cores: 2, flops_per_s: {float32: 2.0e+11, bf16: 1.4e+11}, launch_s: 5.0e-6}
dram: {bytes: 25000000000, bytes_per_s: 2.2e+10}
disk: {bytes: 270000000000, bytes_per_s: 2.0e+9}
"""

GPUS = """\
sources:
  ours: {citation: "measured here", date: 2026-08}
gpus:
  T4:
    memory_bytes: 15 GiB
    memory_bytes_per_s: [240.0e+9, ours]
    flops_per_s: {fp16: [60.0e+12, ours]}
    host_link_bytes_per_s: 12.0e+9
    peer_bytes_per_s: 12.0e+9
"""

MACHINES = """\
hosts:
  ours:
    threads_per_core: 2
    flops_per_s_per_core: {float32: 50.0e+9}
    dram_bytes_per_s_per_core: 5.0e+9
    dram_bytes_per_s_most: 60.0e+9
    disk_bytes: 1 TB
    disk_bytes_per_s: 1.0e+9
machines:
  our-box: {host: ours, cpu: {vcpus: 32}, dram: {bytes: 64 GiB}, gpu: {name: T4, count: 2}}
"""

MODELS = """\
sources:
  ours: {citation: "our config.json", date: 2026-08-01}
models:
  our-moe:
    source: ours
    config:
      model_type: mixtral
      hidden_size: 64
      num_hidden_layers: 2
      num_attention_heads: 4
      num_key_value_heads: 2
      intermediate_size: 96
      num_local_experts: 4
      num_experts_per_tok: 2
      vocab_size: 100
      max_position_embeddings: 64
"""

OFFERS = """\
cloud,region,instance,on_demand_usd_per_hour,spot_usd_per_hour,date,source
aws,us-east-1,g4dn.xlarge,0.5,0.2,2026-08-03,our-bill
aws,mars-1,our-box,1.5,,2026-08,our-bill
"""

FILES = {"gpus.yaml": GPUS, "machines.yaml": MACHINES, "models.yaml": MODELS, "offers.csv": OFFERS}


def machine_of(tmp_path: Path, text: str) -> Machine:
    file = tmp_path / "machine.yaml"
    file.write_text(text, encoding="utf-8")
    return load_machine(file, WHERE)


def catalog_of(tmp_path: Path, **texts: str) -> Catalog:
    for name, text in texts.items():
        (tmp_path / name.replace("_", ".")).write_text(text, encoding="utf-8")
    return load_catalog(tmp_path, WHERE)


# Machine files ----------------------------------------------------------------------------------------------


def test_machine_file(tmp_path: Path) -> None:
    """Calibrated rates are reached rates: efficiencies are 1."""
    machine = machine_of(tmp_path, MACHINE)
    assert (machine.name, machine.gpus, machine.cpu_cores) == ("my-box", 0, 2)
    assert (machine.provenance, machine.sigma, machine.launch_s) == ("calibrated", 0.30, 5e-6)
    dram, disk = machine.levels
    assert (dram.bytes, dram.bytes_per_s, dram.memory_efficiency) == (25_000_000_000, 2.2e10, 1.0)
    assert (disk.up_bytes_per_s, disk.up_efficiency) == (2.0e9, 1.0)
    assert machine.source == "machine.yaml"


KERNELS = """\
  kernels:
    float32:
      2:
        attention_s: 1.3e-04
        route_s: 4.0e-05
        expert_s: 3.2e-05
        row_s: 5.7e-06
        pass_s: 3.0e-04
        sequence_s: 7.6e-07
        product_flops_per_s: {1: 7.9e+10, 16: 1.6e+11}
        far_bytes_per_s: {67108864: 5.0e+11, 536870912: 3.2e+10}
        attention_flops_per_s: {16: 8.8e+10, 128: 1.6e+11}
        kv_bytes_per_s: 2.4e+10
        head_s: 2.7e-08
        attention_values_per_s: {1: 1.8e+07, 128: 3.7e+08}
        decode_values_per_s: {1: 1.8e+07, 64: 1.2e+08}
        route_values_per_s: {1: 1.0e+07, 128: 4.4e+08}
        expert_values_per_s: {1: 3.6e+08, 64: 5.8e+08}
        score_values_per_s: 7.0e+08
"""
CALIBRATED = MACHINE.replace(
    MACHINE.splitlines()[3] + "\n",
    "cpu:\n  cores: 2\n  flops_per_s: {float32: 2.0e+11, bf16: 1.4e+11}\n  while_reading: 0.8\n" + KERNELS,
)


def test_machine_file_with_kernels(tmp_path: Path) -> None:
    """Measured operators narrow the interval; tables are read in ascending order."""
    machine = machine_of(tmp_path, CALIBRATED)
    (kernels,) = machine.kernels
    assert (kernels.dtype, kernels.threads, kernels.head_s) == ("float32", 2, 2.7e-8)
    assert kernels.product_flops_per_s == ((1, 7.9e10), (16, 1.6e11))
    assert (machine.sigma, machine.compute_kept, machine.disk_kept) == (0.15, 0.8, 0.92)
    assert machine.disk_sigma == 0.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("7.9e+10, 16", "fast, 16", "product_flops_per_s: '1' is 'fast', expected a number"),
        ("{1: 7.9e+10, 16", "{some: 7.9e+10, 16", "'some' is no number of rows"),
        ("{1: 7.9e+10, 16: 1.6e+11}", "{}", "'product_flops_per_s' holds no figure"),
        ("{1: 7.9e+10, 16: 1.6e+11}", "7.9e+10", "expected a group of keys"),
        ("{1: 7.9e+10", "{1: 0", "'1' is 0, expected 1000 to 1e+19"),
        ("kv_bytes_per_s: 2.4e+10", "kv_bytes_per_s: -1", "'kv_bytes_per_s' is -1"),
        ("        head_s: 2.7e-08\n", "", "missing key 'head_s'"),
        ("head_s: 2.7e-08", "head_s: 0", "'head_s' is 0, expected 1e-12 to 1"),
        ("      2:\n", "      3:\n", "'3' is no number of threads"),
        ("      2:\n", "      all:\n", "'all' is no number of threads"),
        ("    float32:\n", "    fp7:\n", "unknown key 'fp7'"),
        ("while_reading: 0.8", "while_reading: 1.8", "'while_reading' is 1.8"),
        ("head_s: 2.7e-08", "heads_s: 2.7e-08", "unknown key 'heads_s'"),
    ],
)
def test_mistakes_in_kernels(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CALIBRATED
    with pytest.raises(CompileError) as raised:
        machine_of(tmp_path, CALIBRATED.replace(old, new))
    assert message in str(raised.value)
    assert re.search(r"machine\.yaml:\d+:\d+: ", str(raised.value))


def test_machine_file_with_a_known_gpu(tmp_path: Path) -> None:
    """Figures given are reached rates; those left out are the catalog's, with its efficiencies."""
    gpu = "gpu: {name: T4, memory_bytes_per_s: 2.4e+11, host_link_bytes_per_s: 1.2e+10}\n"
    machine = machine_of(tmp_path, MACHINE + gpu)
    level = machine.level("gpu")
    assert (machine.gpu, machine.gpus) == ("T4", 1)
    assert (level.bytes_per_s, level.memory_efficiency) == (2.4e11, 1.0)
    assert (level.flops_per_s["fp16"], level.prefill_efficiency) == (65e12, 0.42)
    assert (machine.level("dram").up_bytes_per_s, machine.level("dram").up_efficiency) == (1.2e10, 1.0)


def test_machine_file_with_an_unknown_gpu(tmp_path: Path) -> None:
    gpu = """\
gpu:
  name: X1
  memory_bytes: 8 GiB
  memory_bytes_per_s: 2.0e+11
  flops_per_s: {fp16: 2.0e+13}
  host_link_bytes_per_s: 1.0e+10
  peer_bytes_per_s: 1.0e+10
"""
    assert machine_of(tmp_path, MACHINE + gpu).level("gpu").bytes == 8 * 2**30


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("2.2e+10}", "22e9}", "5:41: machine my-box: dram: 'bytes_per_s' is '22e9', expected a number"),
        ("2.2e+10}", "22e9}", "YAML reads this as text: write the point and the sign"),
        ("2.2e+10}", ".nan}", "5:41: machine my-box: dram: 'bytes_per_s' is nan, expected a number"),
        ("2.2e+10}", "true}", "'bytes_per_s' is true, expected a number"),
        ("2.2e+10}", "0}", "'bytes_per_s' is 0, expected 1e+06 to 1e+15"),
        ("2.2e+10}", "-4}", "'bytes_per_s' is -4"),
        ("2.2e+10}", "2.2e+10, speed: 3}", "5:50: machine my-box: dram: unknown key 'speed'"),
        ("2.2e+10}", "[2.2e+10, rumour]}", "source 'rumour' is not under 'sources'"),
        ("2.2e+10}", "[1, 2, 3]}", "is a list, expected a number or [number, source]"),
        ("cores: 2", "cores: two", "'cores' is 'two', expected a number"),
        ("cores: 2", "vcpus: 2", "missing key 'cores'"),
        ("bytes: 25000000000", "bytes: 24 gigs", "'bytes' is '24 gigs', expected a number"),
        ("bytes: 25000000000", "bytes: 12:30:00", "'12:30:00' is not a plain decimal number"),
        ("provenance: calibrated", "provenance: rumour", "one of: analytic, calibrated, datasheet, measured"),
        ("provenance: calibrated\n", "", "missing key 'provenance'"),
        ("disk:", "disc:", "missing key 'disk'"),
        ("disk:", "disc:", "unknown key 'disc'"),
        ("2.0e+9}", "9.0e+10}", "the disk is faster than the memory it feeds"),
        ("{float32: 2.0e+11, bf16: 1.4e+11}", "{fp7: 1.0e+11}", "unknown key 'fp7'"),
        ("{float32: 2.0e+11, bf16: 1.4e+11}", "{}", "no dtype given"),
        ("name: my-box", "name: [a]", "'name' is a list, expected a word"),
        ("name: my-box", "name: my-box\nname: b", "3:1: key 'name' appears twice"),
        ("name: my-box", "name: my-box\nhost: nowhere", "unknown host family 'nowhere'"),
        ("name: my-box", "name: my-box\ngpu: {name: T9}", "unknown GPU 'T9'"),
        ("name: my-box", "name: my-box\ngpu: {name: T4, count: 0}", "'count' is 0, expected 1 to 64"),
        ("name: my-box", "name: my-box\ngpu: {name: T4, count: 1.5}", "expected a whole number"),
        (
            "name: my-box",
            "name: my-box\ngpu: {name: T4, host_link_bytes_per_s: 4.0e+11}",
            "the host link is faster than the memory it feeds",
        ),
        ("name: my-box", "name: &a [x]\nsource: *a", "anchors and aliases are not read here"),
        ("cpu: {", "cpu: [", "not YAML"),
    ],
)
def test_mistakes_are_shown_at_their_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MACHINE
    with pytest.raises(CompileError) as raised:
        machine_of(tmp_path, MACHINE.replace(old, new))
    text = str(raised.value)
    assert message in text
    assert re.search(r"machine\.yaml:\d+:\d+: ", text)


def test_tags_execute_nothing(tmp_path: Path) -> None:
    text = MACHINE.replace("cpu: {", "cpu: !!python/object:os.system {")
    assert machine_of(tmp_path, text).name == "my-box"


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = "name: x\nprovenance: measured\ncpu: {cores: 0}\ndram: {bytes: -1}\n"
    with pytest.raises(CompileError) as raised:
        machine_of(tmp_path, text)
    messages = str(raised.value)
    for part in ("'cores' is 0", "missing key 'flops_per_s'", "'bytes' is -1", "missing key 'bytes_per_s'"):
        assert part in messages
    assert "missing key 'disk'" in messages


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"7", b"\xff\xfe", b"\x00", b"[" * 100_000, b"- " * 10_000 + b"x", b"a: 1\n---\nb: 2"],
)
def test_no_yaml_at_all(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "machine.yaml"
    file.write_bytes(content)
    with pytest.raises(CompileError):
        load_machine(file, WHERE)


def test_missing_machine_file(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="no such file") as raised:
        load_machine(tmp_path / "machine.yaml", WHERE)
    assert raised.value.diagnostics[0].span == WHERE


# Catalog folders --------------------------------------------------------------------------------------------


def test_a_gpu_is_replaced_everywhere(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, gpus_yaml=GPUS)
    level = catalog.machines["g4dn.xlarge"].level("gpu")
    assert (level.bytes, level.bytes_per_s, level.prefill_efficiency) == (15 * 2**30, 240e9, 0.72)
    assert catalog.sources["ours"] == "measured here (2026-08)"
    assert load_catalog(None, WHERE).gpus["T4"].memory_bytes_per_s == 320e9


def test_a_machine_is_added(tmp_path: Path) -> None:
    """16 cores at 5 GB/s would be 80 GB/s; the server has 60."""
    machine = catalog_of(tmp_path, machines_yaml=MACHINES).machines["our-box"]
    assert (machine.cpu_cores, machine.gpus, machine.level("dram").bytes_per_s) == (16, 2, 60e9)
    assert machine.level("disk").bytes == 10**12


def test_a_model_is_added(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, models_yaml=MODELS)
    assert catalog.models["our-moe"].source == "ours"
    assert len(catalog.models) == len(load_catalog(None, WHERE).models) + 1


def test_prices_are_replaced_and_added(tmp_path: Path) -> None:
    catalog = catalog_of(tmp_path, machines_yaml=MACHINES, offers_csv=OFFERS)
    prices = {(o.region, o.machine): o for o in catalog.offers if o.cloud == "aws"}
    assert prices["us-east-1", "g4dn.xlarge"].spot_usd_per_hour == 0.2
    assert prices["mars-1", "our-box"].spot_usd_per_hour is None
    assert len(catalog.offers) == len(load_catalog(None, WHERE).offers) + 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.5,0.2", "-0.5,0.2", "offers.csv:2:27: '-0.5' is not a price"),
        ("0.5,0.2", "0,0.2", "'0' is not a price"),
        ("0.5,0.2", "nan,0.2", "'nan' is not a price"),
        ("0.5,0.2", ",0.2", "'' is not a price"),
        ("0.5,0.2", "0.5,free", "'free' is not a price"),
        ("aws,us", "ibm,us", "offers.csv:2:1: unknown cloud 'ibm'"),
        ("g4dn.xlarge", "g4dn.tiny", "offers.csv:2:15: unknown machine type 'g4dn.tiny'"),
        ("2026-08-03", "yesterday", "'yesterday' is not a date"),
        (",our-bill", ",", "'source' is empty"),
        ("us-east-1", "../../mine", "offers.csv:2:5: '../../mine' is not a region"),
        (",our-bill", "", "6 columns, expected 7"),
        ("cloud,", "clouds,", "wrong columns"),
        ("aws,mars-1,our-box", "aws,us-east-1,g4dn.xlarge", "a second price of g4dn.xlarge"),
        ("aws,mars-1", 'aws,"mars-1', "not CSV"),
    ],
)
def test_wrong_prices(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(CompileError) as raised:
        catalog_of(tmp_path, machines_yaml=MACHINES, offers_csv=OFFERS.replace(old, new, 1))
    assert message in str(raised.value)


def test_mistakes_of_all_files_at_once(tmp_path: Path) -> None:
    with pytest.raises(CompileError) as raised:
        catalog_of(
            tmp_path,
            gpus_yaml=GPUS.replace("240.0e+9", "240e9"),
            machines_yaml=MACHINES.replace("32}", "0}"),
            models_yaml=MODELS.replace("num_local_experts: 4", "num_local_experts: 1"),
            offers_csv=OFFERS.replace("0.2", "x"),
        )
    text = str(raised.value)
    for place in ("gpus.yaml:6:", "machines.yaml:10:", "models.yaml:7:", "offers.csv:2:"):
        assert place in text


def test_folder_problems(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(CompileError) as raised:
            load_catalog(folder, WHERE)
        assert raised.value.diagnostics[0].span == WHERE


def test_unknown_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match="unknown key 'gpu'"):
        catalog_of(tmp_path, gpus_yaml="gpu: {}\n")


PIECES = st.sampled_from(
    [
        "null",
        "-1",
        "0",
        "1e9",
        "1.0e+400",
        ".inf",
        "true",
        "[",
        "{",
        "}",
        ": ",
        "- ",
        "&a",
        "*a",
        "\n",
        "\t",
        "'",
    ]
) | st.text(max_size=6)


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_spoiled_files_never_give_anything_but_a_diagnosis(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    """Cut a stretch out of a good file and put something else in its place."""
    text = FILES[name]
    start = data.draw(st.integers(0, len(text)))
    end = min(len(text), start + data.draw(st.integers(0, 12)))
    spoiled = text[:start] + data.draw(PIECES) + text[end:]
    folder = tmp_path_factory.mktemp("catalog")
    for other, good in FILES.items():
        (folder / other).write_bytes((spoiled if other == name else good).encode("utf-8", "surrogatepass"))
    try:
        load_catalog(folder, WHERE)
    except CompileError:
        return


@settings(max_examples=150)
@given(start=st.integers(0, len(MACHINE)), length=st.integers(0, 12), piece=PIECES)
def test_spoiled_machine_files(
    tmp_path_factory: pytest.TempPathFactory, start: int, length: int, piece: str
) -> None:
    file = tmp_path_factory.mktemp("machine") / "machine.yaml"
    text = MACHINE[:start] + piece + MACHINE[start + length :]
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        machine = load_machine(file, WHERE)
    except CompileError:
        return
    assert all(level.bytes >= 1 and level.bytes_per_s > 0 for level in machine.levels)
