"""The stream on which a fleet is tried: a trace at the class's rate, or bursts of its burstiness."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import ONLINE

from moeplan.planner.arrivals import request_stream
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.workload import RequestClass
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec
from moeplan.planner.traces import RequestTrace


@pytest.fixture(scope="module")
def requests() -> RequestClass:
    spec = parse_spec(ONLINE, "spec.yaml")
    return build_workload(spec, load_inputs(spec)).classes[0]


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_generated_arrivals_have_the_rate_and_the_burstiness(requests: RequestClass, cv: float) -> None:
    stream = request_stream(replace(requests, arrival_cv=cv), None)
    assert stream.rate_per_s == pytest.approx(8.0, rel=0.05)
    assert stream.arrival_cv == pytest.approx(cv, rel=0.06)


def test_generated_sizes_have_their_shares(requests: RequestClass) -> None:
    stream = request_stream(requests, None)
    assert set(zip(stream.prompt_tokens.tolist(), stream.output_tokens.tolist(), strict=True)) == {
        (512, 128),
        (2048, 256),
    }
    assert (stream.prompt_tokens == 512).mean() == pytest.approx(0.7, abs=0.01)


def test_the_same_stream_every_time(requests: RequestClass) -> None:
    first, second = request_stream(requests, None), request_stream(requests, None)
    assert (first.arrival_s == second.arrival_s).all()
    assert (first.prompt_tokens == second.prompt_tokens).all()


def test_a_trace_at_the_class_s_rate(requests: RequestClass) -> None:
    ones = np.ones(3, np.int64)
    trace = RequestTrace(arrival_s=np.array([0.0, 1.0, 4.0]), prompt_tokens=ones, output_tokens=ones)
    assert request_stream(requests, trace).arrival_s.tolist() == pytest.approx([0.0, 1 / 16, 4 / 16])


def test_of_a_long_trace_the_busiest_stretch(requests: RequestClass) -> None:
    """Of 150,000 requests whose gaps halve in the middle third: 100,000, all of that third among them."""
    gaps = np.where(np.abs(np.arange(150_000) - 75_000) < 25_000, 0.5, 1.0)
    times = np.cumsum(gaps)
    ones = np.ones(len(times), np.int64)
    trace = RequestTrace(arrival_s=times - times[0], prompt_tokens=ones, output_tokens=ones)
    stream = request_stream(requests, trace)
    assert stream.requests == 100_000
    assert stream.arrival_s[0] == 0.0
    assert (np.diff(stream.arrival_s) < np.diff(stream.arrival_s).max() * 0.75).sum() >= 49_000
