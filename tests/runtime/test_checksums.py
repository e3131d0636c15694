"""A flipped bit is found, and named by file and tensor."""

import json
import zlib

import pytest
from safetensors.numpy import load_file

from moeplan.runtime_min import __main__ as command
from moeplan.runtime_min.checkpoint import TensorRef
from moeplan.runtime_min.checksums import check_checksums, read_checksums, verify_tensor, write_checksums
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


def test_verify_tensor(checkpoint):
    write_checksums(checkpoint)
    sums = read_checksums(checkpoint)
    name, tensor = load_file(next(checkpoint.glob("*.safetensors"))).popitem()
    data = bytearray(tensor.tobytes())
    ref = TensorRef(name, checkpoint / "x", 0, len(data), "F32", ())
    verify_tensor(sums, ref, memoryview(data))
    data[0] ^= 1
    with pytest.raises(RunError, match=f"{name}: is corrupt"):
        verify_tensor(sums, ref, memoryview(data))


def test_nothing_to_compare_with(checkpoint, tmp_path, capsys):
    assert read_checksums(checkpoint) is None
    assert command.main(["checksum", str(checkpoint), "--check"]) == 2
    assert "checksums.json: is missing" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert command.main(["checksum", str(tmp_path / "empty")]) == 2
    assert "has no safetensors file" in capsys.readouterr().err
