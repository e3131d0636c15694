"""Size buckets: means that add up, and each request in the bucket nearest to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner.buckets import nearest_buckets, size_buckets
from moeplan.planner.ir.workload import Bucket

SIZES = st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**4)), min_size=1, max_size=300)


@given(SIZES)
def test_buckets_add_up(sizes: list[tuple[int, int]]) -> None:
    prompt, output = np.array(sizes).T
    buckets = size_buckets(prompt, output)
    assert len(buckets) <= 12
    assert sum(b.share for b in buckets) == pytest.approx(1.0)
    assert sum(b.share * b.prompt_tokens for b in buckets) == pytest.approx(prompt.mean())
    assert sum(b.share * b.output_tokens for b in buckets) == pytest.approx(output.mean())


@given(SIZES)
def test_order_of_requests_does_not_matter(sizes: list[tuple[int, int]]) -> None:
    forth, back = np.array(sizes).T, np.array(sizes[::-1]).T
    assert size_buckets(*forth) == size_buckets(*back)


def test_few_requests_have_few_buckets() -> None:
    assert len(size_buckets(np.array([5, 9]), np.array([1, 2]))) == 2


def test_nearest_in_ratio() -> None:
    """1,000 is nearer to 3,000 than to 200: a factor of 3 against 5. Of equals the first."""
    buckets = [Bucket(prompt_tokens=p, output_tokens=10.0, share=0.5) for p in (200.0, 3000.0)]
    prompts = np.array([1, 200, 700, 1000, 3000, 90_000])
    assert nearest_buckets(buckets, prompts, np.full(6, 10)).tolist() == [0, 0, 0, 1, 1, 1]
