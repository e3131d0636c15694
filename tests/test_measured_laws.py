"""Laws from measured rows: which rows they rest on, that they recover a known truth, and stay sane."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner.ir.profile import Figures
from moeplan.planner.ir.workload import Bucket
from moeplan.planner.measured_laws import CALIBRATED_SIGMA, MEASURED_SIGMA, Known, Law, find_laws
from moeplan.planner.profile_file import ProfileRow

HERE = Bucket(prompt_tokens=512.0, output_tokens=128.0, share=1.0)


def known(line: int, batch: int, predicted: float, measured: float, prompt: float = 512.0) -> Known:
    row = ProfileRow(
        line=line,
        machine="m",
        model="x",
        engine="vllm",
        gpus=1,
        prompt_tokens=prompt,
        output_tokens=128.0,
        batch=batch,
        figures={"decode_tokens_per_s": measured},
    )
    return Known(row, figures(predicted))


def figures(rate: float) -> Figures:
    return Figures(
        prefill_tokens_per_s=1.0, decode_tokens_per_s=rate, requests_per_s=1.0, ttft_s=1.0, itl_s=1.0
    )


def law(rows: list[Known], batch: int = 64, predicted: float = 1000.0) -> Law | None:
    return find_laws(rows, HERE, batch, figures(predicted)).get("decode_tokens_per_s")


def test_the_same_point_is_measured() -> None:
    found = law([known(2, 64, 1000.0, 700.0), known(3, 60, 990.0, 900.0), known(4, 32, 500.0, 490.0)])
    assert found is not None
    assert (found.method, found.lines, found.provenance) == ("exact", (2,), "measured")
    assert found.at(1000.0) == pytest.approx(700.0)
    assert found.sigma == MEASURED_SIGMA


@pytest.mark.parametrize("batch", [32, 128])
def test_a_nearby_row_scales(batch: int) -> None:
    found = law([known(2, batch, 500.0, 400.0), known(3, 1, 20.0, 1.0)])
    assert found is not None
    assert (found.method, found.lines, found.provenance) == ("nearby", (2,), "calibrated")
    assert found.at(1000.0) == pytest.approx(800.0)
    assert found.sigma == CALIBRATED_SIGMA


@pytest.mark.parametrize(
    "far", [known(2, 31, 500.0, 400.0), known(2, 129, 500.0, 400.0), known(2, 64, 1e3, 4e2, prompt=1025.0)]
)
def test_one_or_two_rows_far_away_say_nothing(far: Known) -> None:
    assert law([far]) is None
    assert law([far, far]) is None


def test_the_nearest_of_two_scales() -> None:
    found = law([known(2, 40, 600.0, 300.0), known(3, 70, 1100.0, 990.0)])
    assert found is not None
    assert found.lines == (3,)


@given(st.floats(0.1, 10.0), st.floats(0.8, 1.2), st.integers(0, 10**6))
def test_a_fit_recovers_a_power_law(factor: float, slope: float, seed: int) -> None:
    """Thirty rows over two decades, 5 % noise: a new point within 10 %, the residual near the noise."""
    numbers = random.Random(seed)
    rows = []
    for n in range(30):
        predicted = 10 ** (1 + 2 * n / 29)
        noise = math.exp(numbers.gauss(0.0, 0.05))
        rows.append(known(n + 2, 1000 + n, predicted, factor * predicted**slope * noise))
    found = law(rows, predicted=2000.0)
    assert found is not None
    assert found.method == "fit"
    assert found.at(2000.0) == pytest.approx(factor * 2000.0**slope, rel=0.1)
    assert 0.02 < found.residual < 0.09
    assert MEASURED_SIGMA <= found.sigma < 0.12


RATES = st.lists(
    st.tuples(st.floats(1.0, 1e5), st.floats(0.01, 1e7), st.integers(1, 10**5)), min_size=3, max_size=9
)


@given(RATES, st.floats(0.1, 1e6))
def test_a_fit_of_anything_is_sane(rows: list[tuple[float, float, int]], predicted: float) -> None:
    """Positive and rising, never steeper than 1.5 nor flatter than 0.5, never surer than a measurement."""
    found = law([known(n, *(batch, p, m)) for n, (p, m, batch) in enumerate(rows)], batch=10**6)
    assert found is not None
    if found.method == "fit":
        assert 0 < found.at(predicted) < math.inf
        assert 0.5 <= found.slope <= 1.5
        assert found.at(2 * predicted) > found.at(predicted)
    assert found.sigma >= MEASURED_SIGMA


def test_rows_of_one_rate_do_not_set_a_slope() -> None:
    rows = [known(n, 200 + n, 1000.0 + n, 800.0 * (1.0 + 0.02 * n)) for n in range(4)]
    found = law(rows)
    assert found is not None
    assert found.slope == pytest.approx(1.0, abs=0.01)


def test_the_interval_widens_with_residuals_and_with_distance() -> None:
    def fit(scatter: float, predicted: float) -> float:
        rows = [known(n, 200, 100.0 * 2**n, 80.0 * 2**n * math.exp(scatter * (-1) ** n)) for n in range(6)]
        found = law(rows, predicted=predicted)
        assert found is not None
        return found.sigma

    assert fit(0.02, 1000.0) < fit(0.2, 1000.0)
    assert fit(0.02, 1000.0) < fit(0.02, 1e6)
