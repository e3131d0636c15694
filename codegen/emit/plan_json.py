"""Plan -> plan.json: every level, schema-versioned."""

from __future__ import annotations

from moeplan.codegen.data import to_data, to_json
from moeplan.planner.ir.plan import Plan

PLAN_FORMAT = 1


def emit(plan: Plan) -> dict[str, str]:
    """Return plan.json. Policies stand with the replicas; columns refer to them by name."""
    return {"plan.json": to_json({"format": PLAN_FORMAT, **to_data(plan)})}
