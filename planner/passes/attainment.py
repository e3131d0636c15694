"""Workload, Fleet, requests -> Attainment: the cheapest fleet that keeps its SLO in simulation.

The solver knows utilisation, not queues. Its fleets, solved at ever other utilisations, are simulated on the
class's own arrivals; the cheapest that attains is kept. Throughputs are estimates, so what counts is the
simulation in which every engine is slower than predicted, by one standard error but at most 15 %: to be
surer, measuring is cheaper than renting. Where no fleet attains then, one that attains as predicted will do,
and the plan says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeplan.planner.arrivals import request_stream
from moeplan.planner.diagnostics import Diagnostic, InfeasibleError
from moeplan.planner.ir.attainment import Attainment, ClassAttainment, Pool, Replay
from moeplan.planner.ir.fleet import Choice, Column, Fleet
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.packing.online import SPOT_OVERPROVISION
from moeplan.planner.strategies.laws import serving_law
from moeplan.planner.traces import RequestTrace
from moeplan.planner.units import format_duration

_EMPTIER = 0.75  # how much of the headroom is left with each step of the search for enough of it
_MOST_STEPS = 8  # down to a tenth
_MOST_HALVINGS = 3
_MOST_SLOWER = 1.15
_SAME_COST = 1.02  # fleets this close in cost need no further search between them

Choose = Callable[[float], Fleet]  # from headroom, which multiplies the target utilisation


@dataclass(frozen=True, slots=True)
class _Tried:
    """A fleet and its simulations."""

    headroom: float
    fleet: Fleet
    pools: tuple[Pool, ...]
    predicted: Replay
    slower: Replay


def attain(
    spec: Spec,
    workload: Workload,
    rooflines: Sequence[Roofline],
    trace: RequestTrace | None,
    choose: Choose,
) -> tuple[Fleet, Attainment]:
    """Return the cheapest fleet of `choose` that attains the SLO of the online class, and its simulations.

    Without an online class it is the solver's own. Raises InfeasibleError as `choose` does, and where no
    fleet that quota, budget and machines allow attains the SLO even at predicted speed.
    """
    requests = next((r for r in workload.classes if r.slo is not None), None)
    if requests is None:
        return choose(1.0), Attainment()
    search = _Search(workload, rooflines, requests, request_stream(requests, trace), choose)
    best = search.cheapest()
    if best is None:
        raise _missed(spec, requests, search.nearest())
    online = ClassAttainment(
        serves=requests.name,
        wanted_share=search.wanted,
        requests=search.stream.requests,
        arrivals="trace" if trace else "gamma",
        predicted=best.predicted,
        slower=best.slower,
        when_slower=search.attains(best.slower),
        fleets_tried=len(search.tried),
        headroom=best.headroom,
        usd_per_hour=best.fleet.usd_per_hour,
        unsimulated_usd_per_hour=search.tried[0].fleet.usd_per_hour,
    )
    return best.fleet, Attainment(classes=(online,), pools=best.pools)


class _Search:
    """Fleets at ever other headrooms, simulated one by one."""

    def __init__(
        self,
        workload: Workload,
        rooflines: Sequence[Roofline],
        requests: RequestClass,
        stream: RequestTrace,
        choose: Choose,
    ) -> None:
        assert requests.slo is not None  # only classes with an SLO are simulated
        self.workload, self.rooflines, self.choose = workload, rooflines, choose
        self.requests, self.stream, self.slo = requests, stream, requests.slo
        self.wanted = requests.slo.attainment
        self.tried: list[_Tried] = []

    def attains(self, found: Replay) -> bool:
        return found.attained_share >= self.wanted

    def cheapest(self) -> _Tried | None:
        """The cheapest fleet that attains, with slower engines if any does, else as predicted, or None."""
        first = self._try(1.0)
        good, bad = self._fuller(first) if self.attains(first.slower) else self._emptier(first)
        if good is not None and bad is not None:
            good = self._between(good, bad)
        if good is not None:
            return good
        able = [t for t in self.tried if self.attains(t.predicted)]
        return min(able, key=lambda t: t.fleet.usd_per_hour, default=None)

    def nearest(self) -> _Tried:
        return max(self.tried, key=lambda t: t.predicted.attained_share)

    def _fuller(self, good: _Tried) -> tuple[_Tried, _Tried | None]:
        """As full as can be, if that is cheaper: where it attains, else where it does not."""
        if good.fleet.usd_per_hour == 0.0:
            return good, None
        tried = self._try(1.0 / good.fleet.target_utilisation)
        if tried.fleet.usd_per_hour * _SAME_COST >= good.fleet.usd_per_hour:
            return good, None
        return (tried, None) if self.attains(tried.slower) else (good, tried)

    def _emptier(self, bad: _Tried) -> tuple[_Tried | None, _Tried]:
        """Ever emptier replicas until they attain, or none can be had."""
        for _ in range(_MOST_STEPS):
            try:
                tried = self._try(bad.headroom * _EMPTIER)
            except InfeasibleError:
                break
            if self.attains(tried.slower):
                return tried, bad
            bad = tried
        return None, bad

    def _between(self, good: _Tried, bad: _Tried) -> _Tried:
        """The cheapest that attains between a fleet that does and one that does not."""
        for _ in range(_MOST_HALVINGS):
            if good.fleet.usd_per_hour <= bad.fleet.usd_per_hour * _SAME_COST:
                break
            tried = self._try(math.sqrt(good.headroom * bad.headroom))
            if self.attains(tried.slower):
                good = tried
            else:
                bad = tried
        return good

    def _try(self, headroom: float) -> _Tried:
        from moeplan.planner.simulate.fleet import replay  # takes Numba, which batch work does not need

        fleet = self.choose(headroom)
        pools = tuple(
            pool_of(self.workload, self.rooflines, choice.column, _serving(choice))
            for choice in fleet.choices
            if choice.column.policy.serves == self.requests.name
        )
        routes = [route for route in fleet.routes if route.serves == self.requests.name]
        known = next((t for t in self.tried if t.pools == pools and t.fleet.routes == fleet.routes), None)
        if known:
            predicted, slower = known.predicted, known.slower
        else:
            predicted, slower = (
                replay(self.stream, self.requests.buckets, routes, pools, self.slo, late)
                for late in (False, True)
            )
        self.tried.append(_Tried(headroom, fleet, pools, predicted, slower))
        return self.tried[-1]


def pool_of(workload: Workload, rooflines: Sequence[Roofline], column: Column, replicas: int) -> Pool:
    """`replicas` of a column, as they are simulated."""
    policy = column.policy
    roofline = next(r for r in rooflines if r.machine == policy.machine)
    return Pool(
        column=column.name,
        engines=replicas * policy.data_parallel,
        slower=min(math.exp(policy.generated_tokens_per_s.sigma), _MOST_SLOWER),
        law=serving_law(workload, roofline, policy),
    )


def _serving(choice: Choice) -> int:
    """Replicas that serve: a spot pool's spare one stands in for those that are reclaimed."""
    return choice.replicas - (SPOT_OVERPROVISION if choice.column.market == "spot" else 0)


def _missed(spec: Spec, requests: RequestClass, best: _Tried) -> InfeasibleError:
    """The answer where no fleet attains: how near the nearest comes, and what it would attain."""
    slo, found = requests.slo, best.predicted
    assert slo is not None
    share = math.floor(found.attained_share * 1000) / 10
    late = "ttft" if found.ttft.p99_s > slo.ttft_s else "itl"
    reached = getattr(found, late).p99_s
    return InfeasibleError(
        Diagnostic(
            code="slo-missed",
            span=spec.span("workload.online.slo"),
            message=f"in simulation no fleet keeps the SLO for {slo.attainment * 100:g} % of the requests, "
            f"the best for {share:g} %",
            hint=f"attainment: {share:g}%, or {late}: {format_duration(reached)} (its 99th percentile), or a "
            "lower rate",
        )
    )
