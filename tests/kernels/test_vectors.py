"""Products of bf16 in float32 vectors against float64."""

import pytest
import torch
import torch.nn.functional as F

from moeplan.runtime_min import layers, packing, vectors
from moeplan.runtime_min.formats import PACKINGS, SCALED

from .test_packing import some_scaled


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("outer", "inner"), [(6, 16), (7, 48), (101, 160), (600, 512)])
@pytest.mark.parametrize("offset", [0, 1])
def test_products_are_those_of_float64(outer: int, inner: int, offset: int) -> None:
    weight = torch.randn(offset + outer * inner).bfloat16()[offset:].view(outer, inner)
    for rows in (*range(1, 9), 15, 16, 17, 24, 25, 40):
        x = torch.randn(rows, inner).bfloat16()
        wanted = x.double() @ weight.double().T
        got = vectors._compiled(x, weight)
        assert got.dtype == torch.bfloat16
        assert (got.double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()


def test_a_token_does_not_depend_on_the_others_nor_on_the_threads() -> None:
    """Few tokens are summed in another order than many; each of either kind in one order."""
    weight, x = torch.randn(200, 96).bfloat16(), torch.randn(56, 96).bfloat16()
    few, many = vectors._compiled(x[:24], weight), vectors._compiled(x, weight)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (1, 2, 3, 5, 16, 23):
                assert torch.equal(vectors._compiled(x[:rows], weight), few[:rows])
            for rows in (25, 32, 43):
                assert torch.equal(vectors._compiled(x[:rows], weight), many[:rows])
    finally:
        torch.set_num_threads(before)


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight = torch.randn(64, 64).bfloat16()
    for rows in (20, 40):
        x = torch.randn(rows, 64).bfloat16()
        clean = vectors._compiled(x, weight)
        x[3, 5] = torch.nan
        got = vectors._compiled(x, weight)
        others = [i for i in range(rows) if i != 3]
        assert got[3].isnan().all()
        assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("name", PACKINGS)
def test_a_packed_weight_gives_what_it_stands_for(name: str) -> None:
    packed = packing.packed(torch.randn(70, 192).bfloat16(), PACKINGS[name])
    for rows in (5, 33):
        x = torch.randn(rows, 192).bfloat16()
        assert torch.equal(vectors._compiled(x, packed), vectors._compiled(x, packing.plain(packed)))


@pytest.mark.parametrize("name", SCALED)
def test_a_weight_with_scales_apart_gives_what_it_stands_for(name: str) -> None:
    small = some_scaled(name, 70, 192)
    for rows in (5, 33):
        x = torch.randn(rows, 192).bfloat16()
        assert torch.equal(vectors._compiled(x, small), vectors._compiled(x, packing.plain(small)))


@pytest.mark.parametrize("flags", [{"avx2", "fma"}, {"avx2", "fma", "avx512f"}, {"sse4_2"}])
def test_only_where_the_cpu_knows_no_bf16(flags: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(vectors.platform, "machine", lambda: "x86_64")
    vectors.usable.cache_clear()
    try:
        assert vectors.usable() == (flags == {"avx2", "fma"})
    finally:
        vectors.usable.cache_clear()


def test_every_way_gives_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `linear` chooses here, and torch, agree to the rounding of bf16; odd shapes fall to torch."""
    for outer, inner in ((64, 64), (5, 64), (64, 40)):
        x, weight = torch.randn(9, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
        wanted = F.linear(x.double(), weight.double())
        for way in (lambda *_: None, vectors.linear):
            monkeypatch.setattr(vectors, "linear", way)
            assert (layers.linear(x, weight).double() - wanted).abs().max() <= 2**-8 * wanted.abs().max()
