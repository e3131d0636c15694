"""An online class -> the stream of requests on which a fleet is tried: its trace, or bursts of its CV."""

from __future__ import annotations

import numpy as np

from moeplan.planner.ir.workload import RequestClass
from moeplan.planner.traces import RequestTrace

_GENERATED = 20_000
_MOST_OF_A_TRACE = 100_000
_SEED = 0


def request_stream(requests: RequestClass, trace: RequestTrace | None) -> RequestTrace:
    """Return the trace at the class's rate, or as many generated requests as tell a 99th percentile.

    Of a trace with more than 100,000 requests those of its busiest stretch are taken, still at the class's
    mean rate over the whole trace. Generated gaps are gamma-distributed with the class's CV (Poisson where it
    is 1), from a fixed seed; sizes are drawn by their shares.
    """
    if trace is None:
        return _generated(requests)
    return _busiest(trace.at_rate(requests.rate_per_s), _MOST_OF_A_TRACE)


def _busiest(trace: RequestTrace, most: int) -> RequestTrace:
    if trace.requests <= most:
        return trace
    spans = trace.arrival_s[most - 1 :] - trace.arrival_s[: -most + 1]
    first = int(spans.argmin())
    part = slice(first, first + most)
    return RequestTrace(
        arrival_s=trace.arrival_s[part] - trace.arrival_s[first],
        prompt_tokens=trace.prompt_tokens[part],
        output_tokens=trace.output_tokens[part],
    )


def _generated(requests: RequestClass) -> RequestTrace:
    # The legacy generator: its stream is the same in every version of numpy.
    draw = np.random.RandomState(_SEED)
    shape = 1.0 / max(requests.arrival_cv, 1e-3) ** 2
    gaps = draw.gamma(shape, 1.0 / (shape * requests.rate_per_s), _GENERATED)
    edges = np.cumsum([bucket.share for bucket in requests.buckets])
    bucket = np.searchsorted(edges[:-1], draw.random_sample(_GENERATED), side="right")
    sizes = np.array([(round(b.prompt_tokens), round(b.output_tokens)) for b in requests.buckets])
    arrival = np.cumsum(gaps)
    return RequestTrace(
        arrival_s=arrival - arrival[0],
        prompt_tokens=sizes[bucket, 0],
        output_tokens=np.maximum(1, sizes[bucket, 1]),
    )
