"""Workload, policies, requests -> Fleet, Attainment: the cheapest fleet that keeps its SLO in simulation.

The solver knows throughputs, not queues. Its fleet is simulated on the class's own arrivals; of each pool
that misses the SLO the simulation tells how many engines would keep it, and so what share of its throughput
queues leave. With these shares the fleet is solved again, until one attains. All columns start with their
whole throughput, so that what is dear is dear because it was tried. As small pools teach worse shares than
large ones have, columns that might do all for less are then tried alone.

Throughputs are estimates. So what counts is the simulation in which every engine is slower than predicted, by
one standard error but at most 15 %: to be surer, measuring is cheaper than renting. Where no fleet attains
then, one that attains as predicted will do, and the plan says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from moeplan.planner.arrivals import request_stream
from moeplan.planner.diagnostics import Diagnostic, InfeasibleError
from moeplan.planner.ir.attainment import Attainment, ClassAttainment, Pool, Replay, ServingLaw
from moeplan.planner.ir.fleet import Choice, Fleet, Route
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import RequestClass, Workload
from moeplan.planner.packing.online import SPOT_OVERPROVISION
from moeplan.planner.strategies.laws import serving_law
from moeplan.planner.traces import RequestTrace
from moeplan.planner.units import format_duration

_MOST_SLOWER = 1.15
_MOST_FLEETS = 16  # solved with ever better shares
_MOST_TIMES = 16  # as many engines are tried for a pool that misses its SLO
_CHEAPER = 0.98  # of another fleet's cost, to be worth a simulation

Choose = Callable[[Sequence[Policy]], Fleet]


def attain(
    spec: Spec,
    workload: Workload,
    rooflines: Sequence[Roofline],
    policies: Sequence[Policy],
    trace: RequestTrace | None,
    choose: Choose,
) -> tuple[Fleet, Attainment]:
    """Return the cheapest fleet that `choose` finds and that attains the SLO of the online class, and its
    simulations. Its online policies have the rates that queues leave.

    Without an online class it is the solver's own. Raises InfeasibleError as `choose` does, and where no
    fleet that quota, budget and machines allow attains the SLO even at predicted speed.
    """
    requests = next((r for r in workload.classes if r.slo is not None), None)
    if requests is None:
        return choose(policies), Attainment()
    search = _Search(workload, rooflines, policies, requests, request_stream(requests, trace), choose)
    best = search.cheapest()
    if best is None:
        raise _missed(spec, requests, [tried.predicted for tried in search.tried])
    first = search.tried[0]
    online = ClassAttainment(
        serves=requests.name,
        wanted_share=search.slo.attainment,
        requests=search.stream.requests,
        arrivals="trace" if trace else "gamma",
        predicted=best.predicted,
        slower=best.slower,
        when_slower=search.attains(best.slower),
        allowance=max(pool.slower for pool in best.pools) - 1.0,
        fleets_tried=len(search.tried),
        usd_per_hour=best.fleet.usd_per_hour,
        unsimulated_usd_per_hour=first.fleet.usd_per_hour,
        unsimulated_share=first.slower.attained_share,
    )
    return best.fleet, Attainment(classes=(online,), pools=best.pools)


@dataclass(frozen=True, slots=True)
class _Tried:
    """A fleet and its simulations; `parts` are its pools' requests."""

    fleet: Fleet
    choices: tuple[Choice, ...]
    pools: tuple[Pool, ...]
    parts: list[RequestTrace]
    predicted: Replay
    slower: Replay


Key = tuple[str, str, str, int]


def _key(policy: Policy) -> Key:
    return policy.machine.name, policy.serves, policy.engine, policy.gpus


class _Search:
    """Fleets, each solved with what the simulations before it taught."""

    def __init__(
        self,
        workload: Workload,
        rooflines: Sequence[Roofline],
        policies: Sequence[Policy],
        requests: RequestClass,
        stream: RequestTrace,
        choose: Choose,
    ) -> None:
        assert requests.slo is not None  # only classes with an SLO are simulated
        self.requests, self.stream, self.slo, self.choose = requests, stream, requests.slo, choose
        self.others = [policy for policy in policies if policy.serves != requests.name]
        self.own = {_key(policy): policy for policy in policies if policy.serves == requests.name}
        self.rooflines = {roofline.machine.name: roofline for roofline in rooflines}
        self.workload = workload
        # What queues leave of each policy's throughput, as far as is known.
        self.shares = {key: 1.0 / slowest(policy) for key, policy in self.own.items()}
        self.tried: list[_Tried] = []

    def attains(self, found: Replay) -> bool:
        return found.attained_share >= self.slo.attainment

    def cheapest(self) -> _Tried | None:
        """The cheapest fleet found that attains with slow engines; where none does, as predicted."""
        found = self._repaired()
        for key, policy in self.own.items():
            if not policy.rehearsed_only and all(rate.requests_per_s.value for rate in policy.rates):
                found = self._alone(key, found)
        if found:
            return found
        able = [tried for tried in self.tried if self.attains(tried.predicted)]
        return min(able, key=lambda tried: tried.fleet.usd_per_hour, default=None)

    def _repaired(self) -> _Tried | None:
        """The first fleet that attains; None where the solver finds no more."""
        while len(self.tried) < _MOST_FLEETS:
            try:
                tried = self._simulated(self._solved(self.shares), self.shares)
            except InfeasibleError:
                if not self.tried:
                    raise
                break
            if self.attains(tried.slower):
                return tried
            for number, pool in enumerate(tried.slower.pools):
                if pool.attained_share < self.slo.attainment:
                    self._learn(tried, number, self.shares)
        return None

    def _alone(self, key: Key, best: _Tried | None) -> _Tried | None:
        """`best`, or a fleet of one policy if that attains for less."""
        most_usd = best.fleet.usd_per_hour * _CHEAPER if best else math.inf
        shares = {key: 1.0 / slowest(self.own[key])}
        try:
            fleet = self._solved(shares)
            if fleet.usd_per_hour >= most_usd:
                return best
            tried = self._simulated(fleet, shares)
            for _ in range(2):
                if self.attains(tried.slower):
                    return tried
                if len(tried.choices) > 1:
                    break
                self._learn(tried, 0, shares, most_usd)
                fleet = self._solved(shares)
                if fleet.usd_per_hour >= most_usd:
                    break
                tried = self._simulated(fleet, shares)
        except InfeasibleError:
            pass
        return best

    def _solved(self, shares: Mapping[Key, float]) -> Fleet:
        """The cheapest fleet of policies with what queues leave of their rates."""
        return self.choose([*self.others, *(_left(self.own[key], s) for key, s in shares.items() if s)])

    def _simulated(self, fleet: Fleet, shares: Mapping[Key, float]) -> _Tried:
        from moeplan.planner.simulate.fleet import replay, split  # take Numba, which batch work does not need

        choices = tuple(c for c in fleet.choices if c.column.policy.serves == self.requests.name)
        pools = tuple(self._pool(choice, shares) for choice in choices)
        routes: list[Route] = [route for route in fleet.routes if route.serves == self.requests.name]
        parts = split(self.stream, self.requests.buckets, routes, pools)
        predicted, slower = (replay(parts, pools, self.slo, late) for late in (False, True))
        self.tried.append(_Tried(fleet, choices, pools, parts, predicted, slower))
        return self.tried[-1]

    def _pool(self, choice: Choice, shares: Mapping[Key, float]) -> Pool:
        key = _key(choice.column.policy)
        policy = self.own[key]
        law = serving_law(self.workload, self.rooflines[policy.machine.name], policy)
        return pool_of(choice.column.name, policy, serving_replicas(choice), law, shares[key])

    def _learn(
        self, tried: _Tried, number: int, shares: dict[Key, float], most_usd: float = math.inf
    ) -> None:
        """Of a pool that misses: the share with which the solver buys as many engines as keep the SLO.

        It is of half an engine less, so that one fewer is too few; 0 where no number for `most_usd` helps.
        """
        from moeplan.planner.simulate.fleet import engines_needed

        choice, pool, part = tried.choices[number], tried.pools[number], tried.parts[number]
        key, column = _key(choice.column.policy), choice.column
        most = _MOST_TIMES * pool.engines
        if most_usd < math.inf:
            most = min(most, math.ceil(most_usd / column.usd_per_hour) * column.policy.data_parallel)
        needed = engines_needed(part, pool, self.slo, self.slo.attainment, most)
        load = choice.utilisation * pool.engines * shares[key]
        shares[key] = load / (needed - 0.5) if needed else 0.0


def _left(policy: Policy, share: float) -> Policy:
    """The policy with a share of its rates."""
    rates = []
    for rate in policy.rates:
        left = replace(rate.requests_per_s, value=rate.requests_per_s.value * share)
        rates.append(replace(rate, requests_per_s=left))
    return replace(policy, rates=tuple(rates))


def slowest(policy: Policy) -> float:
    """How many times as long as predicted the plan allows everything to take."""
    return min(math.exp(policy.generated_tokens_per_s.sigma), _MOST_SLOWER)


def pool_of(column: str, policy: Policy, replicas: int, law: ServingLaw, capacity_share: float) -> Pool:
    """`replicas` of a column, as they are simulated."""
    return Pool(
        column=column,
        engines=replicas * policy.data_parallel,
        slower=slowest(policy),
        capacity_share=capacity_share,
        law=law,
    )


def serving_replicas(choice: Choice) -> int:
    """Replicas that serve: a spot pool's spare one stands in for those that are reclaimed."""
    return choice.replicas - (SPOT_OVERPROVISION if choice.column.market == "spot" else 0)


def _missed(spec: Spec, requests: RequestClass, replays: Sequence[Replay]) -> InfeasibleError:
    """The answer where no fleet attains: how near the nearest comes, and what it would attain."""
    slo = requests.slo
    assert slo is not None  # it was missed
    found = max(replays, key=lambda replay: replay.attained_share)
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
