"""A checkpoint that is not whole, or not the plan's, is refused by file and tensor before any work."""

import json
import shutil
import struct
from pathlib import Path

import pytest

from moeplan.runtime_min.checkpoint import CheckpointError, find_tensors
from moeplan.runtime_min.model_config import ModelConfig, read_config
from moeplan.runtime_min.models.tensors import tensor_shapes, unused

from .folders import Shape, make_plan, save_checkpoint

SHAPE = Shape()
PLAIN = ModelConfig(norm_eps=1e-5, rope_theta=1e4, tied=False, eos=frozenset())
MODEL = make_plan(SHAPE).model
SHAPES = tensor_shapes(MODEL, PLAIN)
TENSOR = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {"single": tmp_path_factory.mktemp("single"), "sharded": tmp_path_factory.mktemp("sharded")}
    save_checkpoint(folders["single"], SHAPE)
    save_checkpoint(folders["sharded"], Shape(shard="20KB"))
    return folders


@pytest.fixture(params=["single", "sharded"])
def folder(request, saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[request.param], tmp_path / "checkpoint"))


def shard_of(folder: Path, tensor: str) -> Path:
    index = folder / "model.safetensors.index.json"
    return folder / (
        json.loads(index.read_text())["weight_map"][tensor] if index.exists() else "model.safetensors"
    )


def problems(folder: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        find_tensors(folder, SHAPES)
    return caught.value.problems


def edit_header(path: Path, change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_a_whole_checkpoint_is_found(folder):
    refs = find_tensors(folder, SHAPES)
    assert {name: ref.shape for name, ref in refs.items()} == SHAPES


def test_missing_file(folder):
    path = shard_of(folder, TENSOR)
    path.unlink()
    [problem] = problems(folder)
    assert str(path) in problem or "has neither" in problem


def test_truncated_file(folder):
    path = shard_of(folder, TENSOR)
    path.write_bytes(path.read_bytes()[:-10])
    [problem] = problems(folder)
    assert problem.startswith(str(path))
    assert ": ends at byte" in problem


def test_missing_tensor(folder):
    path = shard_of(folder, TENSOR)
    edit_header(path, lambda header: header.pop(TENSOR))
    [problem] = problems(folder)
    assert problem == f"{folder}: {TENSOR}: is missing"


def test_wrong_shape_names_both(folder):
    path = shard_of(folder, TENSOR)
    edit_header(path, lambda header: header[TENSOR].update(shape=[SHAPE.inner, SHAPE.hidden]))
    [problem] = problems(folder)
    assert problem == f"{path}: {TENSOR}: has shape [36, 24], the plan [24, 36]"


def test_bytes_that_are_not_the_shape(folder):
    path = shard_of(folder, TENSOR)
    edit_header(path, lambda header: header[TENSOR].update(dtype="BF16"))
    [problem] = problems(folder)
    assert f"{TENSOR}: 3456 bytes are not BF16 [24, 36]" in problem


def test_unknown_dtype(folder):
    path = shard_of(folder, TENSOR)
    edit_header(path, lambda header: header[TENSOR].update(dtype="F8_E5M2"))
    [problem] = problems(folder)
    assert problem == f"{path}: {TENSOR}: has dtype F8_E5M2, expected BF16, F16, F32"


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "block_sparse_moe.experts.gate_up_proj"])
def test_a_tensor_that_the_architecture_does_not_have(folder, name):
    """It stands for something that would not be computed: a bias, experts in one tensor."""
    index, strange = folder / "model.safetensors.index.json", f"model.layers.1.{name}"
    path = shard_of(folder, TENSOR)
    edit_header(
        path, lambda header: header.update({strange: header[TENSOR] | {"data_offsets": [0, 0], "shape": [0]}})
    )
    if index.exists():
        data = json.loads(index.read_text())
        data["weight_map"][strange] = path.name
        index.write_text(json.dumps(data))
    [problem] = problems(folder)
    assert problem.endswith(f"{strange}: is none of the tensors that this runtime knows of the architecture")


@pytest.mark.parametrize("name", ["model.layers.2.eh_proj.weight", "lm_head.weight", "a.rotary_emb.inv_freq"])
def test_tensors_that_are_none_of_the_decoders(name):
    assert unused(MODEL, name)
    assert not unused(MODEL, "model.layers.1.eh_proj.weight")


def test_overlap(folder):
    path = shard_of(folder, TENSOR)

    def shift(header):
        other = next(n for n in header if n not in (TENSOR, "__metadata__") and header[n]["data_offsets"][0])
        header[other]["data_offsets"] = [offset - 4 for offset in header[other]["data_offsets"]]

    edit_header(path, shift)
    [problem] = problems(folder)
    assert ": overlaps " in problem


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (struct.pack("<Q", 1 << 60), "header length 1152921504606846976 does not fit"),
        (struct.pack("<Q", 0), "header length 0 does not fit"),
        (struct.pack("<Q", 64) + b"\xff" * 64, "header cannot be read"),
        (struct.pack("<Q", 64) + b"[" * 64, "header cannot be read"),
        (struct.pack("<Q", 2) + b"[]", "header is not a JSON object"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "a: has a malformed header entry"),
    ],
)
def test_garbage_headers(folder, start, says):
    path = shard_of(folder, TENSOR)
    path.write_bytes(start + path.read_bytes()[len(start) :])
    assert any(problem.startswith(f"{path}: {says}") for problem in problems(folder))


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_files_too_short_for_a_header(folder, content):
    path = shard_of(folder, TENSOR)
    path.write_bytes(content)
    assert any(problem.startswith(f"{path}: header length") for problem in problems(folder))


def test_all_problems_at_once(saved, tmp_path):
    folder = Path(shutil.copytree(saved["sharded"], tmp_path / "checkpoint"))
    other = "model.layers.0.self_attn.q_proj.weight"
    edit_header(shard_of(folder, TENSOR), lambda header: header[TENSOR].update(shape=[1, 864]))
    edit_header(shard_of(folder, other), lambda header: header[other].update(shape=[1, 960]))
    found = problems(folder)
    assert len(found) == 2
    assert all(any(name in problem for problem in found) for name in (TENSOR, other))


def test_a_shard_outside_the_folder_is_refused(saved, tmp_path):
    folder = Path(shutil.copytree(saved["sharded"], tmp_path / "checkpoint"))
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][TENSOR] = "../../etc/passwd"
    index.write_text(json.dumps(data))
    assert any("'../../etc/passwd' is not a file of this folder" in problem for problem in problems(folder))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is ['LlamaForCausalLM']"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor is 0.0, expected a positive number"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope type 'ntk' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5, this runtime"),
        ({"attention_bias": True}, "attention_bias is True, this runtime knows no biases"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear"}},
            "rope type 'linear' is not supported",
        ),
        ({"sliding_window": "32"}, "sliding_window is '32'"),
        ({"max_position_embeddings": 63}, "max_position_embeddings is 63"),
        ({"hidden_size": 25}, "hidden_size is 25, the plan has 24"),
        ({"head_dim": None}, "head_dim is 6, the plan has 10"),
        ({"num_local_experts": "4"}, "num_local_experts is '4', the plan has 4"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a positive number"),
    ],
)
def test_config_that_disagrees(saved, tmp_path, change, says):
    path = Path(shutil.copytree(saved["single"], tmp_path / "checkpoint")) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError) as caught:
        read_config(path.parent, MODEL, 64)
    assert any(problem.startswith(f"{path}: {says}") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("change", "theta"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, 5e4),
        ({"rope_parameters": None, "rope_theta": 3e4}, 3e4),
        ({"rope_parameters": None}, 1e6),
    ],
)
def test_rope_theta_in_either_place(saved, tmp_path, change, theta):
    path = Path(shutil.copytree(saved["single"], tmp_path / "checkpoint")) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    config = read_config(path.parent, MODEL, 64)
    assert config.rope_theta == theta
    assert config.eos == {258}
    assert not config.tied
