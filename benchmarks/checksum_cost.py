"""What it costs to verify checksums while pages are read: a batch with checksums.json beside the checkpoint
and one without, in turn.

usage: python benchmarks/checksum_cost.py [--model small|big] [--machine FILE] [--share 0.25] [--batch 32]
           [--rounds N]

Each run is a process of its own that opens the checkpoint, reads it whole at least once, and decodes; a
tensor is verified the first time, so later passes cost nothing. Ratios are of the medians of the rounds:
seconds of the prefill, which verifies all that it streams, of a decode pass, and of processors in all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from checkpoints import BUILD, SHAPES, weights_bytes
from plans import calibrated, compiled
from tables import show

from moeplan.runtime_min.checksums import NAME, write_checksums

PROMPT, TOKENS = 32, 5
BENCH = [sys.executable, "-m", "moeplan.runtime_min", "bench"]


def main() -> None:
    options = _options()
    shape = SHAPES[options.model]
    script = str(Path(__file__).parent / "checkpoints.py")
    subprocess.run([sys.executable, script, shape.name], check=True, stdout=subprocess.DEVNULL)
    machine = options.machine or calibrated(BUILD / "machine.yaml")
    plan = _plan(shape.folder, options, machine, options.share * weights_bytes(shape))
    sums = {"verified": write_checksums(shape.folder).read_text(), "not verified": ""}
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in sums}
    for _ in range(options.rounds):
        for way, text in sums.items():
            (shape.folder / NAME).write_text(text) if text else (shape.folder / NAME).unlink(missing_ok=True)
            runs[way].append(_measured(plan, shape.folder))
    (shape.folder / NAME).unlink(missing_ok=True)
    _print(runs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--machine", type=Path, help="a machine file; default: calibrate now")
    parser.add_argument("--share", type=float, default=0.25, help="of the weights that memory holds (0.25)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def _plan(checkpoint: Path, options: argparse.Namespace, machine: Path, weights: float) -> Path:
    """The runtime folder; what the run needs beside its weights comes on top of their share."""
    batch = options.batch, PROMPT, TOKENS
    home = BUILD / "checksum_cost"
    folder = compiled(home, checkpoint, "bf16", batch, machine)
    memory = json.loads((folder / "runtime.json").read_text())["memory"]
    beside: int = sum(memory[f"{item}_bytes"] for item in ("kv", "workspace", "process"))
    return compiled(home, checkpoint, "bf16", batch, machine, beside + weights)


def _measured(plan: Path, checkpoint: Path) -> dict[str, float]:
    """A batch in a process of its own."""
    report = BUILD / "checksum_cost" / "report.json"
    command = [*BENCH, str(plan), "--checkpoint", str(checkpoint), "--tokens", str(TOKENS)]
    before, start = os.times(), time.perf_counter()
    subprocess.run([*command, "--report", str(report)], check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, os.times()
    measured = json.loads(report.read_text())["measured"]
    return {
        "load": seconds - measured["elapsed_s"],
        "prefill": measured["prefill_s"],
        "decode pass": measured["decode_s"] / measured["decode_passes"],
        "processors": sum(after[2:4]) - sum(before[2:4]),
        "GB read": measured["bytes_read"] / 1e9,
    }


def _print(runs: dict[str, list[dict[str, float]]]) -> None:
    def middle(way: str, name: str) -> float:
        return statistics.median(run[name] for run in runs[way])

    names = [*runs["verified"][0]]
    rows = [[way, *(f"{middle(way, name):.2f}" for name in names)] for way in runs]
    ratios = [middle("verified", name) / middle("not verified", name) for name in names]
    show(["seconds", *names], [*rows, ["ratio", *(f"{ratio:.2f}" for ratio in ratios)]])


if __name__ == "__main__":
    main()
