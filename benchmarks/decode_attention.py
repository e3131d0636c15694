"""Decode attention over a paged KV cache: the compiled kernel, and torch on blocks gathered first.

usage: python benchmarks/decode_attention.py

GB/s of keys and values, the kernel's share of what the memory gives in the same run, and its speed beside
torch's. Four layers in turn, so that caches of useful size lie in memory. Medians of seven.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from moeplan.runtime_min.cpu import cap_onednn

cap_onednn()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from moeplan.runtime_min.decode_attention import decode_attention  # noqa: E402
from moeplan.runtime_min.plan_file import KV_BLOCK_TOKENS, kv_blocks  # noqa: E402

LAYERS = 4
CASES = [  # sequences, key heads, query heads to each, head dimension, tokens of context
    (1, 8, 4, 128, 2048),
    (8, 8, 4, 128, 2048),
    (32, 8, 2, 64, 64),
    (32, 8, 4, 128, 512),
    (128, 8, 2, 64, 64),
    (128, 8, 4, 128, 512),
    (512, 8, 2, 64, 64),
]


def main() -> None:
    values = torch.ones(1 << 27)
    dram = values.nbytes / seconds(values.sum)
    print(f"memory read at {dram / 1e9:.1f} GB/s, {torch.get_num_threads()} threads")
    print("dtype     sequences  heads  group  width  context   kernel GB/s  of memory   torch GB/s  ratio")
    for dtype in (torch.bfloat16, torch.float32):
        for case in CASES:
            kernel, gathered = rates(dtype, *case)
            count, heads, group, size, context = case
            print(
                f"{str(dtype)[6:]:10}{count:9}{heads:7}{group:7}{size:7}{context:9}{kernel / 1e9:14.1f}"
                f"{kernel / dram:11.0%}{gathered / 1e9:13.1f}{kernel / gathered:7.1f}"
            )


@torch.inference_mode()
def rates(dtype: torch.dtype, count: int, heads: int, group: int, size: int, context: int) -> list[float]:
    """Bytes per second of keys and values: kernel, torch."""
    blocks = kv_blocks(context) * count
    cache = torch.randn(LAYERS, 2, blocks, heads, KV_BLOCK_TOKENS, size).to(dtype)
    tables = torch.randperm(blocks).reshape(count, -1).int()
    lengths = torch.full((count,), context).int()
    q = torch.randn(count, heads * group, size).to(dtype)
    nbytes = 2 * LAYERS * count * heads * context * size * cache.element_size()

    def rate(attend: Callable[..., Tensor]) -> float:
        def all_layers() -> None:
            for layer in range(LAYERS):
                attend(q, cache[layer, 0], cache[layer, 1], tables, lengths)

        return nbytes / seconds(all_layers)

    return [rate(decode_attention), rate(gathered_attention)]


def gathered_attention(q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """All blocks copied, then torch: heads that share keys where a sequence would stand."""
    k, v = (x[tables].transpose(1, 2).reshape(len(q), x.shape[1], -1, x.shape[3]) for x in (keys, values))
    seen = (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None]
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[2])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen).flatten(1)


def seconds(work: Callable[[], object]) -> float:
    """Median of seven, after one to warm up."""
    work()
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
