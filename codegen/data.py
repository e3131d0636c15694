"""Records as plain data for JSON: the same bytes for the same record, on any machine."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from moeplan.planner.ir.estimate import Estimate

# Fields that other fields repeat, or that depend on where the spec lies.
_LEFT_OUT = {("Spec", "spans"), ("Spec", "path"), ("Column", "policy"), ("Roofline", "machine")}
_LEFT_OUT |= {("Inputs", "unrunnable")}  # a function
_LEFT_OUT |= {("SpotTrace", "capacity")}  # an input, whose digest is in the lock
_LEFT_OUT |= {("Pipeline", "window")}  # drawn, see codegen/emit/chart.py
_SIGNIFICANT_DIGITS = 6


def to_data(value: Any) -> Any:
    """Records to dictionaries, tuples to lists; floats rounded once, infinities as null."""
    if isinstance(value, Estimate):
        fields = {"value": value.value, "low": value.low, "high": value.high, "provenance": value.provenance}
        return {name: to_data(field) for name, field in fields.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        names = [f.name for f in dataclasses.fields(value) if (kind, f.name) not in _LEFT_OUT]
        return {name: to_data(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): to_data(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_data(item) for item in value]
    if isinstance(value, float):
        return rounded(value)
    return value


def rounded(value: float) -> float | None:
    """Six significant digits: solvers and libraries differ in the last ones."""
    return float(format(value, f".{_SIGNIFICANT_DIGITS}g")) if math.isfinite(value) else None


def to_json(data: Any) -> str:
    """Sorted, indented, one trailing newline."""
    return json.dumps(to_data(data), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
