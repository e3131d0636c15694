"""Products on tiles equal float32 products of the same values; those that fit no tiles are torch's."""

import sys

import pytest
import torch

from moeplan.runtime_min import layers, tiles

needs_tiles = pytest.mark.skipif(not tiles.worth(), reason="no AMX tiles here")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@needs_tiles
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 32, 33, 48, 70, 257])
@pytest.mark.parametrize(("rows", "values"), [(32, 32), (48, 64), (112, 96), (512, 256)])
def test_products_equal_float32(tokens, rows, values):
    x, weight = random(tokens, values), random(rows, values, seed=1)
    expected = x.float() @ weight.float().T
    torch.testing.assert_close(tiles.product(x, weight), expected, rtol=1e-5, atol=1e-4)


@needs_tiles
def test_weights_may_begin_anywhere_and_nothing_else_is_read():
    """Not even what lies behind them: NaN there would show."""
    memory = torch.full((48 * 64 + 101,), torch.nan, dtype=torch.bfloat16)
    for start in (0, 1, 7, 100):
        memory.fill_(torch.nan)
        weight = memory[start : start + 48 * 64].view(48, 64)
        weight.copy_(random(48, 64, seed=1))
        x = random(20, 64)
        expected = x.float() @ weight.float().T
        torch.testing.assert_close(tiles.product(x, weight), expected, rtol=1e-5, atol=1e-4)


@needs_tiles
def test_a_row_does_not_depend_on_the_others_nor_on_threads():
    x, weight = random(70, 128), random(96, 128, seed=1)
    whole, before = tiles.product(x, weight), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(tiles.product(x, weight), whole)
            assert torch.equal(tiles.product(x[33:50], weight), whole[33:50])
    finally:
        torch.set_num_threads(before)


@needs_tiles
def test_experts_are_as_close_as_bf16_can_be():
    x, w1, w2, w3 = (
        random(24, 64),
        *(random(*s, seed=n) for n, s in enumerate([(96, 64), (64, 96), (96, 64)], 1)),
    )
    inner = torch.nn.functional.silu(x.float() @ w1.float().T) * (x.float() @ w3.float().T)
    expected = inner @ w2.float().T
    found = layers.expert(x, w1, w2, w3).float()
    assert float((found - expected).abs().max() / expected.abs().max()) < 8e-3


@pytest.mark.parametrize(
    ("tokens", "rows", "values"), [(32, 40, 64), (32, 16, 64), (32, 64, 48), (1, 64, 64)]
)
def test_other_shapes_are_torchs(tokens, rows, values):
    x, weight = random(tokens, values), random(rows, values, seed=1)
    assert not tiles.fits(x, weight)
    assert not tiles.fits(x.float(), weight.float())
    torch.testing.assert_close(
        layers.linear(x, weight).float(), x.float() @ weight.float().T, rtol=2e-2, atol=2e-1
    )


@pytest.mark.parametrize("lacks", ["flags", "numba", "permission"])
def test_without_tiles_none_are_used(lacks, monkeypatch):
    if lacks == "flags":
        monkeypatch.setattr(tiles, "processor_flags", lambda: {"amx_tile"})
    elif lacks == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
        monkeypatch.setattr(tiles, "_kernel", tiles._kernel.__wrapped__)
    else:
        monkeypatch.setattr(tiles, "allowed", lambda: False)
    assert tiles.worth.__wrapped__() == range(0)


@needs_tiles
@pytest.mark.parametrize("works", [True, False])
def test_tiles_that_are_not_described_are_tried_once_apart(works, monkeypatch, tmp_path):
    """The real trial succeeds where tiles work; one that dies leaves torch, and is not repeated."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "amx_is_hollow", lambda: True)
    if not works:
        monkeypatch.setattr(tiles, "_TRIAL", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    assert bool(tiles.worth.__wrapped__()) is works
    monkeypatch.setattr(tiles, "_TRIAL", "raise SystemExit(1)")
    assert bool(tiles.worth.__wrapped__()) is works
