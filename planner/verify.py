"""What each level promises, checked after the pass that makes it. A broken promise is our bug."""

from __future__ import annotations

import itertools
import math

from moeplan.planner.ir.attainment import Attainment
from moeplan.planner.ir.fleet import Fleet
from moeplan.planner.ir.placement import Placement
from moeplan.planner.ir.policy import Policy
from moeplan.planner.ir.roofline import Roofline
from moeplan.planner.ir.schedule import Schedule
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import Workload

_SLACK = 1e-6
_PAGE_SLACK = 0.01  # pages are whole bytes, as many as divide a layer
_SOLVER_SLACK = 1e-3  # the solver's feasibility tolerance, relative


class VerificationError(Exception):
    """A level breaks its promise."""


def _require(promise: bool, message: str) -> None:
    if not promise:
        raise VerificationError(message)


def _about(used: float, held: float) -> bool:
    """Equal but for rounding up to whole pages."""
    return abs(used - held) <= _PAGE_SLACK * max(used, held)


def verify_spec(spec: Spec) -> None:
    """A model, some work, a machine or a market."""
    _require(bool(spec.model.name) != bool(spec.model.path), "a spec names one model")
    _require(spec.workload.batch is not None or spec.workload.online is not None, "a spec has work")


def verify_workload(workload: Workload) -> None:
    """Shares sum to one, sizes and rates are positive, and the operators hold every matrix of the model."""
    for requests in workload.classes:
        _require(math.isclose(sum(b.share for b in requests.buckets), 1.0, abs_tol=_SLACK), "shares sum to 1")
        _require(
            all(b.prompt_tokens > 0 and b.output_tokens > 0 for b in requests.buckets), "sizes are positive"
        )
        work = requests.requests if requests.name == "batch" else requests.rate_per_s
        _require(work > 0, f"the {requests.name} class has work")
    p = workload.model.parameters
    held = sum(operator.parameters for operator in workload.operators)
    tied = 0 if p.lm_head else p.embedding
    _require(
        held - tied == p.total() - p.norms - p.embedding, "operators hold all matrices but the embedding"
    )


def verify_roofline(roofline: Roofline) -> None:
    """Every roof is finite and positive, and no link outruns the memory that it feeds."""
    for roof in roofline.roofs:
        _require(0 < roof.bytes_per_s < math.inf and roof.bytes > 0, f"{roof.level} has a memory")
    for fast, slow in itertools.pairwise(roofline.roofs):
        _require(
            0 < slow.up_bytes_per_s <= fast.bytes_per_s, f"the {slow.level} link is slower than {fast.level}"
        )


def verify_policy(policy: Policy) -> None:
    """It fits, its batch adds up, and its predictions are positive numbers."""
    for limit in policy.limits:
        used = policy.used_bytes(limit.level)
        _require(
            used <= limit.bytes * (1 + _SLACK) + 1, f"{policy.machine.name}: {limit.level} holds the policy"
        )
    _require(
        policy.micro_batch * (policy.micro_batches - 1)
        < policy.sequences
        <= policy.micro_batch * policy.micro_batches,
        "micro-batches hold the sequences",
    )
    _require(
        0 <= policy.kv_gpu_share <= policy.attention_gpu_share <= 1, "cache on the GPU is attended there"
    )
    _require(
        policy.engine == "vllm"
        or policy.gpus == 0
        or policy.resident_share + policy.experts_cpu_share + policy.experts_disk_share <= 1 + _SLACK,
        "an expert is in one place",
    )
    for figure in (policy.prefill_tokens_per_s, policy.decode_tokens_per_s, policy.generated_tokens_per_s):
        _require(
            0 < figure.value < math.inf and figure.low <= figure.value <= figure.high,
            "predictions are positive",
        )


def verify_fleet(spec: Spec, workload: Workload, fleet: Fleet) -> None:
    """Everything is routed, nothing is overloaded, nothing exceeds quota or budget, floors are kept."""
    for requests in workload.classes:
        for bucket in range(len(requests.buckets)):
            routed = sum(r.share for r in fleet.routes if (r.serves, r.bucket) == (requests.name, bucket))
            _require(math.isclose(routed, 1.0, abs_tol=_SLACK), f"{requests.name} bucket {bucket} is routed")
    for choice in fleet.choices:
        bound = choice.target * (1 + _SOLVER_SLACK)
        _require(choice.utilisation <= bound, f"{choice.column.name} is not overloaded")
        _require(choice.replicas > 0, f"{choice.column.name} has replicas")
    for gpu, most in spec.market.quota.items():
        used = sum(
            c.replicas * c.column.policy.machine.gpus
            for c in fleet.choices
            if c.column.policy.machine.gpu == gpu
        )
        _require(used <= most, f"the fleet keeps the {gpu} quota")
    budget = spec.market.budget_usd_per_hour
    _require(budget is None or fleet.usd_per_hour <= budget + _SLACK, "the fleet keeps the budget")
    _require(0 <= fleet.cost_bound <= fleet.cost * (1 + _SLACK), "no fleet is cheaper than the bound")
    _verify_floor(spec, workload, fleet)


def _verify_floor(spec: Spec, workload: Workload, fleet: Fleet) -> None:
    """Enough of every online size goes to machines that are not spot."""
    steady = {c.column.name for c in fleet.choices if c.column.market != "spot"}
    for requests in workload.classes:
        for bucket in range(len(requests.buckets) if requests.name == "online" else 0):
            own = [r for r in fleet.routes if (r.serves, r.bucket) == ("online", bucket)]
            share = sum(r.share for r in own if r.column in steady)
            _require(share >= spec.market.on_demand_floor - _SOLVER_SLACK, f"bucket {bucket} keeps the floor")


def verify_attainment(fleet: Fleet, attainment: Attainment) -> None:
    """Online columns have a pool each, shares are shares, and the SLO is attained at the planned rate."""
    online = [c.column.name for c in fleet.choices if c.column.policy.serves == "online"]
    _require([pool.column for pool in attainment.pools] == online, "each online column is a pool")
    for found in attainment.classes:
        for replay in (found.planned, found.surge):
            shares = [replay.attained_share]
            for pool in replay.pools:
                shares += [pool.attained_share, pool.busy, pool.occupied]
            _require(all(0 <= share <= 1 + _SLACK for share in shares), "simulated shares are shares")
        promised = found.surge if found.bears_surge else found.planned
        _require(promised.attained_share >= found.wanted_share, f"the {found.serves} SLO is attained")


def verify_schedule(schedule: Schedule, policy: Policy) -> None:
    """Race-freedom and progress, proved by vector clocks on passes that hold every kind of neighbour.

    With only the lanes' own orders and the emitted waits: every read happens after the write it needs, no
    buffer is overwritten before its readers are done, every page is the one wanted, and no task waits for a
    later one (no deadlock). The page buffers that are used are those that the policy's memory holds.
    """
    from moeplan.planner import programs  # take Numba
    from moeplan.planner.programs import proof

    steps = proof.neighbours(schedule)
    issued = programs.issue(schedule, steps)
    offence = proof.first_offence(schedule, issued)
    if offence:
        row = issued.rows[offence.row].tolist()
        raise VerificationError(
            f"{programs.ops(schedule)[row[0]]} of layer {row[2]} {offence.what}, schedule {schedule.name}"
        )
    for item, used in proof.page_bytes(schedule, issued, policy).items():
        held = sum(use.bytes for use in policy.memory if use.item == item)
        fits = used <= held * (1 + _PAGE_SLACK)  # a ring of merged pages may be smaller, nothing else
        _require(
            fits if item == "pinned pages" else _about(used, held),
            f"{item} are {held:,.0f} bytes, the schedule uses {used:,.0f}",
        )


def verify_placement(spec: Spec, fleet: Fleet, placement: Placement) -> None:
    """Each choice of the fleet has a site, rented ones have zones, spares keep the quota, and nothing is
    promised without evidence."""
    for choice, site in zip(fleet.choices, placement.sites, strict=True):
        _require(site.column == choice.column.name, "sites follow the fleet's order")
        held = site.replicas + (site.spot_overprovision if site.evidence == "none" else 0)
        exact = site.evidence == "none"  # with evidence the placement decides how many are to spare
        _require(held == choice.replicas if exact else held <= choice.replicas, f"{site.column} is placed")
        _require(bool(site.zones) == (site.market != "owned"), f"{site.column} has zones")
        _require(0 <= site.on_demand_base <= site.replicas, f"{site.column} has a base of its own replicas")
        _require((site.evidence == "none") == (site.outlook is None), f"{site.column} says what it knows")
        if site.outlook is not None:
            seen = site.outlook.availability
            _require(0 <= seen.low <= seen.value <= seen.high <= 1, f"{site.column} has an interval")
            _require(site.evidence == "trace" or not site.outlook.promised, "bands carry no promise")
            _require(
                site.outlook.clairvoyant_usd_per_hour <= site.outlook.usd_per_hour * (1 + _SLACK),
                f"{site.column}: no policy is cheaper than the clairvoyant",
            )
    for gpu, most in spec.market.quota.items():
        held = sum(
            (site.replicas + site.spot_overprovision) * choice.column.policy.machine.gpus
            for choice, site in zip(fleet.choices, placement.sites, strict=True)
            if choice.column.policy.machine.gpu == gpu
        )
        _require(held <= most, f"the placement keeps the {gpu} quota")
