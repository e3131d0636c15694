"""checksums.json beside a checkpoint: the CRC-32 of each tensor's stored bytes. Standard library only."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from moeplan.runtime_min.checkpoint import CheckpointError, TensorRef, read_header, read_json
from moeplan.runtime_min.errors import RunError, written

NAME = "checksums.json"
_BLOCK_BYTES = 1 << 20

Checksums = Mapping[str, int]  # tensor -> CRC-32 of its bytes as stored


def write_checksums(folder: Path) -> Path:
    """Read every tensor of `folder`'s safetensors files and note its checksum; raises RunError."""
    path = folder / NAME
    sums = {ref.name: f"{_file_crc(ref):08x}" for ref in _tensors(folder)}
    with written(path):
        path.write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def check_checksums(folder: Path) -> int:
    """Compare every tensor with the checksums beside it; return their number, or raise CheckpointError."""
    sums = read_checksums(folder)
    if sums is None:
        raise RunError(f"{folder / NAME}: is missing", "runtime_min checksum DIR writes it")
    refs = list(_tensors(folder))
    problems = [f"{ref.path}: {ref.name}: has no checksum" for ref in refs if ref.name not in sums]
    problems += [_corrupt(ref) for ref in refs if ref.name in sums and _file_crc(ref) != sums[ref.name]]
    if problems:
        raise CheckpointError(problems)
    return len(refs)


def read_checksums(folder: Path) -> Checksums | None:
    """The checksums beside a checkpoint, None where there are none; raises CheckpointError."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        return {name: int(text, 16) for name, text in read_json(path).items()}
    except (TypeError, ValueError):
        raise CheckpointError([f"{path}: is not a map of tensors to checksums"]) from None


def verify_tensor(sums: Checksums, ref: TensorRef, data: memoryview) -> None:
    """Raise RunError where `data`, the tensor's bytes as stored, are not those that were noted."""
    if ref.name in sums and zlib.crc32(data) != sums[ref.name]:
        raise RunError(_corrupt(ref), "restore the file; records already written are good")


def _corrupt(ref: TensorRef) -> str:
    return f"{ref.path}: {ref.name}: is corrupt: its bytes do not have the checksum in {NAME}"


def _tensors(folder: Path) -> Iterator[TensorRef]:
    problems: list[str] = []
    paths = sorted(folder.glob("*.safetensors"))
    found = [ref for path in paths for ref in read_header(path, problems).values()]
    if not paths:
        problems.append(f"{folder}: has no safetensors file")
    if problems:
        raise CheckpointError(problems)
    yield from found


def _file_crc(ref: TensorRef) -> int:
    crc, left = 0, ref.nbytes
    try:
        with ref.path.open("rb") as file:
            file.seek(ref.offset)
            while left:
                data = file.read(min(left, _BLOCK_BYTES))
                if not data:
                    raise EOFError("ends within the tensor")
                crc, left = zlib.crc32(data, crc), left - len(data)
    except (OSError, EOFError) as error:
        raise CheckpointError([f"{ref.path}: {ref.name}: cannot be read: {error}"]) from None
    return crc
