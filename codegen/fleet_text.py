"""What a fleet's record says in words: why it, what else, what would change it."""

from __future__ import annotations

from collections.abc import Iterator

from moeplan.planner.ir.fleet import Fleet, Flip, Mix
from moeplan.planner.ir.plan import Plan

NEVER_RUN = "predicted, never run on a GPU"


def fleet_lines(plan: Plan) -> list[str]:
    """The lines of the report's section on the choice of the fleet."""
    return [*minimised_lines(plan.fleet), *_fill(plan), *_others(plan.fleet), *_changes(plan)]


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


def _others(fleet: Fleet) -> Iterator[str]:
    why = fleet.sensitivity
    if why.single and fleet.cost > 0:
        saving = 1 - fleet.cost / why.single.cost
        yield f"best with one column per class: {_mix(why.single, fleet)}" + (
            f"; this fleet saves {saving:.1%} of that" if saving > 5e-4 else ": the same"
        )
    if why.runner_up:
        yield f"runner-up, without one of the columns chosen: {_mix(why.runner_up, fleet)}"
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


def _mix(mix: Mix, fleet: Fleet) -> str:
    parts = " and ".join(f"{count} × {name}" for name, count in mix.parts)
    return f"{parts} at {_usd(mix.cost)} {fleet.cost_unit}"


def _usd(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"
