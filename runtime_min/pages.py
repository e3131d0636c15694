"""Weights: pages that are read into slots past the page cache, and those that stay.

A page is a set of tensors. In the file they lie anywhere; `PageLayout` covers them with aligned extents that
fill a slot one after the other, and the tensors are views into it. Readers take the extents in blocks.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from moeplan.runtime_min.checkpoint import TensorRef
from moeplan.runtime_min.checksums import Verification
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.formats import EXPONENTS, PACKINGS, SCALED
from moeplan.runtime_min.models.tensors import CORRECTION, SCALES
from moeplan.runtime_min.packing import Matrix, Packed, scaled
from moeplan.runtime_min.plan_file import ALIGNMENT_BYTES, PagePlan

# Of packed matrices those of their bytes.
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPES |= dict.fromkeys((*PACKINGS, *SCALED, EXPONENTS), torch.uint8)

Moving = Mapping[tuple[int, int], Sequence[str]]  # layer, page -> the names of its tensors
Block = Callable[[], int]  # reads one block; returns its bytes


class ReadError(RunError):
    """A shard could not be read while the run was under way."""


class Shard:
    """One file, open for reads that leave the page cache alone."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            self._direct = True
        except OSError:  # the file system knows no direct reads
            self._file = os.open(path, os.O_RDONLY)
            self._direct = False

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset`, both aligned; what lies past the end of the file stays untouched."""
        wanted = min(len(into), self.size - offset)
        got = 0
        while got < wanted:
            count = self._read_some(offset + got, into[got:])
            if count == 0:
                raise EOFError(f"ends at byte {offset + got}, had {self.size}")
            got += count
        if not self._direct:
            os.posix_fadvise(self._file, offset, len(into), os.POSIX_FADV_DONTNEED)

    def _read_some(self, offset: int, into: memoryview) -> int:
        try:
            return os.preadv(self._file, [into], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # Direct reads are refused here (larger sectors, an overlay), or one ended off alignment.
        self._direct = False
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return os.preadv(self._file, [into], offset)

    def close(self) -> None:
        os.close(self._file)


@dataclass(frozen=True, slots=True)
class Extent:
    """`nbytes` bytes of `shard` from `offset`, aligned, to be read to byte `at` of a slot."""

    shard: Shard
    offset: int
    nbytes: int
    at: int


@dataclass(frozen=True, slots=True)
class PageLayout:
    """How a page fills a slot: its extents, and (tensor, byte of the slot) by tensor name."""

    extents: tuple[Extent, ...]
    places: Mapping[str, tuple[TensorRef, int]]

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)

    def name_at(self, extent: Extent, offset: int) -> str:
        """The tensor whose bytes lie at or behind `offset` of the extent's file."""
        refs = sorted((ref for ref, _ in self.places.values()), key=lambda ref: ref.offset)
        behind = [r.name for r in refs if r.path == extent.shard.path and r.offset + r.nbytes > offset]
        return behind[0] if behind else ""


def layout_page(refs: Iterable[TensorRef], shards: Mapping[Path, Shard]) -> PageLayout:
    """Cover `refs` with the fewest aligned extents that touch no unneeded block."""
    extents: list[Extent] = []
    places = {}
    for ref in sorted(refs, key=lambda ref: (str(ref.path), ref.offset)):
        low, high = _down(ref.offset), _up(ref.offset + ref.nbytes)
        last = extents[-1] if extents else None
        if last and last.shard.path == ref.path and low <= last.offset + last.nbytes:
            high = max(high, last.offset + last.nbytes)
            extents[-1] = Extent(last.shard, last.offset, high - last.offset, last.at)
        else:
            at = last.at + last.nbytes if last else 0
            extents.append(Extent(shards[ref.path], low, high - low, at))
        places[ref.name] = (ref, extents[-1].at + ref.offset - extents[-1].offset)
    return PageLayout(tuple(extents), places)


class PageView(Mapping[str, Any]):
    """The tensors of a page that lies in a slot, each in the compute dtype when it is asked for.

    Packed ones stay packed. No copy is made where the stored dtype is the compute dtype and the tensor
    starts on a whole element.
    """

    def __init__(self, layout: PageLayout, slot: Tensor, dtype: torch.dtype) -> None:
        self._layout, self._slot, self._dtype = layout, slot, dtype

    def __getitem__(self, name: str) -> Matrix:
        ref, at = self._layout.places[name]
        data = self._slot[at : at + ref.nbytes]
        if ref.dtype not in SCALED and ref.dtype not in PACKINGS:
            return _typed(data, ref).view(ref.shape).to(kept_as(ref, self._dtype))
        return _matrix(ref, data, self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.places)

    def __len__(self) -> int:
        return len(self._layout.places)


class Weights(Protocol):
    """A model's weights, tensors or packed matrices: those that stay by name, and those of a page."""

    @property
    def resident(self) -> Mapping[str, Any]: ...

    def view(self, layer: int, page: int, slot: int) -> Mapping[str, Any]: ...


class PageStore:
    """All weights of a model: `resident` by name, and pages by layer, page and slot.

    `moving` has the names of the tensors of each page that moves. A tensor that is corrupt raises RunError in
    the read that completes it.
    """

    def __init__(
        self,
        refs: Mapping[str, TensorRef],
        plan: PagePlan,
        moving: Moving,
        dtype: torch.dtype,
        verification: Verification,
    ) -> None:
        self._plan, self._dtype, self._verification = plan, dtype, verification
        self._shards = {path: Shard(path) for path in {ref.path for ref in refs.values()}}
        self._layouts = {
            page: layout_page((refs[name] for name in names), self._shards) for page, names in moving.items()
        }
        self._check_slots()
        self._memory = [_allocate(plan.slot_bytes) for _ in range(plan.slots if self._layouts else 0)]
        self._slots = [torch.frombuffer(memory, dtype=torch.uint8) for memory in self._memory]
        moves = set(chain(*moving.values()))
        stay = [ref for name, ref in refs.items() if name not in moves]
        kept = {ref.name: _room(ref, dtype) for ref in stay}
        Reader(self._shards, plan.readers, plan.block_bytes, verification).load(stay, kept)
        self.resident: dict[str, Any] = {ref.name: _matrix(ref, kept[ref.name], kept) for ref in stay}

    def view(self, layer: int, page: int, slot: int) -> Mapping[str, Any]:
        """The tensors of a page: in `slot`, or resident where `slot` is -1."""
        if slot < 0:
            return self.resident
        return PageView(self._layouts[layer, page], self._slots[slot], self._dtype)

    def blocks(self, layer: int, page: int, slot: int) -> list[Block]:
        """The reads that fill `slot` with a page, in blocks, in any order."""
        layout = self._layouts[layer, page]
        places = layout.places.values()
        awaited = [(ref, at) for ref, at in places if self._verification.awaits(ref.path, ref.offset)]
        return [
            self._block(layout, extent, start, slot, awaited)
            for extent in layout.extents
            for start in range(0, extent.nbytes, self._plan.block_bytes)
        ]

    def _block(
        self,
        layout: PageLayout,
        extent: Extent,
        start: int,
        slot: int,
        awaited: Sequence[tuple[TensorRef, int]],
    ) -> Block:
        at, offset = extent.at + start, extent.offset + start
        nbytes = min(self._plan.block_bytes, extent.nbytes - start)

        def read() -> int:
            try:
                extent.shard.read(offset, memoryview(self._memory[slot])[at : at + nbytes])
            except (OSError, EOFError) as error:
                name = layout.name_at(extent, offset)
                raise ReadError(f"{extent.shard.path}: {name}: cannot be read: {error}") from None
            for ref, begin in awaited:
                first, end = max(at, begin), min(at + nbytes, begin + ref.nbytes)
                if first < end:
                    piece = memoryview(self._memory[slot])[first:end]
                    self._verification.piece(ref.path, ref.offset + first - begin, piece)
            return nbytes

        return read

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def _check_slots(self) -> None:
        for (layer, page), layout in self._layouts.items():
            if layout.nbytes > self._plan.slot_bytes:
                raise RunError(
                    f"{layout.extents[0].shard.path}: page {page} of layer {layer} takes "
                    f"{layout.nbytes:,} bytes in memory, a slot of the plan holds {self._plan.slot_bytes:,}",
                    "compile the spec again with this checkpoint",
                )


def _room(ref: TensorRef, dtype: torch.dtype) -> Tensor:
    """Memory for a tensor that stays, as it is kept."""
    if ref.dtype in PACKINGS or ref.dtype in SCALED:
        return torch.empty(ref.nbytes, dtype=torch.uint8)
    return torch.empty(ref.shape, dtype=kept_as(ref, dtype))


def _matrix(ref: TensorRef, data: Tensor, others: Mapping[str, Any]) -> Matrix:
    """`data` packed as the tensor `ref` is, if it is; scales that lie apart are among `others`."""
    if ref.dtype in SCALED:
        scales = others[ref.name + SCALES]
        return scaled(data, scales, (ref.shape[0], ref.shape[1]), SCALED[ref.dtype], ref.block)
    if ref.dtype in PACKINGS:
        return Packed(data, (ref.shape[0], ref.shape[1]), PACKINGS[ref.dtype])
    return data


def kept_as(ref: TensorRef, dtype: torch.dtype) -> torch.dtype:
    if ref.dtype == EXPONENTS:
        return torch.uint8
    return torch.float32 if ref.name.endswith((CORRECTION, SCALES)) else dtype


class Reader:
    """Reads parts of tensors past the page cache, converted to the dtype of where they go.

    `readers` parts at once, each of at most `block_bytes` as stored.
    """

    def __init__(
        self, shards: Mapping[Path, Shard], readers: int, block_bytes: int, verification: Verification
    ) -> None:
        self._shards, self._readers, self._block_bytes = shards, readers, block_bytes
        self._verification = verification
        self.loaded_bytes = 0  # read by `load`
        self._buffers: SimpleQueue[mmap.mmap] = SimpleQueue()
        for _ in range(readers):
            self._buffers.put(mmap.mmap(-1, block_bytes + 2 * ALIGNMENT_BYTES))

    def load(self, refs: Sequence[TensorRef], into: Mapping[str, Tensor]) -> None:
        """Fill the tensors `into`, by name; raises RunError."""
        blocks = [block for ref in refs for block in self.blocks(ref, into[ref.name].view(-1))]
        with ThreadPoolExecutor(self._readers) as readers:
            self.loaded_bytes += sum(readers.map(lambda block: block(), blocks))

    def blocks(self, ref: TensorRef, into: Tensor, first: int = 0) -> list[Block]:
        """The reads that fill the flat `into` with a tensor's elements from `first` on, in any order."""
        item = DTYPES[ref.dtype].itemsize
        step = max(1, self._block_bytes // item)
        run, stride = (ref.run_bytes or ref.nbytes) // item, ref.stride_bytes // item
        blocks: list[Block] = []
        at = 0
        while at < len(into):
            row, column = divmod(first + at, run)
            rows = min((len(into) - at) // run, step // stride) if stride and not column else 0
            count = rows * run or min(len(into) - at, run - column, step)
            place = ref.offset + (row * stride + column) * item
            blocks.append(partial(self._read, ref, place, into[at : at + count].view(max(1, rows), -1)))
            at += count
        return blocks

    def _read(self, ref: TensorRef, low: int, into: Tensor) -> int:
        """Fill the rows of `into` with runs of bytes, the first at `low`: each read on its own, or all at
        once where less than a block of the file lies between them."""
        apart = ref.stride_bytes - ref.run_bytes >= ALIGNMENT_BYTES
        buffer, nbytes = self._buffers.get(), 0
        try:
            for row in range(len(into) if apart else 1):
                some = into[row : row + 1] if apart else into
                nbytes += self._read_runs(ref, low + row * ref.stride_bytes, some, buffer)
        except (OSError, EOFError) as error:
            raise ReadError(f"{ref.path}: {ref.name}: cannot be read: {error}") from None
        finally:
            self._buffers.put(buffer)
        return nbytes

    def _read_runs(self, ref: TensorRef, low: int, into: Tensor, buffer: mmap.mmap) -> int:
        item = DTYPES[ref.dtype].itemsize
        high = low + (len(into) - 1) * ref.stride_bytes + into.shape[1] * item
        start = _down(low)
        self._shards[ref.path].read(start, memoryview(buffer)[: _up(high) - start])
        data = torch.frombuffer(buffer, dtype=torch.uint8)[low - start : high - start]
        self._verification.piece(ref.path, low, memoryview(buffer)[low - start : high - start])
        into.copy_(_typed(data, ref).as_strided(into.shape, (max(1, ref.stride_bytes // item), 1)))
        return high - low


def _typed(data: Tensor, ref: TensorRef) -> Tensor:
    """Bytes as the tensor's stored dtype; copied where they start between elements."""
    dtype = DTYPES[ref.dtype]
    return (data if data.storage_offset() % dtype.itemsize == 0 else data.clone()).view(dtype)


def _allocate(nbytes: int) -> mmap.mmap:
    """Page-aligned memory, touched, in huge pages where the system grants them."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    torch.frombuffer(memory, dtype=torch.uint8).zero_()
    return memory


def _down(offset: int) -> int:
    return offset // ALIGNMENT_BYTES * ALIGNMENT_BYTES


def _up(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
