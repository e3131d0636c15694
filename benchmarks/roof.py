"""How near the bundled runtime comes to its own roof: the disk's rate, or its kernels with nothing to read.

usage: python benchmarks/roof.py [--model small|big] [--machine FILE] [--shares 0.25,0.5,1] [--batches 32,128]
           [--rounds N] [--balance] [--all]

Each row is a plan of which weights and slots may take a share of the checkpoint's bytes; what else it needs
(KV cache, workspace, process) comes on top. Rounds interleave three things in a process: a batch as planned;
the same batch, its reads left out, so that the same kernels find stale pages in the slots; and all pages that
the plan streams, read alone by the plan's readers in the plan's blocks. The roof of a pass is the longer of
compute alone and its bytes over that rate. Figures are medians of the rounds; `--all` lists each.
The GEMM ceiling is the fastest of the runtime's expert kernel and torch's products at the model's shape, from
128 to 1,024 rows. `--balance` adds the batch at which disk and compute take equally long, by the first share.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import BUILD, SHAPES, Shape, weights_bytes
from plans import calibrated, compiled
from tables import show

if TYPE_CHECKING:
    from moeplan.runtime_min.plan_file import RuntimePlan
    from moeplan.runtime_min.stream import Engine

GEMM_ROWS = (128, 256, 512, 1024)
PROMPT, TOKENS = 32, 5
Row = dict[str, Any]


def main() -> None:
    options = _options()
    if options.child:
        folder, checkpoint = map(Path, options.child)
        print(json.dumps(_measure(folder, checkpoint, options.rounds)))
        return
    shape = SHAPES[options.model]
    script = str(Path(__file__).parent / "checkpoints.py")
    subprocess.run([sys.executable, script, shape.name], check=True, stdout=subprocess.DEVNULL)
    machine = options.machine or calibrated(BUILD / "machine.yaml")
    rows = []
    for share in options.shares:
        for batch in options.batches:
            rows.append(_row(shape, share, batch, machine, options.rounds))
            print(f"{share:.0%} of weights, batch {batch}: measured", file=sys.stderr)
    if options.balance:
        first = [row for row in rows if row["share"] == options.shares[0]]
        rows.append(_row(shape, options.shares[0], _balance(first), machine, options.rounds))
    _print(rows, options.all)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(kind: Callable[[str], float]) -> Callable[[str], list[float]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--machine", type=Path, help="a machine file; default: calibrate now")
    parser.add_argument("--shares", type=several(float), default=[0.25, 0.5, 1.0])
    parser.add_argument("--batches", type=several(int), default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--balance", action="store_true", help="add the batch where disk and compute balance")
    parser.add_argument("--all", action="store_true", help="list every round")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _row(shape: Shape, share: float, batch: int, machine: Path, rounds: int) -> Row:
    """Plan and measure, the latter in a process of its own so that its peak is the plan's."""
    folder = _compile(shape, batch, machine, 0.0)
    memory = json.loads((folder / "runtime.json").read_text())["memory"]
    beside: int = sum(memory[f"{item}_bytes"] for item in ("kv", "workspace", "process"))
    if share < 1:
        folder = _compile(shape, batch, machine, beside + share * weights_bytes(shape))
    command = [sys.executable, __file__, "--rounds", str(rounds), "--child", str(folder), str(shape.folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"share": share, **json.loads(done.stdout)}


def _compile(shape: Shape, batch: int, machine: Path, memory_bytes: float) -> Path:
    """The runtime folder of a plan for `batch` requests."""
    return compiled(BUILD / "roof", shape.folder, "bf16", (batch, PROMPT, TOKENS), machine, memory_bytes)


def _balance(rows: list[Row]) -> int:
    """Where compute takes as long as the disk: between the two batches beside it, or beyond the last two.

    Compute grows with a power of the batch, fitted through those two.
    """
    low = max((i for i, row in enumerate(rows[:-1]) if _disk_s(row) > _median(row, "compute_s")), default=0)
    one, two = rows[low], rows[low + 1]
    ratio = _median(two, "compute_s") / _median(one, "compute_s")
    power = math.log(ratio) / math.log(two["batch"] / one["batch"])
    wanted = _disk_s(one) / _median(one, "compute_s")
    batch: float = one["batch"] * wanted ** (1 / power)
    return max(1, round(batch))


# --- the child: one plan, measured


def _measure(folder: Path, checkpoint: Path, rounds: int) -> Row:
    """Seconds per pass and bytes per pass, a list entry per round."""
    from moeplan.runtime_min.cpu import cap_onednn

    cap_onednn()
    from moeplan.runtime_min.plan_file import load
    from moeplan.runtime_min.stream import Engine

    plan = load(folder)
    rows: list[Row] = []
    with Engine(folder, plan, checkpoint) as engine:
        _batch(engine, 0)
        peak = _peak_bytes()
        for number in range(rounds):
            run = _batch(engine, number)
            compute = _batch(engine, number, read=False)
            rate = _read_rate(engine)
            rows.append(
                {
                    "decode_s": run["decode_s"],
                    "compute_s": compute["decode_s"],
                    "prefill_s": run["prefill_s"],
                    "prefill_compute_s": compute["prefill_s"],
                    "pass_bytes": run["pass_bytes"],
                    "disk_bytes_per_s": rate,
                }
            )
    lists = {name: [row[name] for row in rows] for name in rows[0]}
    return {**_facts(plan), **lists, "peak_bytes": peak, "gemm_flops_per_s": _gemm_ceiling(plan)}


def _facts(plan: RuntimePlan) -> Row:
    m, decode, pages = plan.model, plan.predicted.decode_tokens_per_s, plan.pages
    attention = 2 * m.hidden * m.head_dim * (m.heads + m.kv_heads)
    experts = m.experts_per_token * 3 * m.hidden * m.expert_intermediate
    return {
        "batch": plan.batch.sequences,
        "resident": pages.resident_pages / pages.pages_per_layer,
        "budget_bytes": plan.memory.budget_bytes,
        "low": decode.low,
        "high": decode.high,
        "prefill_flops": 2 * m.layers * (attention + experts) * plan.batch.sequences * PROMPT,
    }


def _batch(engine: Engine, seed: int, read: bool = True) -> Row:
    """A full batch; `read=False` leaves every read out."""
    from moeplan.runtime_min.engine import Generation
    from moeplan.runtime_min.sampling import Sampling

    numbers = random.Random(seed)
    prompts = [
        numbers.choices(range(engine.plan.model.vocab), k=PROMPT) for _ in range(engine.plan.batch.sequences)
    ]
    kept, before, bytes_before = engine._read, engine.stats, engine.disk.bytes_read
    engine.stats = type(before)()
    if not read:
        engine._read = lambda layer, page, slot: ()
    passes: list[None] = []
    try:
        requests = [Generation(prompt, TOKENS, Sampling(0.0, 1.0, 0)) for prompt in prompts]
        engine.run(requests, after_pass=lambda: passes.append(None))
    finally:
        engine._read = kept
    stats = engine.stats
    return {
        "prefill_s": stats.prefill_s,
        "decode_s": stats.decode_s / stats.decode_passes,
        "pass_bytes": (engine.disk.bytes_read - bytes_before) / len(passes),
    }


def _read_rate(engine: Engine) -> float:
    """Bytes/s of all streamed pages, read alone; 0 where none is."""
    pages, layers = engine.plan.pages, range(engine.plan.model.layers)
    streamed = range(pages.resident_pages, pages.pages_per_layer)
    if not streamed:
        return 0.0
    slots = cycle(range(pages.slots))
    blocks = [b for layer in layers for page in streamed for b in engine._read(layer, page, next(slots))]
    start = time.perf_counter()
    with ThreadPoolExecutor(pages.readers) as readers:
        total = sum(readers.map(lambda block: block() or 0, blocks))
    return total / (time.perf_counter() - start)


def _gemm_ceiling(plan: RuntimePlan) -> float:
    """FLOP/s: the fastest of the runtime's expert and torch's products, each at its best number of rows."""
    import torch
    import torch.nn.functional as F

    from moeplan.runtime_min.layers import expert

    m = plan.model
    best = 0.0
    with torch.inference_mode():
        w1, w3 = (torch.randn(m.expert_intermediate, m.hidden).bfloat16() for _ in range(2))
        w2 = torch.randn(m.hidden, m.expert_intermediate).bfloat16()
        for rows in GEMM_ROWS:
            x = torch.randn(rows, m.hidden).bfloat16()
            product = 2 * rows * m.hidden * m.expert_intermediate
            best = max(best, 3 * product / _seconds(expert, x, w1, w2, w3))
            for dtype in (torch.bfloat16, torch.float32):
                a, b = x.to(dtype), w1.to(dtype)
                best = max(best, product / _seconds(F.linear, a, b))
    return best


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    """The least of several, after one that warms up."""
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        call(*arguments)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# --- the table


def _print(rows: list[Row], every: bool) -> None:
    heads = ["share", "batch", "resident", "GB/pass", "disk GB/s", "disk s", "compute s", "pass s", "of roof"]
    heads += ["tok/s", "plan", "prefill tok/s", "of roof", "of GEMM", "peak GiB", "budget GiB", "fits"]
    show(heads, [_cells(row) for row in rows])
    if every:
        for row in rows:
            print(f"\nshare {row['share']:.0%}, batch {row['batch']}")
            for name, value in row.items():
                if isinstance(value, list):
                    print(f"  {name:20}" + "".join(f"{item:14,.3f}" for item in value))


def _cells(row: Row) -> list[str]:
    decode_s, prefill_s = _median(row, "decode_s"), _median(row, "prefill_s")
    speed = row["batch"] / decode_s
    limit = 1.05 * row["budget_bytes"] + (200 << 20)
    return [
        f"{row['share']:.0%}",
        str(row["batch"]),
        f"{row['resident']:.0%}",
        f"{_median(row, 'pass_bytes') / 1e9:.2f}",
        f"{_median(row, 'disk_bytes_per_s') / 1e9:.2f}",
        f"{_disk_s(row):.3f}",
        f"{_median(row, 'compute_s'):.3f}",
        f"{decode_s:.3f}",
        f"{_of_roof(row, 'decode_s', 'compute_s'):.0%}",
        f"{speed:.1f}",
        f"{row['low']:.0f}-{row['high']:.0f} {'in' if row['low'] <= speed <= row['high'] else 'OUT'}",
        f"{row['batch'] * PROMPT / prefill_s:.0f}",
        f"{_of_roof(row, 'prefill_s', 'prefill_compute_s'):.0%}",
        f"{row['prefill_flops'] / prefill_s / row['gemm_flops_per_s']:.0%}",
        f"{row['peak_bytes'] / 2**30:.2f}",
        f"{row['budget_bytes'] / 2**30:.2f}",
        "yes" if row["peak_bytes"] <= limit else "NO",
    ]


def _of_roof(row: Row, measured: str, compute: str) -> float:
    """The median over rounds of roof over measured, each round with its own disk rate."""
    each = zip(row[measured], row[compute], row["pass_bytes"], row["disk_bytes_per_s"], strict=True)
    shares = [max(work_s, nbytes / rate if rate else 0.0) / taken for taken, work_s, nbytes, rate in each]
    return float(statistics.median(shares))


def _disk_s(row: Row) -> float:
    rate = _median(row, "disk_bytes_per_s")
    return _median(row, "pass_bytes") / rate if rate else 0.0


def _median(row: Row, name: str) -> float:
    return float(statistics.median(row[name]))


if __name__ == "__main__":
    main()
