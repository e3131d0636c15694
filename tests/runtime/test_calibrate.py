"""The machine file: what PyYAML reads back is what was measured, as numbers."""

import yaml

from moeplan.runtime_min import calibrate

FIGURES = {
    "cores": 2,
    "flops_per_s": {"float32": 2e11, "bf16": 1.4e11},
    "launch_s": 5e-6,
    "dram_bytes": 25_000_000_000,
    "dram_bytes_per_s": 2.2e10,
    "disk_bytes": 270_000_000_000,
    "disk_bytes_per_s": 2e9,
}
TEXT = """\
# Measured by `moeplan calibrate`.
name: this-machine
provenance: calibrated
cpu: {cores: 2, flops_per_s: {float32: 2.0e+11, bf16: 1.4e+11}, launch_s: 5.0e-06}
dram: {bytes: 25000000000, bytes_per_s: 2.2e+10}
disk: {bytes: 270000000000, bytes_per_s: 2.0e+09}
"""


def test_machine_yaml():
    assert calibrate.machine_yaml(FIGURES) == TEXT
    read = yaml.safe_load(TEXT)
    assert read["cpu"]["flops_per_s"] == FIGURES["flops_per_s"]
    assert read["disk"]["bytes_per_s"] == 2e9


def test_measure(tmp_path, monkeypatch):
    """Every figure is positive, and the file it reads is gone afterwards."""
    rate = calibrate._rate
    monkeypatch.setattr(calibrate, "FILE_BYTES", 16 << 20)
    monkeypatch.setattr(calibrate, "DRAM_BYTES", 16 << 20)
    monkeypatch.setattr(calibrate, "_rate", lambda work, amount, _: rate(work, amount, 0.01))
    figures = calibrate.measure(tmp_path)
    assert figures.keys() == FIGURES.keys()
    assert all(v > 0 for key, v in figures.items() if key != "flops_per_s")
    assert 0 < figures["launch_s"] < 1e-3
    assert all(v > 0 for v in figures["flops_per_s"].values())
    assert list(tmp_path.iterdir()) == []
