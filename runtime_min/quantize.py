"""A checkpoint with its experts in fewer bits, written shard by shard.

Tensors are read and written a few megabytes at a time, so that memory does not depend on the model. A run
that was killed goes on at the shard it was at.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moeplan.runtime_min.checkpoint import INDEX, CheckpointError, TensorRef, every_tensor, read_json
from moeplan.runtime_min.errors import RunError, replaced, written
from moeplan.runtime_min.formats import PACKINGS, Packing, fits
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.models.tensors import stored_name
from moeplan.runtime_min.packing import pack
from moeplan.runtime_min.pages import DTYPES, Shard
from moeplan.runtime_min.plan_file import ALIGNMENT_BYTES

METHOD = "moeplan"  # quantization_config's quant_method
_SHARD_BYTES = 1 << 30  # of the source, at most, where tensors are smaller
_CHUNK_BYTES = 4 << 20
_FLUSH_S = 0.05
_THREADS = 2 * (os.cpu_count() or 1)  # some wait for the disk
_PACKED_BYTES = 512 << 10  # at once: with what packing makes of them they stay in a core's cache
_STATE = "quantize.json"  # in a folder that is not finished
_COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README*")
_OWN = {INDEX, "config.json", "checksums.json", _STATE}

Progress = Callable[[int, int], None]  # bytes of the source that are done, and all


def quantize(folder: Path, out: Path, name: str, progress: Progress = lambda done, total: None) -> int:
    """Write the checkpoint `folder` to `out` with its experts in the format `name`; return its bytes.

    Raises CheckpointError for a checkpoint that has no experts apart, or whose experts do not fit the format,
    and RunError where `out` holds something else or cannot be written.
    """
    packing = PACKINGS[name]
    config = read_json(folder / "config.json")
    is_expert = re.compile(_expert_pattern(folder, config)).fullmatch
    refs = sorted(every_tensor(folder), key=lambda ref: (ref.path.name, ref.offset, ref.name))
    experts = {ref.name for ref in refs if is_expert(ref.name)}
    _check(folder, packing, refs, experts)
    shards = list(_shards(refs))
    _take(out, {"format": name, "tensors": [[ref.name, ref.dtype, *ref.shape] for ref in refs]})
    total = sum(ref.nbytes for ref in refs)
    done = 0
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = out / f"model-{number:05}-of-{len(shards):05}.safetensors"
        if not file.exists():
            with written(file):
                for some in _write_shard(file, shard, experts, packing):
                    progress(done + some, total)
        where |= dict.fromkeys((ref.name for ref in shard), file.name)
        done += sum(ref.nbytes for ref in shard)
        progress(done, total)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    _finish(
        folder, out, {**config, "quantization_config": {"quant_method": METHOD, "format": name}}, where, size
    )
    return size


def _expert_pattern(folder: Path, config: dict[str, Any]) -> str:
    """A regular expression for the names of experts' matrices in the checkpoint."""
    model_type = config.get("model_type")
    kind, problem = BY_MODEL_TYPE.get(str(model_type)), ""
    if kind is None:
        problem = f"model_type {model_type!r} is none that this runtime executes"
    elif config.get("quantization_config") is not None:
        problem = "is quantised already"
    elif kind.experts != "apart":
        problem = f"{model_type} stores its experts in one tensor, which is not supported"
    if kind is None or problem:
        raise CheckpointError([f"{folder}: {problem}"])
    expert = f"model.layers.0.{kind.mlp}.{'experts.0.' if kind.routed else ''}"
    names = (stored_name(kind, f"{expert}{matrix}.weight") for matrix in kind.matrices)
    return "|".join(re.escape(name).replace(r"\.0\.", r"\.[0-9]+\.") for name in names)


def _check(folder: Path, packing: Packing, refs: Sequence[TensorRef], experts: set[str]) -> None:
    problems = [f"{folder}: has no experts' matrices"] * (not experts)
    lossless = packing.name == "bf12"
    for ref in refs:
        if ref.name not in experts:
            continue
        if not fits(ref.shape):
            problems.append(
                f"{ref.path}: {ref.name}: has shape {list(ref.shape)}; rows must be multiples of 64 values"
            )
        if ref.dtype not in DTYPES or (lossless and ref.dtype != "BF16"):
            problems.append(
                f"{ref.path}: {ref.name}: has dtype {ref.dtype}, which {packing.name} does not take"
            )
    if problems:
        raise CheckpointError(problems)


def _shards(refs: Sequence[TensorRef]) -> Iterator[list[TensorRef]]:
    shard: list[TensorRef] = []
    size = 0
    for ref in refs:
        if shard and size + ref.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(ref)
        size += ref.nbytes
    yield shard


def _take(out: Path, state: dict[str, Any]) -> None:
    """Begin in `out`, or go on where the same was begun."""
    file = out / _STATE
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        with replaced(file) as begun:
            begun.write(json.dumps(state).encode())
    elif not file.exists() or read_json(file) != json.loads(json.dumps(state)):
        raise RunError(f"{out}: holds something else", "name a new folder, or remove this one")


def _write_shard(path: Path, refs: Sequence[TensorRef], experts: set[str], packing: Packing) -> Iterator[int]:
    """Data first, behind room for the header; then the header, padded. Yields the bytes that are done."""
    temporary = path.with_suffix(".tmp")
    room = len(_header({ref.name: ("BF16", ref.shape, 1 << 50, 1 << 50) for ref in refs}))
    room += -(8 + room) % 4096
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    done = 0
    with temporary.open("wb") as file, _Source(refs) as source, _written_meanwhile(file):
        file.seek(8 + room)
        for ref, pieces in groupby(source.pieces(refs, experts, packing), key=lambda piece: piece.ref):
            begin = file.tell() - 8 - room
            tails = []
            for piece in pieces:
                file.write(piece.data)
                tails.append(piece.exceptions)
            for tail in tails:
                file.write(tail)
            end = file.tell() - 8 - room
            packed = ref.name in experts
            if packed and end - begin > packing.most_bytes(ref.shape):
                problem = f"its values differ too much in size for {packing.name}: try int8"
                raise CheckpointError([f"{ref.path}: {ref.name}: {problem}"])
            entries[ref.name] = (
                ("U8", (end - begin,), begin, end) if packed else (ref.dtype, ref.shape, begin, end)
            )
            done += ref.nbytes
            yield done
        file.seek(0)
        file.write(struct.pack("<Q", room) + _header(entries).ljust(room))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def _written_meanwhile(file: BinaryIO) -> Iterator[None]:
    """Have the disk take what is written while more is made, not all of it at the end."""
    done = threading.Event()
    failed: list[OSError] = []

    def flush() -> None:
        try:
            while not done.wait(_FLUSH_S):
                os.fdatasync(file.fileno())
        except OSError as error:  # which a later fsync would not tell again
            failed.append(error)

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failed:
        raise failed[0]


def _header(entries: dict[str, tuple[str, tuple[int, ...], int, int]]) -> bytes:
    table = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        for name, (dtype, shape, begin, end) in entries.items()
    }
    return json.dumps(table, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some of a tensor as it is written, and of packed rows the exceptions, which follow all of its rows."""

    ref: TensorRef
    data: Any
    exceptions: Any = b""


class _Source:
    """The files that hold some tensors, read past the page cache."""

    def __init__(self, refs: Sequence[TensorRef]) -> None:
        self._paths = {ref.path for ref in refs}
        self._buffers = threading.local()
        self._threads = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> _Source:
        self._shards = {path: Shard(path) for path in self._paths}
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for shard in self._shards.values():
            shard.close()

    def pieces(self, refs: Sequence[TensorRef], experts: set[str], packing: Packing) -> Iterator[_Piece]:
        """All tensors in order; threads make some pieces ahead, while others wait for the disk."""
        work = (
            partial(self._packed, ref, packing, first, rows)
            if ref.name in experts
            else partial(self._plain, ref, first, rows)
            for ref in refs
            for rows in [_piece_rows(ref, _PACKED_BYTES if ref.name in experts else _CHUNK_BYTES)]
            for first in range(0, max(1, _rows(ref)), rows)
        )
        made: deque[Future[_Piece]] = deque()
        for make in work:
            made.append(self._threads.submit(make))
            if len(made) > 2 * _THREADS:
                yield made.popleft().result()
        while made:
            yield made.popleft().result()

    def _packed(self, ref: TensorRef, packing: Packing, first: int, rows: int) -> _Piece:
        values = self._read(ref, first, rows)
        data, exceptions = pack(values.view(DTYPES[ref.dtype]).view(-1, ref.shape[1]), packing, first)
        return _Piece(ref, data.numpy().data, exceptions.numpy().data)

    def _plain(self, ref: TensorRef, first: int, rows: int) -> _Piece:
        return _Piece(ref, self._read(ref, first, rows).numpy().tobytes())

    def _read(self, ref: TensorRef, first: int, rows: int) -> Tensor:
        """Bytes of rows; they may lie in this thread's buffer, until it reads again."""
        row_bytes = ref.nbytes // max(1, _rows(ref))
        begin = ref.offset + first * row_bytes
        nbytes = min(rows, _rows(ref) - first) * row_bytes
        skipped = begin % ALIGNMENT_BYTES
        wanted = -(-(skipped + nbytes) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        buffer = getattr(self._buffers, "bytes", None)
        if buffer is None or len(buffer) < wanted:
            self._buffers.bytes = buffer = mmap.mmap(-1, max(wanted, ALIGNMENT_BYTES))  # begins on a page
        view = memoryview(buffer)[:wanted]
        try:
            self._shards[ref.path].read(begin - skipped, view)
        except (OSError, EOFError) as error:
            raise CheckpointError([f"{ref.path}: {ref.name}: cannot be read: {error}"]) from None
        found = torch.frombuffer(buffer, dtype=torch.uint8)[skipped : skipped + nbytes]
        return found.clone() if skipped % 8 else found  # values that lie across their size


def _rows(ref: TensorRef) -> int:
    """Of a tensor, its first dimension; of a number, one."""
    return ref.shape[0] if ref.shape else 1


def _piece_rows(ref: TensorRef, most_bytes: int) -> int:
    return max(1, most_bytes * _rows(ref) // max(1, ref.nbytes))


def _finish(folder: Path, out: Path, config: dict[str, Any], where: dict[str, str], size: int) -> None:
    """The small files; config.json last but one, so that what is not finished is no checkpoint."""
    small = {path for pattern in _COPIED for path in folder.glob(pattern) if path.name not in _OWN}
    index = {"metadata": {"total_size": size}, "weight_map": where}
    for path in sorted(small):
        with written(out / path.name):
            shutil.copyfile(path, out / path.name)
    for name, content in ((INDEX, index), ("config.json", config)):
        with replaced(out / name) as file:
            file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
    (out / _STATE).unlink()
