"""What a fleet's record says in words: why it, what else, what would change it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moeplan.planner.ir.fleet import UNSIMULATED, Fleet, Flip, Mix
from moeplan.planner.ir.plan import Plan

TIE_RULE = (
    "between equals a tie-break decides, no merit: first go columns that another replaces at no more cost, "
    "then the machines times their column's place by name are fewest"
)
NEVER_RUN = "predicted, never run on a GPU"


def fleet_lines(plan: Plan) -> list[str]:
    """The lines of the report's section on the choice of the fleet."""
    return [*minimised_lines(plan.fleet), *_fill(plan), *_others(plan), *_changes(plan)]


def status_line(fleet: Fleet) -> str:
    """How good the fleet is known to be."""
    if fleet.solver_status == "optimal":
        return "proven cheapest"
    return f"the best found, at most {fleet.gap:.2%} dearer than the cheapest"


def minimised_lines(fleet: Fleet) -> Iterator[str]:
    """What was minimised, and how good it is known to be; nothing where nothing costs."""
    if fleet.cost > 0:
        yield f"{_usd(fleet.cost)} {fleet.cost_unit} was minimised: {status_line(fleet)}"


def _fill(plan: Plan) -> Iterator[str]:
    """Batch work on online replicas, and what spot machines are assumed to cost it."""
    online = {c.column.name for c in plan.fleet.choices if c.column.policy.serves == "online"}
    for route in plan.fleet.routes:
        if route.serves == "batch" and route.column in online:
            yield (
                f"{route.share:.1%} of the batch requests go to {route.column}, as far as its online work "
                "leaves it idle: send them at a lower priority"
            )
    if assumption := plan.fleet.spot_assumption:
        yield assumption


def _others(plan: Plan) -> Iterator[str]:
    fleet, why = plan.fleet, plan.fleet.sensitivity
    if why.single and fleet.cost > 0:
        told = "best with one column per class"
        yield f"{told}: this fleet" if _is_best(why.single, plan) else f"{told}: {_beside(why.single, plan)}"
    if why.runner_up:
        yield f"runner-up, without one of the columns chosen: {_beside(why.runner_up, plan)}"
    for cost in why.constraints:
        saved = f"would save {_usd(cost.saving)} {fleet.cost_unit}" if cost.saving else "would save nothing"
        yield f"without {cost.constraint} another fleet {saved}"


def _changes(plan: Plan) -> Iterator[str]:
    why = plan.fleet.sensitivity
    for flip in why.flips:
        yield flip_line(flip)
    for doubt in why.doubts:
        bucket = plan.workload.request_class(doubt.serves).buckets[doubt.bucket]
        yield (
            f"worth measuring: {doubt.serves} requests of {bucket.prompt_tokens:.0f} + "
            f"{bucket.output_tokens:.0f} tokens on {doubt.column}, whose standard error is "
            f"{doubt.uncertain_machines:.2g} machines"
        )


def flip_line(flip: Flip) -> str:
    """How wrong a GPU's figures must be for another answer."""
    inside = "inside" if flip.likely else "outside"
    if flip.factor < 1:
        slower = f"{1 - flip.factor:.0%} slower" if flip.factor < 0.995 else "any slower"
        return f"flips if {flip.gpu} is {slower} than predicted ({inside} the 90 % interval)"
    return f"flips if {flip.gpu} is {flip.factor - 1:.0%} faster than predicted ({inside} the 90 % interval)"


def _is_best(single: Mix, plan: Plan) -> bool:
    """Whether the fleet chosen has one column per class too, at the cost of the best such fleet."""
    alone = len(plan.fleet.choices) == len(plan.workload.classes)
    return alone and math.isclose(single.cost, plan.fleet.cost, rel_tol=1e-6)


def _beside(mix: Mix, plan: Plan) -> str:
    """Another fleet, its cost and how that compares; the queues of another fleet are not simulated."""
    fleet = plan.fleet
    parts = " and ".join(f"{count} × {name}" for name, count in mix.parts)
    how = UNSIMULATED * bool(plan.attainment.classes)
    told = f"{parts} at {_usd(mix.cost)} {fleet.cost_unit}{how}"
    if math.isclose(mix.cost, fleet.cost, rel_tol=1e-6):
        return f"{told}; equal in cost: {TIE_RULE}"
    saving = 1 - fleet.cost / mix.cost
    return f"{told}; this fleet saves {saving:.1%} of that" if saving > 5e-4 else told


def _usd(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"
