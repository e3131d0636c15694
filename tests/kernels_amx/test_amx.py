"""Products on the tile units against float32."""

import builtins
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from moeplan.runtime_min import amx
from moeplan.runtime_min.formats import SCALED
from moeplan.runtime_min.packing import plain, scaled

needs_tiles = pytest.mark.skipif(not amx.usable(), reason="no usable AMX tiles")


def weight_of(outer: int, inner: int, offset: int = 0) -> Tensor:
    """A weight that starts `offset` values into its memory."""
    return torch.randn(offset + outer * inner).bfloat16()[offset:].view(outer, inner)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[pytest.MonkeyPatch]:
    """No answer of `usable` is remembered, in memory or in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    amx.usable.cache_clear()
    yield monkeypatch
    amx.usable.cache_clear()


@needs_tiles
@pytest.mark.parametrize(("outer", "inner"), [(32, 32), (96, 64), (512, 160), (1056, 2048)])
@pytest.mark.parametrize("offset", [0, 1])
def test_products_are_those_of_float32(outer: int, inner: int, offset: int) -> None:
    weight = weight_of(outer, inner, offset)
    for rows in (1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 70):
        x = torch.randn(rows, inner).bfloat16()
        wanted = x.float() @ weight.float().T
        scale = wanted.abs().max()
        assert (amx.product(x, weight, torch.float32) - wanted).abs().max() < 1e-5 * scale
        got = amx.product(x, weight)
        assert got.dtype == torch.bfloat16
        assert (got.float() - wanted).abs().max() < 2**-8 * scale


@needs_tiles
@pytest.mark.parametrize("name", SCALED)
def test_a_weight_with_scales_apart_gives_what_it_stands_for(name: str) -> None:
    shape, x = (96, 192), torch.randn(33, 192).bfloat16()
    data = torch.randint(0, 120, (SCALED[name].data_bytes(shape),), dtype=torch.uint8)
    if name == "mxfp4":
        exponents = torch.randint(115, 125, (96 * 6,), dtype=torch.uint8)
        small = scaled(data, exponents, shape, SCALED[name], (1, 32))
    else:
        small = scaled(data, torch.rand(6 * 3), shape, SCALED[name], (16, 64))
    assert torch.equal(amx.product(x, small), amx.product(x, plain(small)))


@needs_tiles
def test_every_number_of_tokens() -> None:
    weight, x = weight_of(64, 96), torch.randn(70, 96).bfloat16()
    every = amx.product(x, weight)
    for rows in range(1, 71):
        assert torch.equal(amx.product(x[:rows], weight), every[:rows])  # whatever else is in the batch


@needs_tiles
def test_rounds_as_torch() -> None:
    weight, x = weight_of(64, 64), torch.randn(40, 64).bfloat16()
    assert torch.equal(amx.product(x, weight), amx.product(x, weight, torch.float32).bfloat16())


@needs_tiles
def test_what_is_not_finite_stays_in_its_row() -> None:
    weight, x = weight_of(64, 64), torch.randn(20, 64).bfloat16()
    clean = amx.product(x, weight)
    x[3, 5] = torch.nan
    got = amx.product(x, weight)
    assert got[3].isnan().all()
    others = [i for i in range(20) if i != 3]
    assert torch.equal(got[others], clean[others])


@needs_tiles
def test_threads_do_not_change_a_bit() -> None:
    weight, x = weight_of(1056, 256), torch.randn(50, 256).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(amx.product(x, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_tiles
def test_tokens_need_not_be_contiguous() -> None:
    weight, x = weight_of(32, 32), torch.randn(64, 32).bfloat16()
    assert torch.equal(amx.product(x[::2], weight), amx.product(x[::2].clone(), weight))


@pytest.mark.parametrize(("isa", "limited"), [(None, True), ("AVX512_CORE_FP16", False)])
def test_many_rows_are_left_to_torch_that_has_tiles(
    monkeypatch: pytest.MonkeyPatch, isa: str | None, limited: bool
) -> None:
    monkeypatch.delenv(amx.cpu.ISA, raising=False)
    if isa:
        monkeypatch.setenv(amx.cpu.ISA, isa)
    monkeypatch.setattr(amx, "usable", lambda: True)
    monkeypatch.setattr(amx, "product", lambda x, weight: x)
    amx._most_rows.cache_clear()
    try:
        for rows in (1, amx.MOST_ROWS, amx.MOST_ROWS + 1):
            x = torch.zeros(rows, 32).bfloat16()
            left = amx.linear(x, weight_of(32, 32)) is None
            assert left == (limited and rows > amx.MOST_ROWS)
    finally:
        amx._most_rows.cache_clear()


@pytest.mark.parametrize(("outer", "inner"), [(8, 64), (64, 40), (40, 33)])
def test_other_shapes_are_left_to_torch(outer: int, inner: int) -> None:
    weight, x = weight_of(outer, inner), torch.randn(9, inner).bfloat16()
    assert amx.linear(x, weight) is None
    assert torch.equal(amx.product(x, weight), torch.nn.functional.linear(x, weight))


def test_float32_is_left_to_torch() -> None:
    assert amx.linear(torch.randn(9, 64), torch.randn(64, 64)) is None


def test_not_usable_without_the_flags(untried: pytest.MonkeyPatch) -> None:
    untried.setattr(amx, "cpu_flags", lambda: frozenset({"avx512f"}))
    untried.setattr(amx, "_probe", lambda: pytest.fail("tried"))
    assert not amx.usable()


def test_not_usable_without_numba(untried: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "numba":
            raise ImportError(name)
        return plain(name, *rest)

    untried.setattr(builtins, "__import__", without)
    untried.setattr(amx, "cpu_flags", lambda: frozenset(amx.FLAGS))
    untried.setattr(amx, "_probe", lambda: pytest.fail("tried"))
    assert not amx.usable()


@pytest.mark.parametrize("works", [True, False])
def test_the_trial_is_remembered(untried: pytest.MonkeyPatch, tmp_path: Any, works: bool) -> None:
    tried = []

    def trial() -> bool:
        tried.append(works)
        return works

    untried.setattr(amx, "cpu_flags", lambda: frozenset(amx.FLAGS))
    untried.setattr(amx, "_permitted", lambda: True)
    untried.setattr(amx, "_probe", trial)
    assert amx.usable() is works
    amx.usable.cache_clear()
    assert amx.usable() is works
    assert tried == [works]
    [kept] = (tmp_path / "moeplan").glob("amx-*.json")
    assert json.loads(kept.read_text()) is works


def test_a_trial_that_dies_is_no(untried: pytest.MonkeyPatch) -> None:
    untried.setattr(amx, "_PROBE", "import os; os.abort()")
    assert not amx._probe()
