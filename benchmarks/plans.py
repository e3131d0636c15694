"""What benchmarks run: this machine calibrated and a spec compiled, by the commands that users have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moeplan.codegen.emit.runtime import model_plan
from moeplan.planner.diagnostics import Span
from moeplan.planner.model_config import load_model
from moeplan.runtime_min.plan_file import ModelPlan

MOEPLAN = [sys.executable, "-c", "from moeplan.planner.cli import main; main()"]


def calibrated(machine: Path) -> Path:
    """The machine file, written now."""
    machine.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([*MOEPLAN, "calibrate", "-o", str(machine)], check=True, stdout=subprocess.DEVNULL)
    return machine


def compiled(
    home: Path,
    checkpoint: Path,
    dtype: str,
    batch: tuple[int, int, int],
    machine: Path,
    memory_bytes: float = 0.0,
) -> Path:
    """The runtime folder of a plan under `home` for (requests, prompt and output tokens), with a memory limit
    where it is not 0."""
    home.mkdir(parents=True, exist_ok=True)
    requests, prompt, output = batch
    memory = f", memory: {memory_bytes / 2**30:.4f} GiB" if memory_bytes else ""
    (home / "spec.yaml").write_text(
        f"name: bench\nmodel: {{path: {checkpoint}, dtype: {dtype}}}\n"
        f"workload: {{batch: {{requests: {requests}, prompt: {prompt}, output: {output}}}}}\n"
        f"machine: {{file: {machine.resolve()}{memory}}}\n"
    )
    command = [*MOEPLAN, "compile", str(home / "spec.yaml"), "--force", "--no-html"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (folder,) = (home / "bench.plan" / "runtime").iterdir()
    return folder


def model_of(checkpoint: Path) -> ModelPlan:
    """A checkpoint as a plan describes it, computed in bf16."""
    return model_plan(load_model(checkpoint, Span(str(checkpoint))), "", "bf16")
