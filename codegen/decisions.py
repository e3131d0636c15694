"""Decision -> one line: what was chosen, what was not, and the figures of both."""

from __future__ import annotations

from moeplan.planner.ir.analysis import Decision
from moeplan.planner.units import format_duration, format_figure


def decision_text(decision: Decision) -> str:
    """`spot, not on-demand only (...): 5.10 USD/h, not 19.76 USD/h, 3.87 times as much`."""
    value, other = (amount_text(decision, amount) for amount in (decision.value, decision.other))
    much = "as slow" if decision.unit in ("tokens/s", "s per decode pass") else "as much"
    times = f"{format_figure(decision.times_worse)} times {much}"
    return f"{decision.chosen}, not {decision.alternative}: {value}, not {other}, {times}"


def amount_text(decision: Decision, amount: float) -> str:
    """One of its two figures with the unit."""
    if decision.unit == "s per decode pass":
        return f"{format_duration(amount)} a simulated pass"
    if decision.unit == "tokens/s":
        return f"{format_figure(amount)} tokens/s"
    return f"{amount:.2f} {decision.unit}"
