"""How long `runtime_min quantize` takes against reading and then writing the same bytes, and its memory.

usage: python benchmarks/quantising.py [--model small|big] [--to int8|int4|bf12]

The disk is measured before and after: some of the checkpoint is read past the page cache by four threads in
blocks of 1 MiB, and 2 GiB are written and flushed 64 MiB at a time. The share is the mean of what both say
that these bytes take, over the seconds that quantising took; above 100 % reading and writing overlap.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from checkpoints import BUILD, SHAPES

from moeplan.runtime_min.pages import Shard

READERS, BLOCK_BYTES = 4, 1 << 20
PIECE_BYTES, PIECES = 64 << 20, 32
READ_BYTES = 3 << 30


def read_rate(folder: Path) -> float:
    """Bytes/s of the first files of a checkpoint, READ_BYTES at most."""
    done, start = 0, time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        if done < READ_BYTES:
            done += _read(path)
    return done / (time.perf_counter() - start)


def _read(path: Path) -> int:
    shard = Shard(path)
    blocks = range(0, shard.size - BLOCK_BYTES, BLOCK_BYTES)

    def read(thread: int) -> None:
        buffer = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        for offset in blocks[thread::READERS]:
            shard.read(offset, buffer)

    with ThreadPoolExecutor(READERS) as threads:
        list(threads.map(read, range(READERS)))
    shard.close()
    return len(blocks) * BLOCK_BYTES


def write_rate(folder: Path) -> float:
    piece, path = os.urandom(PIECE_BYTES), folder / "written.tmp"
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(PIECES):
            file.write(piece)
            file.flush()
            os.fdatasync(file.fileno())
    taken = time.perf_counter() - start
    path.unlink()
    return PIECE_BYTES * PIECES / taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--to", default="int8")
    options = parser.parse_args()
    shape = SHAPES[options.model]
    script = str(Path(__file__).parent / "checkpoints.py")
    subprocess.run([sys.executable, script, shape.name], check=True, stdout=subprocess.DEVNULL)
    out = BUILD / f"quantised-{shape.name}"
    shutil.rmtree(out, ignore_errors=True)
    disk = [(read_rate(shape.folder), write_rate(BUILD))]
    command = [sys.executable, "-m", "moeplan.runtime_min", "quantize", str(shape.folder), str(out)]
    start = time.perf_counter()
    child = subprocess.Popen([*command, "--to", options.to], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    taken = time.perf_counter() - start
    if status:
        sys.exit("quantising failed")
    disk.append((read_rate(shape.folder), write_rate(BUILD)))
    source, written = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (shape.folder, out))
    shutil.rmtree(out)
    alone = [source / read + written / write for read, write in disk]
    for read, write in disk:
        print(f"disk: reads {read / 1e9:.2f} GB/s, writes {write / 1e9:.2f} GB/s")
    share = sum(alone) / len(alone) / taken
    print(
        f"{options.to}: {source / 1e9:.2f} GB to {written / 1e9:.2f} GB in {taken:.1f} s, at most "
        f"{usage.ru_maxrss / 2**20:.2f} GiB; {share:.0%} of the disk's rate of reading and writing"
    )


if __name__ == "__main__":
    main()
