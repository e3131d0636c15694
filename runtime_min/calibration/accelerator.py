"""Figures of an accelerator, through torch's device-neutral interface.

Nothing here has run on an accelerator of ours: tests run it on torch's CPU device, where copies are copies in
memory and nothing is pinned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSizes:
    """What is copied and multiplied; large enough that a launch is nothing beside it."""

    copy_bytes: int = 256 << 20
    width: int = 4096
    rows: Sequence[int] = (1, 16, 64, 256, 1024, 4096)
    prompt: int = 1024
    repeats: int = 10


def measure_accelerator() -> dict[str, Any] | None:
    """The group `gpu` of a machine file, or None where torch knows no accelerator. Has not run on one yet."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return None
    module = torch.get_device_module(device)
    name = str(module.get_device_name()).split(" ", 1)[-1]
    return {
        "name": f"'{name}'",
        "count": torch.accelerator.device_count(),
        "memory_bytes": int(module.mem_get_info()[1]),
        **measure_device(device, DeviceSizes()),
    }


def measure_device(device: torch.device, sizes: DeviceSizes) -> dict[str, Any]:
    """Rates of `device`: copies, its memory, products, prefill as a share of the best product.

    The rates of copies that the planner has no use for yet, and products by rows, are under `notes`.
    """
    bench = _Device(device, sizes)
    pinned, pageable = bench.copies(pinned=True), bench.copies(pinned=False)
    products = {name: bench.products(dtype) for name, dtype in _DTYPES.items()}
    best = {name: max(by_rows.values()) for name, by_rows in products.items()}
    half = max(("bf16", "fp16"), key=best.__getitem__)
    prefill = bench.prefill_flops_per_s(_DTYPES[half])
    return {
        "memory_bytes_per_s": bench.memory_bytes_per_s(),
        "flops_per_s": best,
        "host_link_bytes_per_s": pinned[0],
        "peer_bytes_per_s": min(pinned),  # through the host: a faster path is not looked for
        "launch_s": bench.launch_s(),
        "prefill_efficiency": min(1.0, prefill / best[half]),
        "notes": {
            "to host, pinned": pinned[1],
            "to device, pageable": pageable[0],
            "to host, pageable": pageable[1],
            **{f"{name} product, {n} rows": r for name, table in products.items() for n, r in table.items()},
        },
    }


class _Device:
    def __init__(self, device: torch.device, sizes: DeviceSizes) -> None:
        self._device, self._sizes = device, sizes

    def _seconds(self, work: Callable[[], object]) -> float:
        """Mean seconds of `work`, everything it started included."""
        work()
        self._wait()
        start = time.perf_counter()
        for _ in range(self._sizes.repeats):
            work()
        self._wait()
        return (time.perf_counter() - start) / self._sizes.repeats

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

    def copies(self, pinned: bool) -> tuple[float, float]:
        """Bytes per second to the device and back."""
        size = self._sizes.copy_bytes
        pin = pinned and self._device.type != "cpu"
        host = torch.ones(size, dtype=torch.uint8, pin_memory=pin)
        there = torch.empty(size, dtype=torch.uint8, device=self._device)
        up = self._seconds(lambda: there.copy_(host, non_blocking=pin))
        down = self._seconds(lambda: host.copy_(there, non_blocking=pin))
        return size / up, size / down

    def memory_bytes_per_s(self) -> float:
        """Of a copy within the device's memory, each byte read and written."""
        source = torch.ones(self._sizes.copy_bytes, dtype=torch.uint8, device=self._device)
        copy = torch.empty_like(source)
        return 2 * self._sizes.copy_bytes / self._seconds(lambda: copy.copy_(source))

    def products(self, dtype: torch.dtype) -> dict[int, float]:
        """FLOP/s by rows, with a square matrix."""
        width = self._sizes.width
        weight = torch.ones(width, width, dtype=dtype, device=self._device)
        found = {}
        for rows in self._sizes.rows:
            x = torch.ones(rows, width, dtype=dtype, device=self._device)
            found[rows] = 2 * rows * width**2 / self._seconds(partial(F.linear, x, weight))
        return found

    def prefill_flops_per_s(self, dtype: torch.dtype) -> float:
        """Of a dense layer's prefill: attention of one prompt, then an MLP, and small operators between."""
        width, prompt, heads = self._sizes.width, self._sizes.prompt, max(1, self._sizes.width // 128)
        x = torch.ones(prompt, width, dtype=dtype, device=self._device) / width
        square = torch.ones(width, width, dtype=dtype, device=self._device) / width

        def layer() -> None:
            normed = F.rms_norm(x, (width,))
            q, k, v = (F.linear(normed, square).view(1, prompt, heads, -1).transpose(1, 2) for _ in range(3))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y = x + F.linear(attended.transpose(1, 2).reshape(prompt, width), square)
            normed = F.rms_norm(y, (width,))
            F.linear(F.silu(F.linear(normed, square)) * F.linear(normed, square), square)

        flops = 7 * 2 * prompt * width**2 + 2 * prompt**2 * width
        return flops / self._seconds(layer)

    def launch_s(self) -> float:
        """Seconds per small operator when many are queued."""
        one = torch.ones(1, device=self._device)

        def work() -> None:
            for _ in range(100):
                one.add_(0.0)

        return self._seconds(work) / 100
