"""Pages: the bytes of the file, wherever the tensors lie, whatever the file system allows."""

import errno
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeplan.runtime_min import pages
from moeplan.runtime_min.checkpoint import find_tensors
from moeplan.runtime_min.checksums import verification, write_checksums
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.plan_file import PagePlan

PLAN = PagePlan(
    pages_per_layer=2,
    experts_per_page=1,
    resident_pages=0,
    slots=2,
    slot_bytes=256 << 10,
    readers=2,
    block_bytes=8192,
    places=0,
    guesses=0,
)
NAMES = [["a", "c"], ["b", "d"]]  # of page 0 and page 1


def save(path: Path, tensors: dict[str, torch.Tensor], pad: int = 0) -> None:
    """A safetensors file whose data starts `pad` bytes further on than it would."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode() + b" " * pad
    data = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def random_tensors(stored: torch.dtype) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    shapes = {"a": (70, 33), "b": (1, 5), "c": (129, 64), "d": (3, 1000)}
    return {name: torch.randn(shape, generator=source).to(stored) for name, shape in shapes.items()}


def open_store(
    folder: Path, tensors: dict[str, torch.Tensor], plan: PagePlan, dtype: torch.dtype
) -> pages.PageStore:
    refs = find_tensors(folder, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    checks = verification(folder, (ref.path for ref in refs.values()))
    moving = {(0, page): NAMES[page] for page in range(plan.resident_pages, plan.pages_per_layer)}
    return pages.PageStore(refs, plan, moving, dtype, checks)


@pytest.mark.parametrize("pad", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resident", [0, 1, 2])
def test_pages_hold_the_tensors(tmp_path, pad, stored, dtype, resident):
    """Streamed and resident, converted or not, on whole elements or between them."""
    tensors = random_tensors(stored)
    save(tmp_path / "model.safetensors", tensors, pad)
    plan = replace(PLAN, resident_pages=resident)
    store = open_store(tmp_path, tensors, plan, dtype)
    for page, names in enumerate(NAMES):
        slot = -1 if page < resident else page
        for read in store.blocks(0, page, slot) if slot >= 0 else []:
            read()
        view = store.view(0, page, slot)
        for name in names:
            assert torch.equal(view[name], tensors[name].to(dtype))
    store.close()


@pytest.mark.parametrize(("pad", "copied"), [(0, False), (1, True)])
def test_only_a_tensor_between_elements_is_copied(tmp_path, pad, copied):
    tensors = random_tensors(torch.float32)
    save(tmp_path / "model.safetensors", tensors)
    header = (tmp_path / "model.safetensors").read_bytes()[0]
    save(tmp_path / "model.safetensors", tensors, pad=-header % 4 + pad)
    store = open_store(tmp_path, tensors, PLAN, torch.float32)
    slot = store._slots[1]
    inside = slot.data_ptr() <= store.view(0, 0, 1)["c"].data_ptr() < slot.data_ptr() + slot.nbytes
    assert inside != copied
    store.close()


def refuse_direct_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(pages.os, "open", refuse)


def refuse_direct_read(monkeypatch: pytest.MonkeyPatch) -> None:
    real, failed = os.preadv, []

    def refuse(file, buffers, offset):
        if not failed:
            failed.append(True)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, buffers, offset)

    monkeypatch.setattr(pages.os, "preadv", refuse)


@pytest.mark.parametrize("refuse", [refuse_direct_open, refuse_direct_read])
def test_file_systems_without_direct_reads(tmp_path, monkeypatch, refuse):
    refuse(monkeypatch)
    tensors = random_tensors(torch.float32)
    save(tmp_path / "model.safetensors", tensors)
    store = open_store(tmp_path, tensors, PLAN, torch.float32)
    for read in store.blocks(0, 1, 0):
        read()
    assert torch.equal(store.view(0, 1, 0)["d"], tensors["d"])
    assert not store._shards[tmp_path / "model.safetensors"]._direct
    store.close()


def test_a_file_cut_short_while_running(tmp_path):
    """Named by file and tensor."""
    tensors = random_tensors(torch.float32)
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    store = open_store(tmp_path, tensors, PLAN, torch.float32)
    os.truncate(path, 20_000)
    with pytest.raises(pages.ReadError, match=r"model\.safetensors: c: cannot be read: ends at byte"):
        store.blocks(0, 0, 0)[-1]()
    store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("resident", [0, 2])
@pytest.mark.parametrize("name", ["a", "b", "c", "d"])
def test_a_flipped_bit_is_found_by_the_read_that_completes_its_tensor(tmp_path, dtype, resident, name):
    """Streamed or resident, converted or not; the first time that it is read, not again."""
    tensors = random_tensors(torch.float32)
    path = tmp_path / "model.safetensors"
    save(path, tensors)
    write_checksums(tmp_path)
    refs = find_tensors(tmp_path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    whole = path.read_bytes()
    corrupt = bytearray(whole)
    corrupt[refs[name].offset + 7] ^= 1
    path.write_bytes(corrupt)
    plan = replace(PLAN, resident_pages=resident)

    def read_all(store: pages.PageStore) -> None:
        for page in range(resident, len(NAMES)):
            for read in store.blocks(0, page, page):
                read()

    with pytest.raises(RunError, match=rf"model\.safetensors: {name}: is corrupt"):
        read_all(open_store(tmp_path, tensors, plan, dtype))
    path.write_bytes(whole)
    store = open_store(tmp_path, tensors, plan, dtype)
    read_all(store)
    path.write_bytes(corrupt)
    read_all(store)


def test_a_page_larger_than_its_slot(tmp_path):
    tensors = random_tensors(torch.float32)
    save(tmp_path / "model.safetensors", tensors)
    plan = replace(PLAN, slot_bytes=8192)
    with pytest.raises(RunError, match=r"page 0 of layer 0 takes .* a slot of the plan holds 8,192"):
        open_store(tmp_path, tensors, plan, torch.float32)


def test_extents_touch_no_unneeded_block(tmp_path):
    """Neighbours share an extent; what lies apart does not."""
    tensors = {"a": torch.ones(1024), "b": torch.ones(60 << 10), "c": torch.ones(1024), "d": torch.ones(1024)}
    save(tmp_path / "model.safetensors", tensors)
    store = open_store(tmp_path, tensors, PLAN, torch.float32)
    first, second = store._layouts[0, 0], store._layouts[0, 1]
    assert len(first.extents) == 2
    assert first.nbytes <= 4 * 4096
    assert second.nbytes <= (240 << 10) + 4 * 4096
    assert all(
        extent.offset % 4096 == extent.nbytes % 4096 == extent.at % 4096 == 0 for extent in first.extents
    )
    store.close()
