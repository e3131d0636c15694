"""The compiler on one screen: spec text -> Plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from moeplan.planner import verify
from moeplan.planner.candidates import candidate_machines, candidate_offers
from moeplan.planner.capacity import capacity_bound
from moeplan.planner.catalog import facts_digest
from moeplan.planner.inputs import load_inputs
from moeplan.planner.ir.fleet import Choice, Fleet
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.roofline import Roofline
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
    """What the passes made and how long each took, for --dump-ir and --time-passes."""

    def __init__(self) -> None:
        self.levels: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def run(self, name: str, step: Callable[[], _T]) -> _T:
        started = time.perf_counter()
        self.levels[name] = result = step()
        self.seconds[name] = time.perf_counter() - started
        return result


def compile_plan(
    text: str | bytes,
    path: str,
    machine_file: Path | None = None,
    trace: Trace | None = None,
    previous: Mapping[str, int] | None = None,
) -> Plan:
    """Lower spec text to a Plan; `machine_file` replaces the spec's machine or market, and `previous` counts
    the replicas of an earlier plan, from which moves must pay.

    The same text and input files give the same Plan. Raises CompileError (bad input) or its subclass
    InfeasibleError (no plan exists), and VerificationError on a bug of ours.
    """
    run = (trace or Trace()).run
    spec = run("spec", lambda: parse_spec(text, path))
    verify.verify_spec(spec)
    inputs = run("inputs", lambda: load_inputs(spec, machine_file))
    workload = run("workload", lambda: build_workload(spec, inputs))
    verify.verify_workload(workload)
    offers = candidate_offers(spec, inputs)
    machines = candidate_machines(spec, inputs, offers)
    rooflines = run("rooflines", lambda: tuple(find_roofline(workload, machine) for machine in machines))
    for roofline in rooflines:
        verify.verify_roofline(roofline)
    limit = spec.machine.memory_bytes if spec.machine else None
    found = run("policies", lambda: tuple(find_policies(workload, roofline, limit) for roofline in rooflines))
    predicted = tuple(policy for accepted, _ in found for policy in accepted)
    if len(machines) == 1:  # on a market offloaded replicas are chosen last, and their machines are many
        predicted = run("micro-batches", lambda: tuple(_regrouped(workload, rooflines, p) for p in predicted))
    profiled = run("profile", lambda: apply_profile(workload, rooflines, predicted, inputs.profile))
    policies = profiled.policies
    rejections = (*(refusal for _, refused in found for refusal in refused), *profiled.rejections)
    for policy in policies:
        verify.verify_policy(policy)

    def choose(policies: Sequence[Policy], explain: bool) -> Fleet:
        full = math.inf  # how full is left to simulation
        return choose_fleet(
            spec, workload, policies, rejections, offers, headroom=full, previous=previous, explain=explain
        )

    fleet, attainment = run(
        "fleet", lambda: attain(spec, workload, rooflines, policies, inputs.trace, choose)
    )
    verify.verify_fleet(spec, workload, fleet)
    verify.verify_attainment(fleet, attainment)

    replicas = run(
        "schedules", lambda: tuple(_replica(workload, rooflines, choice) for choice in fleet.choices)
    )
    for made in replicas:
        if made.pipeline:
            verify.verify_schedule(made.pipeline.schedule, made.policy)
    placement = run("placement", lambda: place(spec, workload, fleet, offers))
    verify.verify_placement(fleet, placement)
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
