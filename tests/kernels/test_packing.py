"""Weights in fewer bits: what comes back, and that the compiled kernels agree with torch to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.formats import PACKINGS, SCALED, Packing, fits
from moeplan.runtime_min.packing import Packed, pack, packed, plain, scaled, unpack

from .plain_packing import plain_pack

ALL = list(PACKINGS.values())


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@given(bits=st.lists(st.integers(0, 2**16 - 1), min_size=128, max_size=128))
@settings(max_examples=50)
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
    assert 0 < small.beside() < 1e-3 * weight.numel()
    assert len(small.data) <= PACKINGS["bf12"].most_bytes(tuple(weight.shape))


@pytest.mark.parametrize("packing", ALL, ids=lambda packing: packing.name)
@pytest.mark.parametrize("shape", [(1, 64), (33, 64), (70, 320)])
def test_the_kernel_unpacks_as_torch_does(packing: Packing, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    weight[0, :32], weight[-1, 5] = 0.0, 1e-30
    small = packed(weight, packing)
    assert len(small.data) - 8 * small.beside() == packing.least_bytes(shape)
    assert same_bits(unpack(small), plain(small))


@pytest.mark.parametrize("packing", ALL, ids=lambda packing: packing.name)
@pytest.mark.parametrize("shape", [(1, 64), (33, 64), (70, 320)])
def test_the_kernel_packs_as_torch_does(packing: Packing, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    weight[0, :32], weight[-1, 5], weight[:, 7] = 0.0, 1e-30, 3.0
    rows, exceptions = pack(weight, packing)
    expected, far = plain_pack(weight, packing)
    assert torch.equal(rows, expected)
    assert len(exceptions) == int(far.sum())


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


def test_packing_takes_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.runtime_min.packing._packer", lambda: None)
    with pytest.raises(RunError, match="numba is not installed"):
        packed(torch.zeros(1, 64).bfloat16(), PACKINGS["int8"])


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


def small_float(bits: int, exponent_bits: int, mantissa_bits: int) -> float:
    """A float of few bits by the definition of IEEE 754, without infinities and NaN."""
    sign = -1.0 if bits >> (exponent_bits + mantissa_bits) else 1.0
    exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa, bias = bits & ((1 << mantissa_bits) - 1), (1 << (exponent_bits - 1)) - 1
    least = max(exponent, 1) - bias
    return sign * float(mantissa / (1 << mantissa_bits) + (exponent > 0)) * 2.0**least


def some_scaled(name: str, outer: int, inner: int) -> Packed:
    """Random values in blocks of 16 x 64, or of 32."""
    data = torch.randint(0, 120, (SCALED[name].data_bytes((outer, inner)),), dtype=torch.uint8)
    if name == "mxfp4":
        exponents = torch.randint(115, 125, (outer * inner // 32,), dtype=torch.uint8)
        return scaled(data, exponents, (outer, inner), SCALED[name], (1, 32))
    scales = torch.rand(-(-outer // 16) * -(-inner // 64))
    return scaled(data, scales, (outer, inner), SCALED[name], (16, 64))


FP8 = [(128, 128), (16, 64), (1, 0), (0, 0), (5, 24), (3, 128)]  # rows and values of a block; 0: all


@pytest.mark.parametrize("block", FP8)
@pytest.mark.parametrize("shape", [(1, 64), (33, 64), (70, 320), (130, 40)])
def test_fp8_stands_for_values_times_the_scale_of_their_block(
    shape: tuple[int, int], block: tuple[int, int]
) -> None:
    (outer, inner), (height, width) = shape, (block[0] or shape[0], block[1] or shape[1])
    torch.manual_seed(0)
    data = torch.randint(0, 256, shape, dtype=torch.uint8)
    data[(data & 0x7F) == 0x7F] = 0  # NaN
    scales = torch.rand(-(-outer // height), -(-inner // width)) * 2 - 1
    small = scaled(data.flatten(), scales, shape, SCALED["fp8"], (height, width))
    table = torch.tensor([small_float(bits, 4, 3) for bits in range(256)])
    expected = torch.empty(shape)
    for row in range(outer):
        for column in range(inner):
            expected[row, column] = table[int(data[row, column])] * scales[row // height, column // width]
    assert torch.equal(plain(small, torch.float32), expected)
    assert torch.equal(unpack(small, torch.float32), expected)
    assert same_bits(unpack(small), expected.bfloat16())
    assert same_bits(plain(small), expected.bfloat16())


@pytest.mark.parametrize("shape", [(1, 64), (33, 64), (70, 320), (7, 96)])
def test_mxfp4_stands_for_values_times_powers_of_two(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    outer, inner = shape
    data = torch.randint(0, 256, (outer, inner // 2), dtype=torch.uint8)
    exponents = torch.randint(100, 140, (outer, inner // 32), dtype=torch.uint8)
    small = scaled(data.flatten(), exponents.flatten(), shape, SCALED["mxfp4"], (1, 32))
    table = [small_float(bits, 2, 1) for bits in range(16)]
    expected = torch.empty(shape)
    for row in range(outer):
        for column in range(inner):
            bits = int(data[row, column // 2]) >> 4 * (column % 2) & 15
            expected[row, column] = table[bits] * 2.0 ** (int(exponents[row, column // 32]) - 127)
    assert torch.equal(plain(small, torch.float32), expected)
    assert same_bits(unpack(small), expected.bfloat16())
    assert same_bits(plain(small), expected.bfloat16())
