"""The queueing simulator: closed forms of queueing theory, a plain simulator, conservation and order."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepwise_serving import step_through

from moeplan.planner.ir.attainment import ServingLaw
from moeplan.planner.simulate.serving import Floats, Ints, keeps_slo, serve

STEP_S = 1e-3
# One token a step, whatever runs: a request of n tokens is served n milliseconds from when it is admitted.
PURE = ServingLaw(
    sequences=1,
    step_tokens=10**6,
    memory_bytes=math.inf,
    batch=(1, 2),
    context_tokens=(0.0, 1e9),
    step_s=((STEP_S, STEP_S), (STEP_S, STEP_S)),
    cache_bytes=(0.0, 0.0),
    prompt_tokens=(0.0, 1e9),
    prefill_s=(0.0, 0.0),
    first_token_s=(0.0, 0.0),
    first_token_steps=0.0,
)
# Steps that lengthen with batch and context, prompts in pieces, few places and little memory.
BUSY = ServingLaw(
    sequences=6,
    step_tokens=300,
    memory_bytes=3000.0,
    batch=(1, 4, 6),
    context_tokens=(0.0, 500.0, 2000.0),
    step_s=((0.010, 0.011, 0.014), (0.012, 0.016, 0.026), (0.013, 0.019, 0.032)),
    cache_bytes=(0.0, 500.0, 2000.0),
    prompt_tokens=(0.0, 100.0, 1000.0),
    prefill_s=(0.0, 0.004, 0.06),
    first_token_s=(0.002, 0.003, 0.012),
    first_token_steps=0.5,
)
Sizes = tuple[Floats, Ints, Ints]


def requests(seed: int, count: int, rate_per_s: float) -> Sizes:
    draw = np.random.RandomState(seed)
    arrival = np.cumsum(draw.exponential(1 / rate_per_s, count))
    return arrival, draw.randint(1, 900, count), draw.randint(1, 80, count)


def mean_wait_s(sequences: int, rate_per_s: float, outputs: list[Ints]) -> float:
    """Mean seconds before service of Poisson streams, where a request holds one of `sequences` places."""
    means = []
    for seed, output in enumerate(outputs):
        arrival = np.cumsum(np.random.RandomState(seed).exponential(1.0, len(output)))
        arrival *= len(output) / rate_per_s / arrival[-1]  # at just this rate
        served = serve(arrival, np.ones_like(output), output, replace(PURE, sequences=sequences), 1)
        means.append(served.ttft_s.mean() - STEP_S)
    return float(np.mean(means))


def erlang_c_wait_s(places: int, rate_per_s: float, service_s: float) -> float:
    """Mean wait of M/M/c (Erlang 1917; e.g. Kleinrock, Queueing Systems I, eq. 3.40)."""
    load = rate_per_s * service_s
    below = sum(load**n / math.factorial(n) for n in range(places))
    full = load**places / math.factorial(places) * places / (places - load)
    return full / (below + full) * service_s / (places - load)


@pytest.mark.parametrize(("places", "utilisation"), [(1, 0.8), (4, 0.7), (16, 0.8)])
def test_m_m_c(places: int, utilisation: float) -> None:
    """Within 2 % of Erlang's formula, over four streams of a million requests each."""
    draws = [np.random.RandomState(seed).exponential(200, 1_000_000) for seed in range(100, 104)]
    outputs = [np.ceil(draw).astype(np.int64) for draw in draws]
    mean_s = float(np.mean(outputs)) * STEP_S
    rate = utilisation * places / mean_s
    expected = erlang_c_wait_s(places, rate, mean_s)
    if places > 1:
        expected += STEP_S / 2  # to the end of the step that others are in
    assert mean_wait_s(places, rate, outputs) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.85])
def test_m_d_1(utilisation: float) -> None:
    """Within 2 % of Pollaczek and Khinchine: ρ·D / (2·(1 - ρ))."""
    service_s = 0.1
    output = np.full(500_000, round(service_s / STEP_S))
    expected = utilisation * service_s / (2 * (1 - utilisation))
    assert mean_wait_s(1, utilisation / service_s, [output] * 2) == pytest.approx(expected, rel=0.02)


def test_waits_are_those_of_the_queue_with_many_servers() -> None:
    """Request by request: each takes the place that is free first (Kiefer and Wolfowitz), up to a step."""
    output = np.ceil(np.random.RandomState(7).exponential(300, 20_000)).astype(np.int64)
    arrival = np.cumsum(np.random.RandomState(8).exponential(0.3 / 5 / 0.9, len(output)))
    served = serve(arrival, np.ones_like(output), output, replace(PURE, sequences=5), 1)
    free, waits = [0.0] * 5, []
    for at, tokens in zip(arrival.tolist(), output.tolist(), strict=True):
        begin = max(at, heapq.heappop(free))
        heapq.heappush(free, begin + tokens * STEP_S)
        waits.append(begin - at)
    late = served.ttft_s - STEP_S - np.array(waits)
    assert np.quantile(late, 0.001) >= -STEP_S
    assert np.quantile(late, 0.999) <= 2 * STEP_S


@pytest.mark.parametrize("engines", [1, 3])
@pytest.mark.parametrize("rate_per_s", [4.0, 15.0, 60.0])
def test_equals_the_plain_simulator(engines: int, rate_per_s: float) -> None:
    """Steps that do not lengthen with the context: every request as in plain Python, the longest gap too."""
    law = replace(BUSY, step_s=tuple((row[0],) * 3 for row in BUSY.step_s))
    arrival, prompt, output = requests(3, 400, rate_per_s)
    served = serve(arrival, prompt, output, law, engines)
    plain = step_through(arrival.tolist(), prompt.tolist(), output.tolist(), law, engines)
    assert served.ttft_s == pytest.approx([r.ttft_s for r in plain], abs=1e-9)
    assert served.finish_s == pytest.approx([r.times[-1] for r in plain], abs=1e-9)
    gaps = [max(np.diff(r.times), default=0.0) for r in plain]
    assert served.gap_s == pytest.approx(gaps, abs=1e-9)
    means = [float(np.diff(r.times).mean()) if len(r.times) > 1 else 0.0 for r in plain]
    assert served.itl_s == pytest.approx(means, abs=1e-9)


def test_growing_contexts_are_near_the_plain_simulator() -> None:
    """Many steps at once take as long as the middle one: means within half a percent."""
    arrival, prompt, output = requests(4, 600, 12.0)
    served = serve(arrival, prompt, output, BUSY, 2)
    plain = step_through(arrival.tolist(), prompt.tolist(), output.tolist(), BUSY, 2)
    assert served.ttft_s.mean() == pytest.approx(np.mean([r.ttft_s for r in plain]), rel=5e-3)
    assert served.finish_s.mean() == pytest.approx(np.mean([r.times[-1] for r in plain]), rel=5e-3)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    engines=st.integers(1, 5),
    rate_per_s=st.floats(0.5, 200.0),
    count=st.integers(1, 120),
)
def test_every_request_ends_once_and_none_before_its_work(
    seed: int, engines: int, rate_per_s: float, count: int
) -> None:
    arrival, prompt, output = requests(seed, count, rate_per_s)
    served = serve(arrival, prompt, output, BUSY, engines)
    least = BUSY.step_s[0][0]
    assert (served.finish_s >= arrival + output * least - 1e-9).all()
    assert (served.ttft_s >= least).all()
    several = output > 1
    assert (served.itl_s[several] >= least - 1e-12).all()
    assert (served.gap_s >= served.itl_s - 1e-9).all()
    assert served.busy_s.sum() <= engines * served.finish_s.max() + 1e-9
    # Every token but the first of each request takes a place for one step.
    assert served.occupied_s.sum() == pytest.approx(((output - 1) * served.itl_s).sum())


def test_more_engines_or_fewer_requests_never_hurt_on_average() -> None:
    arrival, prompt, output = requests(5, 4000, 40.0)
    by_engines = [serve(arrival, prompt, output, BUSY, n).ttft_s.mean() for n in (1, 2, 3, 5, 8, 13)]
    assert by_engines == sorted(by_engines, reverse=True)
    by_rate = [serve(arrival * slower, prompt, output, BUSY, 3).ttft_s.mean() for slower in (0.5, 1, 2, 4)]
    assert by_rate == sorted(by_rate, reverse=True)


def test_no_request_overtakes_at_one_engine() -> None:
    """First come, first served: first tokens leave in the order of arrival."""
    arrival, prompt, output = requests(6, 500, 30.0)
    served = serve(arrival, prompt, output, replace(BUSY, first_token_s=(0.0,) * 3, first_token_steps=0.0), 1)
    assert (np.diff(arrival + served.ttft_s) >= -1e-9).all()


@pytest.mark.parametrize(
    ("arrival", "prompt", "output", "engines"),
    [([1.0, 0.0], [1, 1], [1, 1], 1), ([0.0], [0], [1], 1), ([0.0], [1], [0], 1), ([0.0], [1], [1], 0)],
)
def test_bad_input(arrival: list[float], prompt: list[int], output: list[int], engines: int) -> None:
    with pytest.raises(ValueError, match=r"engine|order"):
        serve(np.array(arrival), np.array(prompt), np.array(output), BUSY, engines)


def test_a_request_larger_than_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds the memory"):
        serve(np.zeros(1), np.array([2000]), np.array([2000]), replace(BUSY, memory_bytes=10.0), 1)


def test_no_requests() -> None:
    nothing = np.zeros(0, np.int64)
    assert len(serve(np.zeros(0), nothing, nothing, BUSY, 2).ttft_s) == 0


@settings(max_examples=60)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 60),
    rate_per_s=st.sampled_from([0.5, 4.0, 40.0]),
    engines=st.integers(1, 3),
    slo_s=st.tuples(st.floats(0.005, 3.0), st.floats(0.005, 0.06)),
)
def test_whether_an_slo_is_kept_is_known_early(
    seed: int, count: int, rate_per_s: float, engines: int, slo_s: tuple[float, float]
) -> None:
    """The simulation that ends with the first request too many says what the whole one counts."""
    sizes = requests(seed, count, rate_per_s)
    served = serve(*sizes, BUSY, engines)
    late = int(((served.ttft_s > slo_s[0]) | (served.itl_s > slo_s[1])).sum())
    for most_late in {0, late - 1, late, late + 1, count} - {-1}:
        assert keeps_slo(*sizes, BUSY, engines, slo_s, most_late) == (late <= most_late)
