"""checksums.json beside a checkpoint: the CRC-32 of each tensor's stored bytes. Standard library only."""

from __future__ import annotations

import bisect
import functools
import json
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from moeplan.runtime_min.checkpoint import CheckpointError, TensorRef, every_tensor, read_header, read_json
from moeplan.runtime_min.errors import RunError, written

NAME = "checksums.json"
_BLOCK_BYTES = 1 << 20
_POLYNOMIAL = 0xEDB88320  # of CRC-32, its lowest power in the highest bit

Checksums = Mapping[str, int]  # tensor -> CRC-32 of its bytes as stored


def write_checksums(folder: Path) -> Path:
    """Read every tensor of `folder`'s safetensors files and note its checksum; raises RunError."""
    path = folder / NAME
    sums = {ref.name: f"{_file_crc(ref):08x}" for ref in every_tensor(folder)}
    with written(path):
        path.write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def check_checksums(folder: Path) -> int:
    """Compare every tensor with the checksums beside it; return their number, or raise CheckpointError."""
    sums = read_checksums(folder)
    if sums is None:
        raise RunError(f"{folder / NAME}: is missing", "runtime_min checksum DIR writes it")
    refs = every_tensor(folder)
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


class Verification:
    """Compares tensors with `sums` while they are read: each once, in pieces that come in any order.

    Pieces may come from several threads at once. Those of a tensor that is read again have to be cut as the
    first time; they count once.
    """

    def __init__(self, tensors: Iterable[TensorRef], sums: Checksums) -> None:
        self._sums = sums
        self._tensors: dict[Path, list[TensorRef]] = {}  # by place in the file
        for ref in sorted(tensors, key=lambda ref: ref.offset):
            if ref.nbytes:
                self._tensors.setdefault(ref.path, []).append(ref)
        refs = [ref for found in self._tensors.values() for ref in found]
        self._pieces: dict[TensorRef, dict[int, tuple[int, int]]] = {ref: {} for ref in refs}  # bytes, crc
        self._bytes = dict.fromkeys(refs, 0)  # of all pieces of a tensor
        self._lock = threading.Lock()

    def awaits(self, path: Path, offset: int) -> bool:
        """Whether the tensor that has byte `offset` of the file is still to be verified."""
        return self._at(path, offset) in self._pieces

    def piece(self, path: Path, offset: int, data: memoryview) -> None:
        """Take in bytes of one tensor from byte `offset` of the file on; raises RunError where they complete
        a tensor that is corrupt."""
        ref = self._at(path, offset)
        if ref is None or ref not in self._pieces:
            return
        crc = zlib.crc32(data)
        with self._lock:
            pieces = self._pieces.get(ref)
            if pieces is None or offset in pieces:  # another read of the tensor was faster
                return
            pieces[offset] = (len(data), crc)
            self._bytes[ref] += len(data)
            if self._bytes[ref] < ref.nbytes:
                return
            del self._pieces[ref]
        whole = 0
        for _, (nbytes, crc) in sorted(pieces.items()):
            whole = joined_crc(whole, crc, nbytes)
        if whole != self._sums[ref.name]:
            raise RunError(_corrupt(ref), "restore the file; records already written are good")

    def _at(self, path: Path, offset: int) -> TensorRef | None:
        refs = self._tensors.get(path, [])
        number = bisect.bisect_right(refs, offset, key=lambda ref: ref.offset)
        return refs[number - 1] if number else None


def verification(folder: Path, paths: Iterable[Path]) -> Verification:
    """For a run that reads files `paths` of `folder`; without checksums.json none is verified.

    Raises CheckpointError where checksums.json cannot be read, or lacks one of their tensors.
    """
    sums = read_checksums(folder)
    if sums is None:
        return Verification([], {})
    problems: list[str] = []
    tensors = [ref for path in sorted(set(paths)) for ref in read_header(path, problems).values()]
    problems += [f"{folder / NAME}: {ref.name}: has no checksum" for ref in tensors if ref.name not in sums]
    if problems:
        raise CheckpointError(problems)
    return Verification(tensors, sums)


def joined_crc(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two pieces from that of each, the second `second_bytes` long.

    A CRC is a remainder of polynomials over GF(2); bytes that follow multiply what came before by x^8 each.
    """
    return _product(_power(second_bytes), first) ^ second


@functools.lru_cache
def _power(nbytes: int) -> int:
    """x^(8 nbytes) modulo the polynomial."""
    result, square = 1 << 31, 1 << 23  # 1 and x^8
    while nbytes:
        result = _product(result, square) if nbytes & 1 else result
        square, nbytes = _product(square, square), nbytes >> 1
    return result


def _product(a: int, b: int) -> int:
    """a b modulo the polynomial."""
    product = 0
    for power in range(31, -1, -1):
        if a >> power & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _corrupt(ref: TensorRef) -> str:
    return f"{ref.path}: {ref.name}: is corrupt: its bytes do not have the checksum in {NAME}"


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
