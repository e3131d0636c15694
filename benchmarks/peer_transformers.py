"""Time transformers on a checkpoint, in RAM or offloaded to disk by accelerate: a JSON row per batch.

usage: PEER_PYTHON benchmarks/peer_transformers.py FOLDER --batches 1,32 [--prompt N] [--tokens N]
           [--experts eager|grouped_mm|batched_mm] [--offload FOLDER --cpu-bytes N]

`peers.py` starts this in the peers' own environment; it needs torch, transformers and accelerate, none of
ours. Greedy decoding with a KV cache, every prompt of the same length, so nothing is padded. The first decode
step warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

# Virtual machines that show AMX without tiles end in SIGILL otherwise: see runtime_min/cpu.py.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")


def main() -> None:
    options = _options()
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    start = time.perf_counter()
    model = _load(options)
    print(json.dumps({"load_s": time.perf_counter() - start}), flush=True)
    for batch in options.batches:
        with torch.inference_mode():
            row = _time(model, batch, options.prompt, options.tokens)
        print(json.dumps(row), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], required=True)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--experts", default="eager")
    parser.add_argument("--offload", type=Path)
    parser.add_argument("--cpu-bytes", type=int, default=0)
    return parser.parse_args()


def _load(options: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    how: dict[str, Any] = {"dtype": torch.bfloat16, "experts_implementation": options.experts}
    if options.offload:
        how |= {
            "device_map": "auto",
            "max_memory": {"cpu": options.cpu_bytes},
            "offload_folder": options.offload,
        }
    model: Any = AutoModelForCausalLM.from_pretrained(options.folder, **how)
    return model.eval()


def _time(model: Any, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """Tokens/s of prefill and decode, and bytes read from storage by the decode steps that were timed."""
    import torch

    numbers = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=numbers)
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill_s = time.perf_counter() - start
    steps_s: list[float] = []
    read = 0
    for step in range(tokens):
        before, start = _bytes_read(), time.perf_counter()
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(input_ids=ids, cache=out.past_key_values, use_cache=True)
        if step:
            steps_s.append(time.perf_counter() - start)
            read += _bytes_read() - before
    return {
        "batch": batch,
        "prefill_tokens_per_s": batch * prompt / prefill_s,
        "decode_tokens_per_s": batch * len(steps_s) / sum(steps_s),
        "pass_bytes": read / len(steps_s),
        "rss_bytes": 1024 * _field("/proc/self/status", "VmHWM"),
    }


def _bytes_read() -> int:
    return _field("/proc/self/io", "read_bytes")


def _field(path: str, name: str) -> int:
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
