"""Weights in fewer bits: what comes back, and that the compiled kernels agree with torch to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeplan.runtime_min.formats import PACKINGS, Packing, fits
from moeplan.runtime_min.packing import Packed, pack, packed, plain, unpack

ALL = list(PACKINGS.values())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=128, max_size=128))
@settings(max_examples=50, deadline=None)
def test_bf12_keeps_every_bit_of_anything(bits: list[int]) -> None:
    """NaN, infinities, zeros of both signs, denormals: all of it."""
    signed = [b - (1 << 16) if b >= 1 << 15 else b for b in bits]
    weight = torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).view(2, 64)
    for way in (plain, unpack):
        assert same_bits(way(packed(weight, PACKINGS["bf12"])), weight)


def test_bf12_of_weights_as_they_are_has_few_exceptions() -> None:
    torch.manual_seed(0)
    weight = (torch.randn(512, 512) * 0.02).bfloat16()
    small = packed(weight, PACKINGS["bf12"])
    assert same_bits(unpack(small), weight)
    assert 0 < small.exceptions() < 1e-3 * weight.numel()
    assert len(small.data) <= PACKINGS["bf12"].most_bytes(tuple(weight.shape))


@pytest.mark.parametrize("packing", ALL, ids=lambda packing: packing.name)
@pytest.mark.parametrize("shape", [(1, 64), (33, 64), (70, 320)])
def test_the_kernel_unpacks_as_torch_does(packing: Packing, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    weight[0, :32], weight[-1, 5] = 0.0, 1e-30
    small = packed(weight, packing)
    assert len(small.data) - 8 * small.exceptions() == packing.least_bytes(shape)
    assert same_bits(unpack(small), plain(small))


@pytest.mark.parametrize(("name", "most"), [("int8", 0.5 / 127), ("int4", 1.0 / 15)])
def test_rounding_errors_are_within_a_step_of_the_block(name: str, most: float) -> None:
    """int8 rounds to the nearest of 255 steps; int4 may cut its largest value for the sake of the others."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256).bfloat16()
    width = 64 if name == "int8" else 32
    error = (unpack(packed(weight, PACKINGS[name])).double() - weight.double()).view(64, -1, width)
    largest = weight.double().view(64, -1, width).abs().amax(-1)
    assert (error.abs().amax(-1) <= (most * 1.02 + 2**-8) * largest * (5 if name == "int4" else 1)).all()
    assert (error.square().mean().sqrt() <= 0.6 * most * largest.mean()).all()


@pytest.mark.parametrize("packing", ALL, ids=lambda packing: packing.name)
def test_rows_packed_in_parts_are_rows_packed_at_once(packing: Packing) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 128).bfloat16()
    weight[33, 7] = weight[2, 100] = 1e-30
    rows, exceptions = pack(weight, packing)
    parts = [pack(weight[i : i + 15], packing, i) for i in range(0, 40, 15)]
    assert torch.equal(rows, torch.cat([part for part, _ in parts]))
    assert torch.equal(exceptions, torch.cat([part for _, part in parts]))


def test_what_fits() -> None:
    assert fits((3, 128))
    assert not fits((3, 100))
    assert not fits((128,))
    assert not fits((2, 3, 64))


def test_a_matrix_may_lie_anywhere() -> None:
    """Bytes that start off alignment, as in a page read from a file."""
    torch.manual_seed(0)
    small = packed(torch.randn(40, 64).bfloat16(), PACKINGS["bf12"])
    room = torch.empty(len(small.data) + 3, dtype=torch.uint8)
    room[3:] = small.data
    assert same_bits(unpack(Packed(room[3:], small.shape, small.packing)), unpack(small))
