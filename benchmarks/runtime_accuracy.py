"""How well plans predict the bundled runtime on this machine: prefill and decode, predicted and measured.

usage: python benchmarks/runtime_accuracy.py [--machine FILE] [--quick]

Calibrates this machine (unless a machine file is given), compiles a spec for each row, runs the emitted plan
on a random checkpoint of Mixtral's architecture and prints tokens/s beside the plan's. Checkpoints are
written under build/bench/accuracy once. Rounds go over all rows in turn, so that a machine whose speed drifts
treats all alike; a row's figure is the median of its rounds. Each round warms up with a batch, then measures
one; if other processes had more than a tenth of a core meanwhile, one more. The disk's rate is the one seen:
bytes read over the time of all passes.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from moeplan.runtime_min.cpu import cap_onednn

cap_onednn()

from checkpoints import BUILD, Shape, write_checkpoint  # noqa: E402
from plans import calibrated, compiled  # noqa: E402

from moeplan.runtime_min.engine import Generation  # noqa: E402
from moeplan.runtime_min.plan_file import RuntimePlan, load  # noqa: E402
from moeplan.runtime_min.sampling import Sampling  # noqa: E402
from moeplan.runtime_min.stream import Engine  # noqa: E402

HOME = BUILD / "accuracy"
ROUNDS = 3
OTHERS = 0.1  # of a core


def shape(hidden: int, inner: int, layers: int, experts: int, top: int = 2) -> Shape:
    """Half as many key heads as heads."""
    name = f"accuracy/{hidden}-{inner}-{layers}-{experts}-{top}"
    kv_heads = max(1, hidden // 64 // 2)
    return Shape(name, layers, hidden, inner, kv_heads, experts, top, vocab=8192)


TINY, SMALL = shape(256, 512, 4, 4), shape(384, 768, 6, 8)
MIDDLE, WIDE, BIG = shape(512, 1024, 8, 8), shape(768, 1536, 8, 16), shape(1024, 2560, 12, 8)


@dataclass
class Row:
    """One plan: a model, a dtype, requests of one size, a memory limit in GiB (0: all there is)."""

    model: Shape
    dtype: str
    requests: int
    prompt: int
    output: int
    memory: float = 0.0
    folder: Path = Path()
    plan: RuntimePlan | None = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)


ROWS = [
    Row(TINY, "bf16", 1, 32, 64),
    Row(TINY, "bf16", 8, 64, 48),
    Row(TINY, "bf16", 32, 32, 48),
    Row(TINY, "bf16", 128, 32, 24),
    Row(TINY, "float32", 256, 48, 16),
    Row(SMALL, "bf16", 8, 32, 32),
    Row(SMALL, "bf16", 128, 64, 12),
    Row(SMALL, "float32", 1, 128, 24),
    Row(SMALL, "float32", 32, 64, 16),
    Row(MIDDLE, "bf16", 1, 256, 24),
    Row(MIDDLE, "bf16", 32, 64, 12),
    Row(MIDDLE, "bf16", 256, 32, 6),
    Row(MIDDLE, "float32", 8, 64, 12),
    Row(MIDDLE, "float32", 128, 16, 6),
    Row(WIDE, "bf16", 8, 128, 8),
    Row(WIDE, "bf16", 128, 32, 5),
    Row(BIG, "bf16", 8, 32, 8),
    Row(BIG, "bf16", 32, 64, 5),
    Row(MIDDLE, "bf16", 32, 32, 8, 0.8),
    Row(WIDE, "bf16", 32, 32, 6, 0.9),
    Row(WIDE, "bf16", 128, 32, 5, 1.2),
    Row(BIG, "bf16", 8, 32, 5, 0.9),
    Row(BIG, "bf16", 32, 32, 5, 1.5),
    Row(BIG, "bf16", 256, 16, 4, 1.5),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", type=Path, help="a machine file; default: calibrate now")
    parser.add_argument("--quick", action="store_true", help="one round")
    options = parser.parse_args()
    start = time.perf_counter()
    machine = options.machine or calibrated(HOME / "machine.yaml")
    print(f"calibrated in {time.perf_counter() - start:.0f} s, load {os.getloadavg()[0]:.1f}")
    for number, row in enumerate(ROWS):
        write_checkpoint(row.model)
        compile_row(row, machine, HOME / f"row{number}")
    for _ in range(1 if options.quick else ROUNDS):
        for row in ROWS:
            run(row)
    print(table(ROWS))
    print(summary(ROWS))
    print(f"{time.perf_counter() - start:.0f} s in all, load {os.getloadavg()[0]:.1f}")


def compile_row(row: Row, machine: Path, home: Path) -> None:
    """Compile the row's spec; keep the folder and the plan that the runtime gets."""
    batch = row.requests, row.prompt, row.output
    row.folder = compiled(home, row.model.folder, row.dtype, batch, machine, row.memory * 2**30)
    row.plan = load(row.folder)


def run(row: Row) -> None:
    """One round of a row: load, warm up, measure; measure again if others were busy."""
    assert row.plan is not None
    with Engine(row.folder, row.plan, row.model.folder) as engine:
        batch(engine, row)
        for attempt in range(2):
            before, busy = measured(engine), others_s()
            start = time.perf_counter()
            batch(engine, row)
            elapsed = time.perf_counter() - start
            if attempt or others_s() - busy < OTHERS * elapsed + 0.02:
                break
        prompt, prefill_s, decoded, decode_s, read = (
            b - a for a, b in zip(before, measured(engine), strict=True)
        )
        row.prefill.append(prompt / prefill_s)
        row.decode.append(decoded / decode_s)
        row.read.append(read / (prefill_s + decode_s))


def batch(engine: Engine, row: Row) -> None:
    """One full batch of random prompts."""
    numbers = random.Random(len(row.prefill))
    prompts = [
        numbers.choices(range(row.model.vocab), k=row.prompt) for _ in range(engine.plan.batch.sequences)
    ]
    engine.run([Generation(prompt, row.output, Sampling(0.0, 1.0, 0)) for prompt in prompts])


def measured(engine: Engine) -> tuple[float, ...]:
    s = engine.stats
    return s.prefilled_tokens, s.prefill_s, s.decode_tokens, s.decode_s, engine.disk.bytes_read


def others_s() -> float:
    """Processor seconds that other processes, and the host, have taken so far."""
    numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    idle, waiting = numbers[3], numbers[4]
    own = os.times()
    return (sum(numbers) - idle - waiting) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def table(rows: list[Row]) -> str:
    lines = [
        "hidden inner layers experts dtype    N  prompt  thr  weights   prefill tok/s           decode tok/s"
        "            disk",
        " " * 52 + "in RAM      plan  measured  error     plan  measured  error  plan's rate seen",
    ]
    for row in rows:
        assert row.plan is not None
        m, pages = row.model, row.plan.pages
        share = pages.resident_pages / pages.pages_per_layer
        predicted = row.plan.predicted
        lines.append(
            f"{m.hidden:6} {m.inner:5} {m.layers:6} {m.experts:7} {row.dtype:8}{row.plan.batch.sequences:4}"
            f"{row.prompt:7}{row.plan.threads:5}{share:9.0%}  "
            f"{figures(predicted.prefill_tokens_per_s.value, row.prefill)}"
            f"{figures(predicted.decode_tokens_per_s.value, row.decode)}"
            + (f"{statistics.median(row.read) / 1e9:10.2f} GB/s" if row.read[0] else "")
        )
    return "\n".join(lines)


def figures(plan: float, taken: list[float]) -> str:
    middle = statistics.median(taken)
    return f"{plan:9,.0f}{middle:10,.0f}{plan / middle - 1:+7.0%}"


def summary(rows: list[Row]) -> str:
    """Errors of the plan relative to what was measured, and how often the interval held it."""
    lines = []
    for phase in ("prefill", "decode"):
        errors, inside = [], 0
        for row in rows:
            assert row.plan is not None
            plan = getattr(row.plan.predicted, f"{phase}_tokens_per_s")
            middle = statistics.median(getattr(row, phase))
            errors.append(abs(plan.value / middle - 1))
            inside += plan.low <= middle <= plan.high
        lines.append(
            f"{phase:8} median error {statistics.median(errors):.1%}, worst {max(errors):.0%}; "
            f"{inside} of {len(rows)} inside the 90 % interval"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
