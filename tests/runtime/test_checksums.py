"""A flipped bit is found, and named by file and tensor."""

import json
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moeplan.runtime_min import __main__ as command
from moeplan.runtime_min.checkpoint import CheckpointError, TensorRef
from moeplan.runtime_min.checksums import (
    Verification,
    check_checksums,
    joined_crc,
    read_checksums,
    verification,
    write_checksums,
)
from moeplan.runtime_min.errors import RunError

from .folders import Shape, save_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    save_checkpoint(tmp_path / "checkpoint", Shape(layers=1, shard="40KB"))
    return tmp_path / "checkpoint"


def test_checksums_are_of_the_bytes_that_safetensors_reads(checkpoint):
    noted = json.loads(write_checksums(checkpoint).read_text())
    tensors = {}
    for path in checkpoint.glob("*.safetensors"):
        tensors |= load_file(path)
    assert noted == {name: f"{zlib.crc32(data.tobytes()):08x}" for name, data in tensors.items()}
    assert check_checksums(checkpoint) == len(tensors)


def test_a_flipped_bit_is_found(checkpoint, capsys):
    assert command.main(["checksum", str(checkpoint)]) == 0
    shard = sorted(checkpoint.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert command.main(["checksum", str(checkpoint), "--check"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{shard}: ")
    assert err.count("is corrupt") == 1


@given(data=st.binary(max_size=200), cut=st.integers(0, 200))
def test_the_checksum_of_two_pieces(data, cut):
    first, second = data[:cut], data[cut:]
    assert joined_crc(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(data)


@given(data=st.binary(min_size=1, max_size=200), step=st.integers(1, 50), order=st.randoms())
def test_pieces_in_any_order(data, step, order):
    """Also where a second read begins before the first has ended: what differs in one bit is found, once."""
    starts = list(range(0, len(data), step)) * 2
    order.shuffle(starts)
    before, path = TensorRef("s", Path("x"), 0, 3, "F32", ()), Path("x")
    ref = TensorRef("t", path, 3, len(data), "F32", ())

    def read(found: bytes) -> Verification:
        verification = Verification([ref, before], {"t": zlib.crc32(data), "s": 0})
        for start in starts:
            verification.piece(path, 3 + start, memoryview(found)[start : start + step])
        assert verification.awaits(path, 0)
        return verification

    assert not read(data).awaits(path, 3)
    with pytest.raises(RunError, match="x: t: is corrupt"):
        read(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_file_without_a_tensor_of_the_model(checkpoint):
    path = write_checksums(checkpoint)
    sums = json.loads(path.read_text())
    name = min(sums)
    path.write_text(json.dumps({other: crc for other, crc in sums.items() if other != name}))
    with pytest.raises(CheckpointError, match=f"checksums.json: {name}: has no checksum"):
        verification(checkpoint, checkpoint.glob("*.safetensors"))


def test_nothing_to_compare_with(checkpoint, tmp_path, capsys):
    assert read_checksums(checkpoint) is None
    assert command.main(["checksum", str(checkpoint), "--check"]) == 2
    assert "checksums.json: is missing" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command.main(["checksum", str(tmp_path / "empty")]) == 2
    assert "has no safetensors file" in capsys.readouterr().err
