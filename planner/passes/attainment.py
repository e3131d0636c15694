"""Workload, policies, requests -> Fleet, Attainment: the cheapest fleet that keeps its SLO in simulation.

The solver knows throughputs, not queues. Its fleet is simulated on the class's own arrivals; of each pool
that misses the SLO the simulation tells how many engines would keep it, how much one fewer would bear, and so
what share of its throughput queues leave. First each policy alone learns its share, as small pools teach
worse ones than large ones have; then mixes are solved with what is known, simulated and taught again, as long
as they are cheaper.

Throughputs are estimates. So what counts is the simulation of a surge: requests come faster by one standard
error of the throughput, but by no more than 15 %, since to be surer measuring is cheaper than renting. Where
no fleet attains then, one that attains at the planned rate will do, and the plan says so.
"""

from __future__ import annotations

import contextlib
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
from moeplan.planner.strategies.laws import serving_law
from moeplan.planner.traces import RequestTrace
from moeplan.planner.units import format_duration

_MOST_MARGIN = 1.15
_LEAST_PROMISE = 50  # percent that a spec may ask for
_MOST_FLEETS = 16  # solved with ever better shares
_MOST_TIMES = 16  # as many engines are tried for a pool that misses its SLO
_CHEAPER = 0.98  # of another fleet's cost, to be worth a simulation

Choose = Callable[[Sequence[Policy], bool], Fleet]  # whether it is to be explained


def attain(
    spec: Spec,
    workload: Workload,
    rooflines: Sequence[Roofline],
    policies: Sequence[Policy],
    trace: RequestTrace | None,
    choose: Choose,
    explain: bool = True,
) -> tuple[Fleet, Attainment]:
    """Return the cheapest fleet that `choose` finds and that attains the SLO of the online class, and its
    simulations. Its online policies have the rates that queues leave.

    Without an online class it is the solver's own. Raises InfeasibleError as `choose` does, and where no
    fleet that quota, budget and machines allow attains the SLO even at the planned rate. Without `explain`
    the fleet is not explained, and its simulations are not told.
    """
    requests = next((r for r in workload.classes if r.slo is not None), None)
    if requests is None:
        return choose(policies, explain), Attainment()
    search = _Search(workload, rooflines, policies, requests, request_stream(requests, trace), choose)
    best = search.cheapest()
    if best is None:
        raise _missed(spec, requests, [search.planned(tried) for tried in search.tried])
    if not explain:
        return best.fleet, Attainment()
    first = search.tried[0]
    online = ClassAttainment(
        serves=requests.name,
        wanted_share=search.slo.attainment,
        requests=search.stream.requests,
        arrivals="trace" if trace else "gamma",
        planned=search.planned(best),
        surge=best.surge,
        bears_surge=search.attains(best.surge),
        margin=max(pool.margin for pool in best.pools),
        fleets_tried=len(search.tried),
        usd_per_hour=best.fleet.usd_per_hour,
        unsimulated_usd_per_hour=first.fleet.usd_per_hour,
        unsimulated_share=first.surge.attained_share,
    )
    return choose(best.policies, True), Attainment(classes=(online,), pools=best.pools)


@dataclass(frozen=True, slots=True)
class _Tried:
    """A fleet and its simulation in a surge; `parts` are its pools' requests."""

    policies: Sequence[Policy]
    fleet: Fleet
    choices: tuple[Choice, ...]
    pools: tuple[Pool, ...]
    parts: list[RequestTrace]
    surge: Replay


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
        self.shares = {key: 1.0 / margin_of(policy) for key, policy in self.own.items()}
        self.tried: list[_Tried] = []

    def attains(self, found: Replay) -> bool:
        return found.attained_share >= self.slo.attainment

    def cheapest(self) -> _Tried | None:
        """The cheapest fleet found that attains in a surge; where none does, at the planned rate."""
        first = self._simulated(self._solved(self.shares), self.shares)
        if self.attains(first.surge):
            return first
        best = None
        for usd, key in self._single_types():
            if best is None or usd < best.fleet.usd_per_hour * _CHEAPER:
                best = self._alone(key, best) or best
        best = self._mixed(best) or best
        if best:
            return best
        able = [tried for tried in self.tried if self.attains(self.planned(tried))]
        return min(able, key=lambda tried: tried.fleet.usd_per_hour, default=None)

    def planned(self, tried: _Tried) -> Replay:
        """The simulation at the planned rate."""
        from moeplan.planner.simulate.fleet import replay

        return replay(tried.parts, tried.pools, self.slo)

    def _single_types(self) -> list[tuple[float, Key]]:
        """Policies that can serve every size, by what they cost alone, queues aside."""
        found = []
        for key, policy in self.own.items():
            if policy.rehearsed_only or not all(rate.requests_per_s.value for rate in policy.rates):
                continue
            with contextlib.suppress(InfeasibleError):
                found.append((self._solved({key: self.shares[key]}).usd_per_hour, key))
        return sorted(found)

    def _alone(self, key: Key, best: _Tried | None) -> _Tried | None:
        """The fleet of one policy that attains; None where there is none, or none for less than `best`."""
        tried = None
        with contextlib.suppress(InfeasibleError):
            for _ in range(_MOST_FLEETS):
                shares = {key: self.shares[key]}
                fleet = self._solved(shares)
                if best and fleet.usd_per_hour >= best.fleet.usd_per_hour * _CHEAPER:
                    return None
                if tried and fleet.choices == tried.fleet.choices:
                    return None
                tried = self._simulated(fleet, shares)
                if self.attains(tried.surge):
                    return tried
                if len(tried.choices) > 1 or not self._learn(tried, 0, self.shares):
                    return None
        return None

    def _mixed(self, best: _Tried | None) -> _Tried | None:
        """The first mix that attains; None where the solver finds no more, or none for less than `best`."""
        shares = dict(self.shares)
        with contextlib.suppress(InfeasibleError):
            for _ in range(_MOST_FLEETS):
                fleet = self._solved(shares)
                if best and fleet.usd_per_hour >= best.fleet.usd_per_hour * _CHEAPER:
                    return None
                tried = self._simulated(fleet, shares)
                if self.attains(tried.surge):
                    return tried
                for number, pool in enumerate(tried.surge.pools):
                    if pool.attained_share < self.slo.attainment and not self._learn(tried, number, shares):
                        shares[_key(tried.choices[number].column.policy)] = 0.0
        return None

    def _solved(self, shares: Mapping[Key, float]) -> Fleet:
        """The cheapest fleet of policies with what queues leave of their rates."""
        return self.choose(self._policies(shares), False)

    def _policies(self, shares: Mapping[Key, float]) -> list[Policy]:
        return [*self.others, *(_left(self.own[key], share) for key, share in shares.items() if share)]

    def _simulated(self, fleet: Fleet, shares: Mapping[Key, float]) -> _Tried:
        from moeplan.planner.simulate.fleet import replay, split  # take Numba, which batch work does not need

        choices = tuple(c for c in fleet.choices if c.column.policy.serves == self.requests.name)
        pools = tuple(self._pool(choice, shares) for choice in choices)
        routes: list[Route] = [route for route in fleet.routes if route.serves == self.requests.name]
        parts = split(self.stream, self.requests.buckets, routes, pools)
        surge = replay(parts, pools, self.slo, surge=True)
        self.tried.append(_Tried(self._policies(shares), fleet, choices, pools, parts, surge))
        return self.tried[-1]

    def _pool(self, choice: Choice, shares: Mapping[Key, float]) -> Pool:
        key = _key(choice.column.policy)
        policy = self.own[key]
        law = serving_law(self.workload, self.rooflines[policy.machine.name], policy)
        return pool_of(choice.column.name, policy, serving_replicas(choice), law, shares[key])

    def _learn(self, tried: _Tried, number: int, shares: dict[Key, float]) -> bool:
        """Of a pool that misses: the share with which the solver buys as many engines as keep the SLO.

        One fewer bear a part of its requests: that is what they can do. False where no number helps.
        """
        from moeplan.planner.simulate.fleet import bearable_share, engines_needed

        choice, pool, part = tried.choices[number], tried.pools[number], tried.parts[number]
        wanted, copies = self.slo.attainment, choice.column.policy.data_parallel
        needed = engines_needed(part, pool, self.slo, wanted, _MOST_TIMES * pool.engines)
        if needed is None:
            return False
        fewer = max(pool.engines, needed - copies)
        borne = bearable_share(part, replace(pool, engines=fewer), self.slo, wanted)
        load = choice.utilisation * pool.engines * pool.capacity_share
        shares[_key(choice.column.policy)] = load * borne / fewer
        return True


def _left(policy: Policy, share: float) -> Policy:
    """The policy with a share of its rates."""
    rates = []
    for rate in policy.rates:
        left = replace(rate.requests_per_s, value=rate.requests_per_s.value * share)
        rates.append(replace(rate, requests_per_s=left))
    return replace(policy, rates=tuple(rates))


def margin_of(policy: Policy) -> float:
    """For how many times its requests a plan is made."""
    return min(math.exp(policy.generated_tokens_per_s.sigma), _MOST_MARGIN)


def pool_of(column: str, policy: Policy, replicas: int, law: ServingLaw, capacity_share: float) -> Pool:
    """`replicas` of a column, as they are simulated."""
    return Pool(
        column=column,
        engines=replicas * policy.data_parallel,
        margin=margin_of(policy),
        capacity_share=capacity_share,
        law=law,
    )


def serving_replicas(choice: Choice) -> int:
    """Replicas that serve: a spot pool's spare one stands in for those that are reclaimed."""
    return choice.replicas - choice.spare


def _missed(spec: Spec, requests: RequestClass, replays: Sequence[Replay]) -> InfeasibleError:
    """The answer where no fleet attains: how near the nearest comes, and what it would attain."""
    slo = requests.slo
    assert slo is not None  # it was missed
    found = max(replays, key=lambda replay: replay.attained_share)
    share = math.floor(found.attained_share * 1000) / 10
    lower = f"attainment: {share:g}%, " if share >= _LEAST_PROMISE else ""
    late = f"TTFT {format_duration(found.ttft.p99_s)} and ITL {format_duration(found.itl.p99_s)}"
    return InfeasibleError(
        Diagnostic(
            code="slo-missed",
            span=spec.span("workload.online.slo"),
            message=f"in simulation no fleet keeps the SLO for {slo.attainment * 100:g} % of the requests, "
            f"the best for {share:g} %; its 99th percentiles are {late}",
            hint=f"{lower}a later ttft or itl, a lower rate, or more machines to choose from",
        )
    )
