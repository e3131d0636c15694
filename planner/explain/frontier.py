"""Cost against the request rate and against the promised latency: the cheapest fleet at each, solved anew."""

from __future__ import annotations

from dataclasses import replace

from moeplan.planner.diagnostics import InfeasibleError
from moeplan.planner.explain.case import Case, Held, decide
from moeplan.planner.explain.outcomes import outcome_of
from moeplan.planner.ir.analysis import Frontier, FrontierPoint
from moeplan.planner.ir.fleet import Fleet
from moeplan.planner.ir.spec import OnlineSpec, Slo
from moeplan.planner.ir.workload import RequestClass

# Few: a compilation waits for them. Both are times the spec's own.
_RATES = (0.5, 2.0, 4.0)
_SLOS = (0.35, 0.6, 2.0)


def frontiers(case: Case, fleet: Fleet, online: RequestClass, held: Held) -> tuple[Frontier, ...]:
    """USD per hour around the chosen fleet, the chosen point itself included; `held` as of `decide`.

    The latency frontier scales TTFT and ITL together; its values are the ITL.
    """
    slo = online.slo
    assert slo is not None  # every online class has one
    rate = online.rate_per_s
    rates = [_point(f, f * rate, decide(_with_rate(case, f * rate), held)) for f in _RATES]
    slos = [_point(f, f * slo.itl_s, decide(_with_slo(case, f))) for f in _SLOS]
    return (
        Frontier(name="request rate", unit="/s", points=_sorted([*rates, _point(1.0, rate, fleet)])),
        Frontier(
            name="promised ITL, TTFT in proportion",
            unit="s",
            points=_sorted([*slos, _point(1.0, slo.itl_s, fleet)]),
        ),
    )


def _sorted(points: list[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    return tuple(sorted(points, key=lambda point: point.value))


def _point(factor: float, value: float, answer: Fleet | InfeasibleError) -> FrontierPoint:
    outcome = outcome_of(answer)
    return FrontierPoint(factor=factor, value=value, usd_per_hour=outcome.usd_per_hour, fleet=outcome.fleet)


def _with_rate(case: Case, rate_per_s: float) -> Case:
    return _with_online(case, replace(_online(case), rate_per_s=rate_per_s))


def _with_slo(case: Case, factor: float) -> Case:
    online = _online(case)
    slo = Slo(
        ttft_s=online.slo.ttft_s * factor,
        itl_s=online.slo.itl_s * factor,
        attainment=online.slo.attainment,
    )
    return _with_online(case, replace(online, slo=slo))


def _online(case: Case) -> OnlineSpec:
    online = case.spec.workload.online
    assert online is not None  # frontiers are of online work
    return online


def _with_online(case: Case, online: OnlineSpec) -> Case:
    return replace(case, spec=replace(case.spec, workload=replace(case.spec.workload, online=online)))
