"""Spec -> Explanation: the plan, what else could have been chosen, what binds and what would change it."""

from __future__ import annotations

from moeplan.planner.explain.batches import batch_points
from moeplan.planner.explain.outcomes import outcome_of
from moeplan.planner.explain.questions import limits, questions
from moeplan.planner.explain.sensitivity import flips
from moeplan.planner.explain.study import Study
from moeplan.planner.ir.explanation import Batches, Explanation
from moeplan.planner.ir.plan import Plan


def explain(study: Study) -> Explanation:
    """Return the explanation of a study's plan. Raises InfeasibleError where there is no plan to explain."""
    plan = study.plan
    asked, binding, changes = questions(study), limits(study), flips(study)
    return Explanation(
        name=plan.spec.name,
        outcome=outcome_of(plan.fleet),
        bottlenecks=tuple((replica.name, str(replica.policy.bottleneck)) for replica in plan.replicas),
        questions=asked,
        batches=_batches(plan),
        limits=binding,
        flips=changes,
        solved=study.solved,
    )


def _batches(plan: Plan) -> tuple[Batches, ...]:
    """Each replica with a quarter, a half, twice and four times as many in flight."""
    found = []
    for replica in plan.replicas:
        n = replica.policy.sequences
        sizes = sorted({max(1, n // 4), max(1, n // 2), n, 2 * n, 4 * n})
        points = batch_points(plan.workload, replica, sizes)
        found.append(Batches(replica=replica.name, chosen=n, points=points))
    return tuple(found)
