"""Emitters: each maps a Plan to {path: text} and decides nothing."""

from __future__ import annotations

from collections.abc import Callable

from moeplan.codegen.emit import chart, plan_json, report, routing, runtime, skypilot
from moeplan.planner.ir.plan import Plan

EMITTERS: tuple[Callable[[Plan], dict[str, str]], ...] = (
    plan_json.emit,
    report.emit,
    routing.emit,
    runtime.emit,
    chart.emit,
    skypilot.emit,
)


def emit_all(plan: Plan) -> dict[str, str]:
    """Every generated file but the lock, by its path under the plan folder."""
    files: dict[str, str] = {}
    for emitter in EMITTERS:
        made = emitter(plan)
        clash = files.keys() & made.keys()
        if clash:
            raise ValueError(f"two emitters write {sorted(clash)}")
        files.update(made)
    return dict(sorted(files.items()))
