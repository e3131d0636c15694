"""How fast requests are simulated, on one core, and how near queueing theory and a plain simulator that is.

usage: python benchmarks/queueing.py [REQUESTS]

Requests of two sizes, Poisson arrivals, on engines that run by the law of qwen3-30b-a3b on two H100
(predicted, not measured). Seconds are of this process's own processor time, best of three. Theory: M/M/c and
M/D/1 with engines that take a millisecond a token, whatever else runs; mean waits simulated over exact.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from stepwise_serving import step_through

from moeplan.planner.catalog import load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.inputs import Inputs
from moeplan.planner.ir.attainment import ServingLaw
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.simulate.serving import Floats, Ints, serve
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.laws import serving_law

SPEC = """
name: benchmark
model: qwen3-30b-a3b
workload:
  online:
    rate: 8/s
    sizes: [{prompt: 512, output: 128, share: 70%}, {prompt: 2048, output: 256, share: 30%}]
    slo: {ttft: 2s, itl: 100ms}
"""
MACHINE = "a3-highgpu-2g"
STEP_S = 1e-3
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


def engine() -> tuple[ServingLaw, float]:
    """A law, and the requests/s of the mix that one engine serves when full."""
    catalog = load_catalog(None, Span("benchmark"))
    spec = parse_spec(SPEC, "benchmark")
    model = catalog.models["qwen3-30b-a3b"]
    inputs = Inputs(catalog=catalog, model=model, machine=None, prompts=None, trace=None)
    workload = build_workload(spec, inputs)
    roofline = find_roofline(workload, catalog.machines[MACHINE])
    policy = find_policies(workload, roofline, None)[0][0]
    shares = zip(workload.classes[0].buckets, policy.rates, strict=True)
    rate = 1.0 / sum(bucket.share / found.requests_per_s.value for bucket, found in shares)
    return serving_law(workload, roofline, policy), rate / policy.data_parallel


def stream(count: int, rate_per_s: float) -> tuple[Floats, Ints, Ints]:
    draw = np.random.RandomState(0)
    arrival = np.cumsum(draw.exponential(1 / rate_per_s, count))
    long = draw.random_sample(count) < 0.3
    return arrival, np.where(long, 2048, 512), np.where(long, 256, 128)


def best(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(3):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def wait_ratio(places: int, utilisation: float, constant: bool, count: int) -> float:
    """Mean simulated wait over that of M/D/1 or M/M/c, for the rate and the mean that were drawn."""
    draw = np.random.RandomState(1)
    output = np.full(count, 200) if constant else np.ceil(draw.exponential(200, count)).astype(np.int64)
    service_s = float(output.mean()) * STEP_S
    rate, load = utilisation * places / service_s, utilisation * places
    arrival = np.cumsum(draw.exponential(1.0, count))
    arrival *= count / rate / arrival[-1]
    served = serve(arrival, np.ones_like(output), output, replace(PURE, sequences=places), 1)
    if constant:
        return float((served.ttft_s - STEP_S).mean()) / (utilisation * service_s / 2 / (1 - utilisation))
    below = sum(load**n / math.factorial(n) for n in range(places))
    full = load**places / math.factorial(places) * places / (places - load)
    exact = full / (below + full) * service_s / (places - load)
    half_a_step = STEP_S / 2 if places > 1 else 0.0  # to the end of the step that others are in
    return float((served.ttft_s - STEP_S).mean() - half_a_step) / exact


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    law, rate = engine()
    started = time.perf_counter()
    serve(*stream(10, rate), law, 1)
    print(f"first call {time.perf_counter() - started:.1f} s, compiling or loading")
    print("| engines | load | requests/s | P99 TTFT | P99 ITL |")
    print("| --- | --- | --- | --- | --- |")
    for engines, load in ((1, 0.7), (4, 0.7), (4, 0.95), (16, 0.7)):
        requests = stream(count, load * rate * engines)
        seconds = best(lambda e=engines, r=requests: serve(*r, law, e))
        served = serve(*requests, law, engines)
        ttft, itl = np.percentile(served.ttft_s, 99), np.percentile(served.itl_s, 99)
        print(
            f"| {engines} | {load:.0%} | {count / seconds / 1e6:.2f} M | {ttft:.3f} s | {itl * 1e3:.1f} ms |"
        )
    few = stream(2000, 4 * 0.7 * rate)
    plain = best(lambda: step_through(*(column.tolist() for column in few), law, 4))
    print(f"plain Python, 4 engines at 70 %: {2000 / plain:,.0f} requests/s")
    print("| queue | places | load | simulated over exact wait |")
    print("| --- | --- | --- | --- |")
    for constant, places, load in (
        (True, 1, 0.6),
        (True, 1, 0.85),
        (False, 1, 0.8),
        (False, 4, 0.7),
        (False, 16, 0.8),
    ):
        ratio = wait_ratio(places, load, constant, 4 * count)
        print(f"| M/{'D' if constant else 'M'}/{places} | {places} | {load:.0%} | {ratio:.4f} |")


if __name__ == "__main__":
    main()
