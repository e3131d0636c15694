"""Random checkpoints of Mixtral's architecture for benchmarks: safetensors, and the same weights as GGUF.

usage: python benchmarks/checkpoints.py small|big [--gguf]

They are written under build/bench once: "small" has 1.8 GB, "big" 14 GB. Weights are normal, scaled by
1/sqrt(fan in) so that activations keep their size; a seed fixes each file. `--gguf` needs the package `gguf`
and none of ours, so that the environment of the peers can run it.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BUILD = Path(__file__).parents[1] / "build" / "bench"
LAYERS_PER_SHARD = 2


@dataclass(frozen=True)
class Shape:
    """Mixtral's: heads of 64, `top` experts a token."""

    name: str
    layers: int
    hidden: int
    inner: int
    kv_heads: int = 8
    experts: int = 8
    top: int = 2
    vocab: int = 32000
    head_dim: int = 64

    @property
    def heads(self) -> int:
        return self.hidden // self.head_dim

    @property
    def folder(self) -> Path:
        return BUILD / self.name

    @property
    def gguf(self) -> Path:
        return BUILD / f"{self.name}.gguf"

    def config(self) -> dict[str, Any]:
        """What transformers calls config.json."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "tie_word_embeddings": False,
            "sliding_window": None,
        }

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes [rows, columns] by name."""
        p, hidden, inner = f"model.layers.{layer}.", self.hidden, self.inner
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "self_attn.q_proj.weight": (q, hidden),
            p + "self_attn.k_proj.weight": (kv, hidden),
            p + "self_attn.v_proj.weight": (kv, hidden),
            p + "self_attn.o_proj.weight": (hidden, q),
            p + "block_sparse_moe.gate.weight": (self.experts, hidden),
        }
        for e in range(self.experts):
            x = p + f"block_sparse_moe.experts.{e}."
            shapes |= {x + "w1.weight": (inner, hidden), x + "w2.weight": (hidden, inner)}
            shapes |= {x + "w3.weight": (inner, hidden)}
        return shapes

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """What each file holds."""
        hidden = self.hidden
        yield {
            "model.embed_tokens.weight": (self.vocab, hidden),
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocab, hidden),
        }
        for first in range(0, self.layers, LAYERS_PER_SHARD):
            layers = range(first, min(self.layers, first + LAYERS_PER_SHARD))
            yield {name: shape for at in layers for name, shape in self.layer_tensors(at).items()}


SHAPES = {s.name: s for s in (Shape("small", 16, 1024, 2048), Shape("big", 24, 2048, 5632))}


def weights_bytes(shape: Shape) -> int:
    """What the checkpoint takes in bf16."""
    return sum(2 * math.prod(s) for shard in shape.shards() for s in shard.values())


def write_checkpoint(shape: Shape) -> Path:
    """The checkpoint's folder; what is there already is kept."""
    import torch
    from safetensors.torch import save_file

    if (shape.folder / "config.json").exists():
        return shape.folder
    shape.folder.mkdir(parents=True, exist_ok=True)
    shards = list(shape.shards())
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        numbers = torch.Generator().manual_seed(number)
        weights = {name: _random(size, numbers) for name, size in shard.items()}
        save_file(weights, shape.folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    table = {"metadata": {"total_size": weights_bytes(shape)}, "weight_map": index}
    (shape.folder / "model.safetensors.index.json").write_text(json.dumps(table))
    (shape.folder / "config.json").write_text(json.dumps(shape.config()))  # last: the weights are whole
    return shape.folder


def packed_checkpoint(shape: Shape, name: str) -> Path:
    """The checkpoint in a format of `runtime_min quantize`, packed now where it is not there; or in bf16."""
    if name == "bf16":
        return shape.folder
    folder = shape.folder.with_name(f"{shape.name}-{name}")
    if not (folder / "config.json").exists():
        command = [sys.executable, "-m", "moeplan.runtime_min", "quantize", str(shape.folder), str(folder)]
        subprocess.run([*command, "--to", name], check=True, stdout=subprocess.DEVNULL)
    return folder


def _random(size: tuple[int, ...], numbers: torch.Generator) -> torch.Tensor:
    import torch

    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.randn(size, generator=numbers).mul_(size[-1] ** -0.5).bfloat16()


def write_gguf(shape: Shape) -> Path:
    """The same weights as llama.cpp reads them: matrices in bf16, norms and routers in float32.

    A vocabulary is made up, since llama.cpp wants one. One layer is in memory at a time.
    """
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    if shape.gguf.exists():
        return shape.gguf
    part = shape.gguf.with_suffix(".part")
    writer = GGUFWriter(part, "llama")
    _describe(writer, shape)
    for name, size, half, _ in _gguf_tensors(shape):
        stored = (*size[:-1], 2 * size[-1]) if half else size
        kind = GGMLQuantizationType.BF16 if half else GGMLQuantizationType.F32
        nbytes, item = math.prod(size) * (2 if half else 4), np.dtype(np.uint8 if half else np.float32)
        writer.add_tensor_info(name, stored, item, nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    opened = _Opened(shape.folder)
    for _, _, half, sources in _gguf_tensors(shape):
        tensor = torch.stack([_arranged(shape, name, opened[name]) for name in sources])
        writer.write_tensor_data((tensor.view(torch.uint8) if half else tensor.float()).numpy())
    writer.close()
    part.rename(shape.gguf)
    return shape.gguf


def _describe(writer: Any, shape: Shape) -> None:
    from gguf import LlamaFileType, TokenType

    writer.add_name(f"random-{shape.name}")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top)
    writer.add_vocab_size(shape.vocab)
    writer.add_file_type(LlamaFileType.MOSTLY_BF16)
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    words = ["<unk>", "<s>", "</s>", *bytes_, *(f"w{at}" for at in range(shape.vocab - 259))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * shape.vocab)
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * (shape.vocab - 259)])


def _gguf_tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], bool, list[str]]]:
    """Name, shape, whether it is stored in bf16, and the tensors it is made of; experts are stacked."""
    yield "token_embd.weight", (shape.vocab, shape.hidden), True, ["model.embed_tokens.weight"]
    yield "output_norm.weight", (shape.hidden,), False, ["model.norm.weight"]
    yield "output.weight", (shape.vocab, shape.hidden), True, ["lm_head.weight"]
    single = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "block_sparse_moe.gate",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
    for layer in range(shape.layers):
        p, sizes = f"model.layers.{layer}.", shape.layer_tensors(layer)
        for to, source in single.items():
            name = f"{p}{source}.weight"
            yield (
                f"blk.{layer}.{to}.weight",
                sizes[name],
                to.startswith("attn_") and to != "attn_norm",
                [name],
            )
        for to, source in {"ffn_gate_exps": "w1", "ffn_down_exps": "w2", "ffn_up_exps": "w3"}.items():
            names = [f"{p}block_sparse_moe.experts.{e}.{source}.weight" for e in range(shape.experts)]
            yield f"blk.{layer}.{to}.weight", (shape.experts, *sizes[names[0]]), True, names


def _arranged(shape: Shape, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of queries and keys as llama.cpp's rotary embedding pairs them, as its converter does."""
    heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
    if not heads:
        return tensor
    rows, columns = tensor.shape
    return tensor.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


class _Opened:
    """Tensors by name, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._folder / self._files[name], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--gguf", action="store_true", help="write the GGUF file too")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    print(f"{write_checkpoint(shape)}: {weights_bytes(shape) / 1e9:.2f} GB")
    if options.gguf:
        print(write_gguf(shape))


if __name__ == "__main__":
    main()
