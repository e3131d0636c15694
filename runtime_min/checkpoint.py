"""A safetensors checkpoint: where each tensor lies, and whether it is the model the plan was made for.

Nothing is loaded here, so that a missing, truncated or foreign checkpoint is named before any work is done.
Standard library only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.formats import EXPONENTS, PACKINGS, SCALED, fits

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_STORED_AS = {EXPONENTS: "U8", **{name: scaled.stored_as for name, scaled in SCALED.items()}}
_VALUE_BYTES = {**ITEM_BYTES, EXPONENTS: 1, **{name: 1 / scaled.per_byte for name, scaled in SCALED.items()}}
_HEADER_BYTES = {**ITEM_BYTES, "U8": 1, "F8_E4M3": 1}
_NONE: Mapping[str, str] = {}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_STRANGE = "is none of the tensors that this runtime knows of the architecture"
MAX_HEADER_BYTES = 100 << 20  # as the safetensors library has it


class CheckpointError(RunError):
    """The checkpoint cannot be used; `problems` holds one line per file or tensor at fault."""

    def __init__(self, problems: list[str]) -> None:
        shown = problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20)
        super().__init__("\n".join(shown), "the checkpoint has to be the one that the plan was compiled for")
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor: `nbytes` bytes at `offset` of the file `path`, row-major, little-endian.

    `dtype` is the checkpoint's, or a format of `formats`; of one whose scales lie apart, each is of a `block`
    of rows and values. Where `run_bytes` is not 0 the bytes lie apart: so many from `offset` on, and from
    each `stride_bytes` behind.
    """

    name: str
    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    block: tuple[int, int] = (0, 0)
    run_bytes: int = 0
    stride_bytes: int = 0


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError([f"{path}: cannot be read: {error}"]) from None
    if not isinstance(data, dict):
        raise CheckpointError([f"{path}: is not a JSON object"])
    return data


def find_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    unused: Callable[[str], bool] = lambda name: False,
    formats: Mapping[str, str] = _NONE,
) -> dict[str, TensorRef]:
    """Locate every tensor of `shapes` in `folder`; raises CheckpointError with all that is wrong.

    Those named in `formats` are in the format that it says, which their refs have as dtype.

    A tensor that is not among them is wrong too, unless `unused` says that the model does without: it may
    stand for something that the runtime does not compute.
    """
    problems: list[str] = []
    found: dict[str, TensorRef] = {}
    for path in _shards(folder, shapes, unused, problems):
        refs = read_header(path, problems)
        problems += [f"{path}: {n}: is also in {found[n].path.name}" for n in refs if n in found]
        found.update(refs)
    readable = not problems
    strange = [name for name in found if readable and name not in shapes and not unused(name)]
    problems += [f"{found[name].path}: {name}: {_STRANGE}" for name in strange]
    for name, shape in shapes.items():
        if name not in found and readable:
            problems.append(f"{folder}: {name}: is missing")
        elif name in found:
            if name in formats:
                found[name] = _in_format(found[name], formats[name], shape, problems)
                continue
            problems += _tensor_problems(found[name], shape)
    if problems:
        raise CheckpointError(problems)
    return {name: found[name] for name in shapes}


def _in_format(ref: TensorRef, packing: str, shape: tuple[int, ...], problems: list[str]) -> TensorRef:
    """The bytes `ref` as a tensor of `shape`."""
    if packing in _STORED_AS:
        if (ref.dtype, ref.shape) != (_STORED_AS[packing], shape):
            wanted = f"{_STORED_AS[packing]} {list(shape)} of {packing}"
            problems.append(f"{ref.path}: {ref.name}: is {ref.dtype} {list(ref.shape)}, not {wanted}")
        return replace(ref, dtype=packing)
    least, most = PACKINGS[packing].least_bytes(shape), PACKINGS[packing].most_bytes(shape)
    if ref.dtype != "U8" or len(ref.shape) != 1 or not fits(shape) or not least <= ref.nbytes <= most:
        problems.append(f"{ref.path}: {ref.name}: is {ref.dtype} {list(ref.shape)}, not {shape} in {packing}")
    return replace(ref, dtype=packing, shape=shape)


def every_tensor(folder: Path) -> list[TensorRef]:
    """All tensors of the safetensors files in `folder`, file by file; raises CheckpointError."""
    problems: list[str] = []
    paths = sorted(folder.glob("*.safetensors"))
    found = [ref for path in paths for ref in read_header(path, problems).values()]
    if not paths:
        problems.append(f"{folder}: has no safetensors file")
    if problems:
        raise CheckpointError(problems)
    return found


def cut(ref: TensorRef, name: str, first: int, shape: tuple[int, ...], block: tuple[int, int]) -> TensorRef:
    """The values of a tensor from `first` on, as the tensor `name` of their own; a packed one is whole."""
    if ref.dtype in PACKINGS:
        return ref
    item = _VALUE_BYTES[ref.dtype]
    offset, nbytes = ref.offset + int(first * item), int(math.prod(shape) * item)
    return replace(ref, name=name, offset=offset, nbytes=nbytes, shape=shape, block=block)


def _shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    unused: Callable[[str], bool],
    problems: list[str],
) -> list[Path]:
    """The files that hold the tensors, each existing."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            problems.append(f"{folder}: has neither {SINGLE} nor {INDEX}")
            return []
        return [folder / SINGLE]
    where = read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        problems.append(f"{folder / INDEX}: weight_map does not map tensors to files")
        return []
    problems += [f"{folder / INDEX}: {name}: is missing" for name in shapes if name not in where]
    strange = [name for name in where if name not in shapes and not unused(name)]
    problems += [f"{folder / INDEX}: {name}: {_STRANGE}" for name in strange]
    names = sorted({where[name] for name in shapes if name in where})
    for name in names:
        if Path(name).name != name:
            problems.append(f"{folder / INDEX}: {name!r} is not a file of this folder")
        elif not (folder / name).is_file():
            lost = next(tensor for tensor in shapes if where.get(tensor) == name)
            problems.append(f"{folder / name}: is missing; it holds {lost}")
    return [folder / name for name in names if Path(name).name == name and (folder / name).is_file()]


def read_header(path: Path, problems: list[str]) -> dict[str, TensorRef]:
    """The tensors that the header of `path` declares and the file has room for."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                problems.append(f"{path}: header length {length} does not fit a file of {size} bytes")
                return {}
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: header cannot be read: {error}")
        return {}
    if not isinstance(header, dict):
        problems.append(f"{path}: header is not a JSON object")
        return {}
    header.pop("__metadata__", None)
    refs = {name: _ref(name, path, 8 + length, entry) for name, entry in header.items()}
    problems += [f"{path}: {name}: has a malformed header entry" for name, ref in refs.items() if ref is None]
    good = {name: ref for name, ref in refs.items() if ref is not None}
    problems += _layout_problems(path, size, list(good.values()))
    return good


def _ref(name: str, path: Path, start: int, entry: object) -> TensorRef | None:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            0 <= begin <= end and all(type(n) is int and n >= 0 for n in shape)
        ):
            return TensorRef(name, path, start + begin, end - begin, dtype, tuple(shape))
    return None


def _layout_problems(path: Path, size: int, refs: list[TensorRef]) -> list[str]:
    """Each tensor as long as its shape says, inside the file, and no two on the same bytes."""
    problems = []
    end, last = 0, ""
    for ref in sorted(refs, key=lambda ref: (ref.offset, ref.nbytes)):
        item = _HEADER_BYTES.get(ref.dtype)
        if item and ref.nbytes != math.prod(ref.shape) * item:
            problems.append(f"{path}: {ref.name}: {ref.nbytes} bytes are not {ref.dtype} {list(ref.shape)}")
        if ref.offset + ref.nbytes > size:
            problems.append(f"{path}: {ref.name}: ends at byte {ref.offset + ref.nbytes}, the file at {size}")
        if ref.nbytes and ref.offset < end:
            problems.append(f"{path}: {ref.name}: overlaps {last}")
        if ref.nbytes:
            end, last = max(end, ref.offset + ref.nbytes), ref.name
    return problems


def _tensor_problems(ref: TensorRef, shape: tuple[int, ...]) -> list[str]:
    problems = []
    if ref.dtype not in ITEM_BYTES:
        problems.append(f"{ref.path}: {ref.name}: has dtype {ref.dtype}, expected {', '.join(ITEM_BYTES)}")
    if ref.shape != shape and not (shape == (1,) and ref.shape == ()):
        problems.append(f"{ref.path}: {ref.name}: has shape {list(ref.shape)}, the plan {list(shape)}")
    return problems
