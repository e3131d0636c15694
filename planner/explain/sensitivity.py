"""The smallest change of each input that flips the decision: probes, then bisection, a fleet solved at each.

What is found is checked, not derived: the fleet was solved on both sides of the flip. A flip between two
probes that is undone before the next one is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator

from moeplan.planner.diagnostics import CompileError
from moeplan.planner.explain.outcomes import decision, outcome_of
from moeplan.planner.explain.study import Study
from moeplan.planner.ir.explanation import Flip
from moeplan.planner.ir.fleet import Fleet

_UP, _DOWN = (10.0, 30.0, 100.0, 300.0), (-10.0, -25.0, -50.0, -75.0)  # per cent
_STEPS = 3  # of bisection: to an eighth of the probes' distance


def flips(study: Study) -> tuple[Flip, ...]:
    """For every input, upwards and downwards."""
    return tuple(_flip(study, what, key, probes) for what, key in _inputs(study) for probes in (_DOWN, _UP))


def _inputs(study: Study) -> Iterator[tuple[str, str]]:
    """What may be wrong or change, and the key of the setting that changes it."""
    spans = study.base.spec.spans
    for what, key in (
        ("request rate", "workload.online.rate"),
        ("requests", "workload.batch.requests"),
        ("deadline", "workload.batch.deadline"),
        ("TTFT promised", "workload.online.slo.ttft"),
        ("ITL promised", "workload.online.slo.itl"),
    ):
        if key in spans:
            yield what, key
    if study.base.inputs.machine is None:
        yield from _market_inputs(study.fleet)
    else:
        yield from _machine_inputs(study)


def _market_inputs(fleet: Fleet) -> Iterator[tuple[str, str]]:
    """Prices and bandwidths of the GPUs that were chosen, against all others as they are."""
    for gpu in sorted({choice.column.policy.machine.gpu for choice in fleet.choices}):
        yield f"price of {gpu}", f"price.{gpu}"
        yield f"memory bandwidth of {gpu}", f"gpu_bandwidth.{gpu}"
        yield f"memory of {gpu}", f"gpu_memory.{gpu}"
    if any(choice.column.market == "spot" for choice in fleet.choices):
        yield "all spot prices", "spot_price"


def _machine_inputs(study: Study) -> Iterator[tuple[str, str]]:
    """The rates and memories of the machine's own levels."""
    machine = study.base.inputs.machine
    assert machine is not None  # asked for by _inputs
    names = {level.name for level in machine.levels}
    if "gpu" in names:
        yield "GPU memory bandwidth", "gpu_bandwidth"
        yield "link bandwidth", "link_bandwidth"
        yield "GPU memory", "gpu_memory"
    yield "host memory bandwidth", "host_bandwidth"
    yield "host memory", "host_memory"
    if "disk" in names:
        yield "disk bandwidth", "disk_bandwidth"


def _flip(study: Study, what: str, key: str, probes: tuple[float, ...]) -> Flip:
    """The nearest of `probes` at which the decision differs, bisected towards the one before."""
    same, other = 0.0, None
    for percent in probes:
        try:
            differs = _differs(study, key, percent)
        except CompileError:
            break  # the spec language has no such value
        if differs:
            other = percent
            break
        same = percent
    for _ in range(_STEPS if other is not None else 0):
        assert other is not None
        middle = round((same + other) / 2, 1)
        if _differs(study, key, middle):
            other = middle
        else:
            same = middle
    outcome = outcome_of(study.decided(_setting(key, other))) if other is not None else None
    return Flip(what=what, key=key, unchanged_percent=same, percent=other, outcome=outcome)


def _differs(study: Study, key: str, percent: float) -> bool:
    return decision(study.decided(_setting(key, percent))) != decision(study.decided())


def _setting(key: str, percent: float) -> str:
    return f"{key}={percent:+g}%"
