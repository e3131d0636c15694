"""What it costs to verify checksums as pages are read: processor seconds and seconds per gigabyte.

usage: python benchmarks/checksum_cost.py [--rounds N]

The experts of one layer of the "small" checkpoint (checkpoints.py) are read as a run reads them, by two
threads past the page cache, with checksums.json beside the checkpoint and without, in turn; the least of the
rounds counts. A run verifies a tensor the first time it reads it: later passes cost as much as without.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from checkpoints import SHAPES, Shape, write_checkpoint
from tables import show

from moeplan.runtime_min.checkpoint import TensorRef, find_tensors
from moeplan.runtime_min.checksums import verification, write_checksums
from moeplan.runtime_min.pages import PageStore
from moeplan.runtime_min.plan_file import PagePlan

READERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    shape = SHAPES["small"]
    folder = write_checkpoint(shape)
    sizes = {name: size for name, size in shape.layer_tensors(0).items() if ".experts." in name}
    refs = find_tensors(folder, sizes)
    without, verified = [], []
    sums = write_checksums(folder)
    text = sums.read_text()
    try:
        for _ in range(rounds):
            sums.unlink()
            without.append(_read(shape, refs))
            sums.write_text(text)
            verified.append(_read(shape, refs))
    finally:
        sums.unlink(missing_ok=True)
    rows = [[*map(min, zip(*times, strict=True))] for times in (without, verified)]
    rows.append([rows[1][0] / rows[0][0], rows[1][1] / rows[0][1]])
    names = ("not verified", "verified", "ratio")
    table = [[name, *(f"{figure:.2f}" for figure in row)] for name, row in zip(names, rows, strict=True)]
    show(["s/GB", "processors", "elapsed"], table)


def _read(shape: Shape, refs: dict[str, TensorRef]) -> tuple[float, float]:
    """Processor seconds and seconds per gigabyte of all experts, a page each."""
    plan = PagePlan(
        pages_per_layer=shape.experts,
        experts_per_page=1,
        resident_pages=0,
        slots=2,
        slot_bytes=16 << 20,
        readers=READERS,
        block_bytes=1 << 20,
        places=0,
        guesses=0,
    )
    moving = {(0, e): [name for name in refs if f".experts.{e}." in name] for e in range(shape.experts)}
    checks = verification(shape.folder, _paths(refs))
    store = PageStore(refs, plan, moving, torch.bfloat16, checks)
    busy, start, nbytes = time.process_time(), time.perf_counter(), 0
    with ThreadPoolExecutor(READERS) as readers:
        for page in range(shape.experts):
            nbytes += sum(readers.map(lambda block: block(), store.blocks(0, page, page % plan.slots)))
    taken = time.process_time() - busy, time.perf_counter() - start
    store.close()
    return taken[0] / nbytes * 1e9, taken[1] / nbytes * 1e9


def _paths(refs: dict[str, TensorRef]) -> set[Path]:
    return {ref.path for ref in refs.values()}


if __name__ == "__main__":
    main()
