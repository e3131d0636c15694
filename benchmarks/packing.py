"""What packing a checkpoint, or an int8 KV cache, costs in quality, and how small it is.

usage: python benchmarks/packing.py CHECKPOINT [--text FILE] [--tokens N]

CHECKPOINT is a folder that transformers loads (its class, float32 arithmetic), with experts apart or a dense
model. All matrices that `runtime_min quantize` packs are replaced by what they stand for; the perplexity of
the text is that of windows of 512 tokens. Also printed: bits a value.
Last, with the weights as they are, all keys and values are rounded as the runtime's int8 cache holds them,
which is what decode sees; the error of scores is the root of its mean square over that of their deviations.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from moeplan.runtime_min.checkpoint import read_json
from moeplan.runtime_min.formats import PACKINGS, fits
from moeplan.runtime_min.models import BY_MODEL_TYPE
from moeplan.runtime_min.packing import packed, unpack
from moeplan.runtime_min.paged import whole_numbers

WINDOW = 512


class Int8Cache(DynamicCache):
    """Keys and values as runtime_min keeps them in int8."""

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        return super().update(_rounded(keys), _rounded(values), *rest, **more)


def _rounded(values: Tensor) -> Tensor:
    whole, scales = whole_numbers(values)
    return whole * scales[..., None]


def perplexity(model: torch.nn.Module, tokens: Tensor, cache: type[DynamicCache] = DynamicCache) -> float:
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, WINDOW):
            window = tokens[start : start + WINDOW + 1]
            scores = _scores(model, window[:-1], cache).log_softmax(-1)
            total -= scores.gather(1, window[1:, None]).sum().item()
            count += len(window) - 1
    return math.exp(total / count)


def _scores(model: torch.nn.Module, tokens: Tensor, cache: type[DynamicCache]) -> Tensor:
    """[T, vocabulary]"""
    scores: Tensor = model(tokens[None], past_key_values=cache(), use_cache=True).logits[0].float()
    return scores


def score_error(model: torch.nn.Module, tokens: Tensor) -> float:
    """Of the first window, relative."""
    with torch.inference_mode():
        exact, rounded = (_scores(model, tokens[:WINDOW], cache) for cache in (DynamicCache, Int8Cache))
    deviations = exact - exact.mean(-1, keepdim=True)
    return ((rounded - exact).square().mean() / deviations.square().mean()).sqrt().item()


def expert_parameters(model: torch.nn.Module, kind: str) -> list[torch.nn.Parameter]:
    """Those that `runtime_min quantize` packs; transformers has all experts of a layer in two tensors."""
    part = ".experts." if BY_MODEL_TYPE[kind].routed else ".mlp."
    found = [p for name, p in model.named_parameters() if part in name and p.dim() >= 2]
    return [p for p in found if fits((1, p.shape[-1]))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE")
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    kind = str(read_json(options.checkpoint / "config.json")["model_type"])
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.float32)
    text = options.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text)["input_ids"][: options.tokens])
    parameters = expert_parameters(model, kind)
    original = [p.detach().clone() for p in parameters]
    values = sum(p.numel() for p in parameters)
    base = perplexity(model, tokens)
    print(f"{values:,} packed values of {sum(p.numel() for p in model.parameters()):,}; {len(tokens)} tokens")
    print(f"as it is: perplexity {base:.4f}")
    for name, packing in PACKINGS.items():
        size = 0
        for parameter, weight in zip(parameters, original, strict=True):
            flat = weight.bfloat16().reshape(-1, weight.shape[-1])
            small = packed(flat, packing)
            size += len(small.data)
            parameter.data = unpack(small).float().view_as(weight)
        found = perplexity(model, tokens)
        bits, change = 8 * size / values, found / base - 1
        print(f"{name}: perplexity {found:.4f} ({change:+.2%}), {bits:.2f} bits a value")
    for parameter, weight in zip(parameters, original, strict=True):
        parameter.data = weight
    found, error = perplexity(model, tokens, Int8Cache), score_error(model, tokens)
    print(f"kv-int8: perplexity {found:.4f} ({found / base - 1:+.2%}), error of the scores {error:.2%}")


if __name__ == "__main__":
    main()
