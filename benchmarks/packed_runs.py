"""Tokens per second of one checkpoint as it is and packed, in one run: the same memory, rounds interleaved.

usage: python benchmarks/packed_runs.py [--model small|big] [--machine FILE] [--batches 8,32] [--rounds N]
           [--share 0.25]

Weights and slots of every plan may take `--share` of the bf16 checkpoint's bytes; what else a plan needs (KV
cache, workspace, process) comes on top. A round is a batch of each format, and its streamed pages read alone:
what a pass needs the disk for. Figures are medians of the rounds. To bind it to a slower disk, run it in a
control group that has blkio.throttle.read_bps_device (or io.max) set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import BUILD, SHAPES, packed_checkpoint, weights_bytes
from plans import calibrated, compiled
from roof import PROMPT, TOKENS, Row, _batch, _read_rate
from tables import show

if TYPE_CHECKING:
    from moeplan.runtime_min.plan_file import RuntimePlan

FORMATS = ("bf16", "bf12", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--machine", type=Path, help="a machine file; default: calibrate now")
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.25)
    options = parser.parse_args()
    shape = SHAPES[options.model]
    script = str(Path(__file__).parent / "checkpoints.py")
    subprocess.run([sys.executable, script, shape.name], check=True, stdout=subprocess.DEVNULL)
    machine = options.machine or calibrated(BUILD / "machine.yaml")
    checkpoints = {name: packed_checkpoint(shape, name) for name in FORMATS}
    rows = []
    for batch in map(int, options.batches.split(",")):
        plans = {}
        for name, checkpoint in checkpoints.items():
            plans[name] = _plan(name, checkpoint, batch, machine, options.share * weights_bytes(shape))
        rows += _measure(plans, checkpoints, options.rounds)
    heads = [
        "batch",
        "weights",
        "resident",
        "GB/pass",
        "disk s",
        "pass s",
        "tok/s",
        "times bf16",
        "planned",
    ]
    show(heads, rows)


def _plan(name: str, checkpoint: Path, batch: int, machine: Path, weights: float) -> Path:
    """The runtime folder of a plan whose weights and slots take no more than `weights` bytes."""
    home = BUILD / "packed" / f"{name}-{batch}"
    sizes = (batch, PROMPT, TOKENS)
    folder = compiled(home, checkpoint, "bf16", sizes, machine)
    memory = json.loads((folder / "runtime.json").read_text())["memory"]
    beside = sum(memory[f"{item}_bytes"] for item in ("kv", "workspace", "process"))
    return compiled(home, checkpoint, "bf16", sizes, machine, beside + weights)


def _measure(plans: dict[str, Path], checkpoints: dict[str, Path], rounds: int) -> list[list[str]]:
    from moeplan.runtime_min.cpu import cap_onednn

    cap_onednn()
    from moeplan.runtime_min.plan_file import load
    from moeplan.runtime_min.stream import Engine

    runs: dict[str, list[Row]] = {name: [] for name in plans}
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(Engine(folder, load(folder), checkpoints[name]))
            for name, folder in plans.items()
        }
        for engine in engines.values():
            _batch(engine, 0)
        for number in range(rounds):
            for name, engine in engines.items():
                runs[name].append(_batch(engine, number) | {"rate": _read_rate(engine)})
        return [_cells(name, engines[name].plan, runs) for name in plans]


def _cells(name: str, plan: RuntimePlan, runs: dict[str, list[Row]]) -> list[str]:
    pages, own = plan.pages, runs[name]
    taken = _median([run["decode_s"] for run in own])
    times = [bf16["decode_s"] / run["decode_s"] for bf16, run in zip(runs["bf16"], own, strict=True)]
    disk_s = [run["pass_bytes"] / run["rate"] if run["rate"] else 0.0 for run in own]
    return [
        str(plan.batch.sequences),
        name,
        f"{pages.resident_pages / pages.pages_per_layer:.0%}",
        f"{_median([run['pass_bytes'] for run in own]) / 1e9:.2f}",
        f"{_median(disk_s):.3f}",
        f"{taken:.3f}",
        f"{plan.batch.sequences / taken:.1f}",
        f"{_median(times):.2f} ({min(times):.2f}-{max(times):.2f})",
        f"{plan.predicted.decode_tokens_per_s.value:.1f}",
    ]


def _median(values: list[float]) -> float:
    return float(statistics.median(values))


if __name__ == "__main__":
    main()
