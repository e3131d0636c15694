"""A spec with settings -> what it compiles to: the one way in which everything here is solved again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moeplan.planner import verify
from moeplan.planner.candidates import candidate_machines, candidate_offers
from moeplan.planner.diagnostics import InfeasibleError
from moeplan.planner.explain.facts import fact_change, is_fact, require_known, with_changes
from moeplan.planner.inputs import Inputs, load_inputs
from moeplan.planner.ir.fleet import Fleet
from moeplan.planner.ir.machine import Offer
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import Policy, Rejection
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import Workload
from moeplan.planner.passes.policy import find_policies
from moeplan.planner.passes.profile import apply_profile
from moeplan.planner.passes.roofline import find_roofline
from moeplan.planner.passes.workload import build_workload
from moeplan.planner.pipeline import compile_inputs, find_fleet
from moeplan.planner.spec import parse_spec
from moeplan.planner.strategies.in_memory import in_memory_policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A spec and its inputs, as edited."""

    spec: Spec
    inputs: Inputs


class Source:
    """Where the spec comes from: its text, its path and what replaces its machine. Reads its files once."""

    def __init__(self, text: bytes, path: str, machine_file: Path | None = None) -> None:
        self.text, self.path, self.machine_file = text, path, machine_file
        self._read: dict[tuple[object, ...], Inputs] = {}

    def case(self, settings: Sequence[str] = ()) -> Case:
        """The spec with `settings`, of which some change the catalog's facts. Raises CompileError."""
        spec = parse_spec(self.text, self.path, [s for s in settings if not is_fact(s)])
        verify.verify_spec(spec)
        changes = [fact_change(setting) for setting in settings if is_fact(setting)]
        files = _files(spec)
        if files not in self._read:
            self._read[files] = load_inputs(spec, self.machine_file)
        require_known(self._read[files], changes)
        return Case(spec=spec, inputs=with_changes(self._read[files], changes))


def _files(spec: Spec) -> tuple[object, ...]:
    """Everything in a spec that says which files are read."""
    batch, online = spec.workload.batch, spec.workload.online
    prompts, trace = batch.prompts_file if batch else "", online.trace_file if online else ""
    return spec.model, spec.machine, spec.catalog, spec.profile_file, prompts, trace


def solve(case: Case) -> Plan | InfeasibleError:
    """The whole plan of a case, or why there is none. Raises CompileError where the input is bad."""
    try:
        return compile_inputs(case.spec, case.inputs)
    except InfeasibleError as error:
        return error


Held = tuple[Policy | Rejection, ...]  # what holds the model in GPU memory, by machine and class


def decide(case: Case, held: Held = ()) -> Fleet | InfeasibleError:
    """The fleet of a case as `solve` would have it, micro-batches aside, in a fraction of the time.

    Offloaded policies are looked for only where those that hold the model make no fleet: elsewhere no fleet
    has them unless `market.offload` allows it, and the search for them takes nearly all of a compilation.
    `held` are the answers of `holding` for a case that differs only in its rate and in a larger market: on
    neither do they depend.
    """
    spec, inputs = case.spec, case.inputs
    try:
        workload = build_workload(spec, inputs)
        offers = candidate_offers(spec, inputs)
        machines = candidate_machines(spec, inputs, offers)
        rooflines = tuple(find_roofline(workload, machine) for machine in machines)
        found = _of(held, workload, rooflines) if held else _in_memory(spec, workload, rooflines)
        if offers and found:
            try:
                return _fleet(case, workload, rooflines, offers, found)
            except InfeasibleError:
                pass  # perhaps offloading makes one
        limit = spec.machine.memory_bytes if spec.machine else None
        refused = inputs.refusals(spec, workload)
        both = [find_policies(workload, roofline, limit, refused) for roofline in rooflines]
        answers = [answer for found in both for part in found for answer in part]
        return _fleet(case, workload, rooflines, offers, answers)
    except InfeasibleError as error:
        return error


def holding(case: Case) -> Held:
    """What holds the model in GPU memory; nothing where that does not serve every class."""
    workload = build_workload(case.spec, case.inputs)
    offers = candidate_offers(case.spec, case.inputs)
    machines = candidate_machines(case.spec, case.inputs, offers)
    rooflines = tuple(find_roofline(workload, machine) for machine in machines)
    return _in_memory(case.spec, workload, rooflines)


def _fleet(
    case: Case,
    workload: Workload,
    rooflines: Sequence[Roofline],
    offers: Sequence[Offer],
    answers: Sequence[Policy | Rejection],
) -> Fleet:
    policies = [answer for answer in answers if isinstance(answer, Policy)]
    refused = [answer for answer in answers if isinstance(answer, Rejection)]
    profiled = apply_profile(workload, rooflines, policies, case.inputs.profile)
    refusals = (*refused, *profiled.rejections)
    fleet, _ = find_fleet(
        case.spec, case.inputs, workload, rooflines, profiled.policies, refusals, offers, explain=False
    )
    return fleet


def _in_memory(spec: Spec, workload: Workload, rooflines: Sequence[Roofline]) -> Held:
    """Where every machine has a GPU and every class is served so; else nothing."""
    if spec.market.offload == "allow":
        return ()
    if not all(roofline.has("gpu") and roofline.roofs[0].flops_per_s for roofline in rooflines):
        return ()
    answers = [in_memory_policy(workload, r, roofline) for roofline in rooflines for r in workload.classes]
    return _serving_all(answers, workload)


def _of(held: Held, workload: Workload, rooflines: Sequence[Roofline]) -> Held:
    """Those of some machines."""
    names = {roofline.machine.name for roofline in rooflines}
    return _serving_all([answer for answer in held if _machine(answer) in names], workload)


def _serving_all(answers: Sequence[Policy | Rejection], workload: Workload) -> Held:
    """The answers where every class is served; else nothing."""
    served = {answer.serves for answer in answers if isinstance(answer, Policy)}
    return tuple(answers) if all(requests.name in served for requests in workload.classes) else ()


def _machine(answer: Policy | Rejection) -> str:
    return answer.machine.name if isinstance(answer, Policy) else answer.machine
