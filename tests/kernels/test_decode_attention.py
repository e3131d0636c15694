"""Decode attention, compiled and plain, against softmax written out in float64."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from moeplan.runtime_min import decode_attention as attention
from moeplan.runtime_min import team
from moeplan.runtime_min.paged import whole_numbers

# sequences, key heads, query heads to each, head dimension, longest, tokens of a block
SHAPES = [
    (1, 1, 1, 64, 5, 32),
    (1, 1, 1, 64, 700, 32),  # one head, shared out to all threads and joined
    (3, 2, 4, 128, 100, 64),
    (5, 8, 8, 128, 333, 32),
    (2, 3, 5, 96, 77, 16),
    (7, 2, 2, 64, 512, 32),
    (3, 2, 2, 40, 60, 32),  # rows of no whole lines: the plain form
]


def case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random queries, keys, values, scattered blocks and lengths; what no sequence may look at is NaN."""
    count, heads, group, size, longest, tokens = shape
    torch.manual_seed(0)
    lengths = torch.randint(1, longest + 1, (count,))
    lengths[-1] = longest
    blocks = -(-longest // tokens)
    tables = torch.randperm(count * blocks).reshape(count, blocks).int()
    caches = [torch.full((count * blocks, heads, tokens, size), torch.nan).to(dtype) for _ in range(2)]
    for cache in caches:
        sequences = torch.arange(count).repeat_interleave(lengths)
        positions = torch.cat([torch.arange(int(length)) for length in lengths])
        places = tables[sequences, positions // tokens].long(), positions % tokens
        cache[places[0], :, places[1]] = torch.randn(len(positions), heads, size).to(dtype)
    q = torch.randn(count, heads * group, size).to(dtype)
    return q, *caches, tables, lengths


def written_out(q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """One query head at a time, one key at a time."""
    tokens, group = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for i in range(len(q)):
        places = [(tables[i, t // tokens], t % tokens) for t in range(int(lengths[i]))]
        for head in range(q.shape[1]):
            keys = torch.stack([k_cache[block, head // group, t] for block, t in places]).double()
            values = torch.stack([v_cache[block, head // group, t] for block, t in places]).double()
            weights = torch.softmax(keys @ q[i, head].double() / q.shape[2] ** 0.5, dim=0)
            out[i, head] = weights @ values
    return out.flatten(1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_form_computes_softmax(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """bf16 results are within a rounding of bf16, 2^-8, of the exact ones; float32 within 1e-5."""
    arguments = case(shape, dtype)
    exact = written_out(*arguments)
    tolerance = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(attention.decode_attention(*arguments).double(), exact, **tolerance)
    torch.testing.assert_close(attention.plain(*arguments).double(), exact, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sinking", [False, True])
def test_keys_before_a_start_and_sinks(shape: tuple[int, ...], dtype: torch.dtype, sinking: bool) -> None:
    """What lies before the start may be anything; a sink is one more key, of value 0."""
    q, k_cache, v_cache, tables, lengths = case(shape, dtype)
    starts = torch.randint(0, shape[5], (shape[0],)).minimum(lengths - 1)
    for cache in (k_cache, v_cache):
        for i, start in enumerate(starts.tolist()):
            cache[tables[i, 0].long(), :, :start] = 1e4
    sinks = 3 * torch.randn(q.shape[1]) if sinking else None
    exact = torch.zeros(q.shape, dtype=torch.float64)
    for i in range(len(q)):
        k, v = (c[tables[i].long()].transpose(0, 1).flatten(1, 2).double() for c in (k_cache, v_cache))
        for head in range(q.shape[1]):
            seen = slice(int(starts[i]), int(lengths[i]))
            scores = k[head // shape[2], seen] @ q[i, head].double() / shape[3] ** 0.5
            extra = sinks[head : head + 1].double() if sinks is not None else scores[:0]
            weights = torch.softmax(torch.cat((scores, extra)), dim=0)[: len(scores)]
            exact[i, head] = weights @ v[head // shape[2], seen]
    tolerance = {"rtol": 2**-8, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    for form in (attention.decode_attention, attention.plain):
        found = form(q, k_cache, v_cache, tables, lengths, starts, sinks).double()
        torch.testing.assert_close(found, exact.flatten(1), **tolerance)


def test_scores_far_apart() -> None:
    """Scores of thousands, ascending and descending, neither overflow nor lose the greatest."""
    q, k_cache, v_cache, tables, lengths = case((1, 1, 1, 64, 200, 32), torch.float32)
    arguments = (q * 1000, k_cache * 10, v_cache, tables, lengths)
    torch.testing.assert_close(
        attention.decode_attention(*arguments).double(), written_out(*arguments), rtol=1e-4, atol=1e-4
    )


def test_compiled_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes above are not all computed by the plain form."""
    monkeypatch.setattr(attention, "plain", None)
    assert attention.decode_attention(*case(SHAPES[2], torch.bfloat16)).isfinite().all()


def test_plain_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch brings no libgomp the kernel runs on threads of our own."""
    arguments = case(SHAPES[3], torch.bfloat16)
    expected = attention.decode_attention(*arguments)
    monkeypatch.setattr(team, "_parallel", lambda: team._plain_threads)
    assert torch.equal(attention.decode_attention(*arguments), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_int8_cache_is_multiples_of_its_scales(shape: tuple[int, ...]) -> None:
    """Both forms attend to whole numbers times scales; what no sequence may look at has scale NaN."""
    q, k_cache, v_cache, tables, lengths = case(shape, torch.float32)
    held = [whole_numbers(cache.nan_to_num()) for cache in (k_cache, v_cache)]
    for (_, scales), cache in zip(held, (k_cache, v_cache), strict=True):
        scales[cache[..., 0].isnan()] = torch.nan
    stood_for = [whole * scales[..., None] for whole, scales in held]
    exact = written_out(q, *stood_for, tables, lengths)
    whole, scales = (part[0] for part in held), tuple(part[1] for part in held)
    caches = tuple(whole)
    for form in (attention.decode_attention, attention.plain):
        found = form(q, *caches, tables, lengths, scales=scales).double()
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=2e-6)
    for given, stands in zip((k_cache, v_cache), stood_for, strict=True):
        error = (given - stands).nan_to_num().abs()
        assert (error <= 0.51 / 127 * given.nan_to_num().abs().amax(-1, keepdim=True)).all()


@pytest.fixture(scope="module")
def other_width(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The kernel with the vectors of CPUs that this one is not: LLVM splits those that are too long."""
    host = attention._kernel()
    if host is None:
        pytest.skip("no Numba")
    features = {"avx512f": host.LANES == 8}
    spec = importlib.util.spec_from_file_location("other_attention_kernel", host.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llvmlite.binding.get_host_cpu_features", lambda: features)
        patch.setattr("numba.config.CACHE_DIR", str(tmp_path_factory.mktemp("numba")))
        patch.setitem(sys.modules, spec.name, module)  # Numba looks the functions' module up by name
        spec.loader.exec_module(module)
    assert {module.LANES, host.LANES} == {8, 16}
    return module


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_vectors_of_other_cpus(
    shape: tuple[int, ...], dtype: torch.dtype, other_width: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same sums in another order, to float32's rounding."""
    arguments = case(shape, dtype)
    expected = attention.decode_attention(*arguments)
    monkeypatch.setattr(attention, "_kernel", lambda: other_width)
    tolerance = {"rtol": 2**-7, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(attention.decode_attention(*arguments), expected, **tolerance)
