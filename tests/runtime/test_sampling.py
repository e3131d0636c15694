"""Draws follow the scores, the seed and nothing else."""

import math

import pytest
import torch

from moeplan.runtime_min.sampling import Sampling, default_seed, draw, greedy

SCORES = torch.tensor([0.5, 2.0, -1.0, 1.0, -math.inf])


def draws(sampling: Sampling, count: int) -> list[int]:
    source = torch.Generator().manual_seed(sampling.seed)
    return [draw(SCORES, sampling, source) for _ in range(count)]


def test_frequencies_follow_the_softmax():
    drawn = torch.bincount(torch.tensor(draws(Sampling(1.0, 1.0, 1), 4000)), minlength=5) / 4000
    torch.testing.assert_close(drawn, SCORES.softmax(0), atol=0.03, rtol=0)
    assert drawn[4] == 0


def test_temperature_sharpens():
    cold, warm = (draws(Sampling(t, 1.0, 1), 500).count(1) for t in (0.3, 2.0))
    assert cold > warm


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, {1}), (0.6, {1}), (0.7, {1, 3}), (0.9, {0, 1, 3})])
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p, kept):
    """The masses in order are 0.61, 0.22, 0.14 and 0.03; the token that crosses `top_p` stays."""
    assert set(draws(Sampling(1.0, top_p, 3), 1000)) == kept


def test_seeds():
    assert draws(Sampling(1.0, 1.0, 7), 20) == draws(Sampling(1.0, 1.0, 7), 20)
    assert draws(Sampling(1.0, 1.0, 7), 20) != draws(Sampling(1.0, 1.0, 8), 20)
    assert default_seed("a") == default_seed("a") != default_seed("b")
    assert 0 <= default_seed("\ud800") < 2**63


@pytest.mark.parametrize("temperature", [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
    assert set(draws(Sampling(temperature, 1.0, 0), 50)) == {1}


def test_greedy_takes_the_first_of_equals():
    assert greedy(torch.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]])) == ([1, 0], [3.0, 2.0])


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_any_64_bit_seed(seed):
    assert len(draws(Sampling(1.0, 1.0, seed), 1)) == 1
