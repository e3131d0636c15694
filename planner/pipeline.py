"""The compiler on one screen: spec text -> Plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from moeplan.planner import verify
from moeplan.planner.candidates import candidate_machines, candidate_offers
from moeplan.planner.capacity import capacity_bound
from moeplan.planner.catalog import facts_digest
from moeplan.planner.inputs import Inputs, Unrunnable, load_inputs, runs_all
from moeplan.planner.ir.attainment import Attainment
from moeplan.planner.ir.fleet import Choice, Fleet
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.policy import Policy, Rejection
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.attainment import attain
from moeplan.planner.passes.fleet import choose_fleet
from moeplan.planner.passes.placement import place
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.profile import apply_profile
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.spec import parse_spec

_T = TypeVar("_T")


class Trace:
    """What the passes made and how long each took, for --dump-ir and --time-passes.

    `announce` is told the name of each pass before it runs.
    """

    def __init__(self, announce: Callable[[str], None] = lambda name: None) -> None:
        self.announce = announce
        self.levels: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def run(self, name: str, step: Callable[[], _T]) -> _T:
        self.announce(name)
        started = time.perf_counter()
        self.levels[name] = result = step()
        self.seconds[name] = time.perf_counter() - started
        return result


def compile_plan(
    text: str | bytes,
    path: str,
    machine_file: Path | None = None,
    trace: Trace | None = None,
    unrunnable: Unrunnable = runs_all,
    previous: Mapping[str, int] | None = None,
) -> Plan:
    """Lower spec text to a Plan; `machine_file` replaces the spec's machine or market, and `previous` counts
    the replicas of an earlier plan, from which moves must pay.

    `unrunnable` says why the bundled runtime refuses the spec's checkpoint: then no policy is for that
    runtime. The same text and input files give the same Plan. Raises CompileError (bad input) or its subclass
    InfeasibleError (no plan exists), and VerificationError on a bug of ours.
    """
    trace = trace or Trace()
    spec = trace.run("spec", lambda: parse_spec(text, path))
    verify.verify_spec(spec)

    def read() -> Inputs:
        return replace(load_inputs(spec, machine_file), unrunnable=unrunnable, previous=previous)

    return compile_inputs(spec, trace.run("inputs", read), trace)


def compile_inputs(spec: Spec, inputs: Inputs, trace: Trace | None = None) -> Plan:
    """Lower a spec whose files are read."""
    run = (trace or Trace()).run
    workload = run("workload", lambda: build_workload(spec, inputs))
    verify.verify_workload(workload)
    offers = candidate_offers(spec, inputs)
    machines = candidate_machines(spec, inputs, offers)
    rooflines = run("rooflines", lambda: tuple(find_roofline(workload, machine) for machine in machines))
    for roofline in rooflines:
        verify.verify_roofline(roofline)
    limit = spec.machine.memory_bytes if spec.machine else None
    refused = inputs.refusals(spec, workload)
    found = run("policies", lambda: tuple(find_policies(workload, r, limit, refused) for r in rooflines))
    predicted = tuple(policy for accepted, _ in found for policy in accepted)
    if len(machines) == 1:  # on a market offloaded replicas are chosen last, and their machines are many
        predicted = run("micro-batches", lambda: tuple(_regrouped(workload, rooflines, p) for p in predicted))
    profiled = run("profile", lambda: apply_profile(workload, rooflines, predicted, inputs.profile))
    policies = profiled.policies
    rejections = (*(refusal for _, refusals in found for refusal in refusals), *profiled.rejections)
    for policy in policies:
        verify.verify_policy(policy)
    fleet, attainment = run(
        "fleet", lambda: find_fleet(spec, inputs, workload, rooflines, policies, rejections, offers)
    )
    verify.verify_fleet(spec, workload, fleet)
    verify.verify_attainment(fleet, attainment)

    replicas = run(
        "schedules", lambda: tuple(_replica(workload, rooflines, choice) for choice in fleet.choices)
    )
    for made in replicas:
        if made.pipeline:
            verify.verify_schedule(made.pipeline.schedule, made.policy)
    evidence = inputs.spot_trace, inputs.interruptions
    placement = run("placement", lambda: place(spec, workload, fleet, offers, *evidence, policies))
    verify.verify_placement(spec, fleet, placement)
    return Plan(
        spec=spec,
        workload=workload,
        rejections=rejections,
        unused_rows=profiled.unused,
        fleet=fleet,
        attainment=attainment,
        replicas=replicas,
        placement=placement,
        facts_sha256=facts_digest(inputs.model, *machines, *offers),
    )


def find_fleet(
    spec: Spec,
    inputs: Inputs,
    workload: Workload,
    rooflines: Sequence[Roofline],
    policies: Sequence[Policy],
    rejections: Sequence[Rejection],
    offers: Sequence[Offer],
    explain: bool = True,
) -> tuple[Fleet, Attainment]:
    """The fleet of some policies, simulated: what the compiler chooses, and what explanations choose anew.

    Without `explain` it is not asked what would change the answer.
    """

    def choose(policies: Sequence[Policy], last: bool) -> Fleet:
        return choose_fleet(
            spec,
            workload,
            policies,
            rejections,
            offers,
            headroom=math.inf,  # how full is left to simulation
            previous=inputs.previous,
            explain=last,
        )

    return attain(spec, workload, rooflines, policies, inputs.trace, choose, explain)


def _replica(workload: Workload, rooflines: tuple[Roofline, ...], choice: Choice) -> Replica:
    """A chosen replica; where the runtime is ours, with its schedule."""
    policy, name = choice.column.policy, choice.column.name
    roofline = next(r for r in rooflines if r.machine == policy.machine)
    if policy.engine != "runtime_min":
        return Replica(name=name, policy=policy, roofline=roofline, pipeline=None, bound=None)
    from moeplan.planner.passes.schedule import build_schedule  # takes Numba, which few plans need

    pipeline = build_schedule(workload, roofline, policy)
    bound = capacity_bound(workload, roofline, policy)
    return Replica(name=name, policy=policy, roofline=roofline, pipeline=pipeline, bound=bound)


def _regrouped(workload: Workload, rooflines: tuple[Roofline, ...], policy: Policy) -> Policy:
    """The policy in the micro-batches that suit it best, where the runtime is ours and has a GPU."""
    if policy.engine != "runtime_min" or not policy.gpus:
        return policy
    from moeplan.planner.passes.regroup import regroup  # takes Numba

    return regroup(workload, next(r for r in rooflines if r.machine == policy.machine), policy)
