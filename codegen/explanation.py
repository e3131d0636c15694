"""Explanation -> the text that `moeplan explain` prints, and the same as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moeplan.codegen import plan_diff
from moeplan.codegen.data import to_data
from moeplan.codegen.emit import plan_json
from moeplan.planner.ir.explanation import Batches, Explanation, Flip, Option, Outcome
from moeplan.planner.ir.plan import Plan
from moeplan.planner.units import format_duration, format_figure

_WIDEST = 64  # letters in a cell
_EXCLUDED = {
    "SLO": "breaks the SLO",
    "memory": "does not fit",
    "requests": "more than there are requests",
    "": "possible",
}


def explanation_text(found: Explanation) -> str:
    """Everything, in the order in which one would ask."""
    lines = [f"{found.name}: {found.outcome.fleet}, {_figures(found.outcome)}"]
    lines += [f"  bottleneck of {name}: {bound}" for name, bound in found.bottlenecks]
    for question in found.questions:
        lines += [
            "",
            f"{question.text}: each alone, solved again",
            *_options(question.options, found.outcome),
        ]
    for batches in found.batches:
        lines += ["", *_batch_lines(batches)]
    if found.limits.options:
        lines += [
            "",
            "what binds: each limit lifted by itself",
            *_options(found.limits.options, found.outcome),
        ]
    lines += ["", "sensitivity: the smallest change of each input that was found to change the plan"]
    lines += aligned([_flip_cells(flip, found.outcome) for flip in found.flips])
    lines += [
        "",
        f"{found.solved} fleets solved; try one with --what-if 'KEY=+10%', a machine with --why-not",
    ]
    return "\n".join(lines) + "\n"


def explanation_data(found: Explanation) -> dict[str, Any]:
    """The same for machines, in base units."""
    return dict(to_data(found))


def _figures(outcome: Outcome) -> str:
    """What an outcome costs, or on one's own machine how fast it is."""
    if outcome.refusal:
        return f"none: {outcome.refusal}"
    if outcome.usd:
        return f"{outcome.usd:.2f} USD in all, {format_duration(outcome.hours * 3600)}"
    if outcome.usd_per_hour:
        return f"{outcome.usd_per_hour:.2f} USD/h"
    return f"{format_figure(outcome.tokens_per_s)} tokens/s generated"


def _options(options: Sequence[Option], chosen: Outcome) -> list[str]:
    return aligned(
        [
            (option.name, _figures(option.outcome), _against(option, chosen), option.outcome.fleet)
            for option in options
        ]
    )


def _against(option: Option, chosen: Outcome) -> str:
    """How many times the plan's cost, or its speed where nothing is paid."""
    if option.chosen:
        return "chosen"
    for value, base in _comparable(option.outcome, chosen):
        if value and base:
            return "the same" if value == base else f"{value / base:.3g} times"
    return ""


def _comparable(outcome: Outcome, chosen: Outcome) -> Iterator[tuple[float, float]]:
    yield outcome.usd, chosen.usd
    yield outcome.usd_per_hour, chosen.usd_per_hour
    yield outcome.tokens_per_s, chosen.tokens_per_s


def _batch_lines(batches: Batches) -> list[str]:
    """Each batch with what it reaches and why it was not taken."""
    rows = [
        (
            f"{point.batch}",
            f"{format_figure(point.tokens_per_s)} tokens/s",
            f"TTFT {format_duration(point.ttft_s)}",
            f"ITL {format_duration(point.itl_s)}",
            "chosen" if point.batch == batches.chosen else _EXCLUDED[point.excluded],
        )
        for point in batches.points
    ]
    return [f"why {batches.chosen} in flight on each copy of {batches.replica}", *aligned(rows)]


def _flip_cells(flip: Flip, chosen: Outcome) -> tuple[str, ...]:
    """Input, change, what the plan becomes (only what is new of it) and reaches; or that it stays."""
    if flip.outcome is None or flip.percent is None:
        return flip.what, f"{flip.unchanged_percent:+g} %", "the same plan", ""
    before = chosen.fleet.split(", ")
    new = [part for part in flip.outcome.fleet.split(", ") if part not in before]
    return flip.what, f"{flip.percent:+g} %", ", ".join(new) or "no plan", _figures(flip.outcome)


def aligned(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows of cells as lines of columns; long cells end in an ellipsis."""
    if not rows:
        return []
    rows = [[cell if len(cell) <= _WIDEST else cell[: _WIDEST - 1] + "…" for cell in row] for row in rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


# One other plan


def comparison(what: str, settings: Sequence[str], before: Plan | Exception, after: Plan | Exception) -> str:
    """How `settings` change the plan: `before` and `after` are plans, or say why there is none."""
    title = f"{what}: {', '.join(settings)}"
    if not isinstance(after, Plan):
        return f"{title}\nno plan\n{after}\n"
    if not isinstance(before, Plan):
        return f"{title}\na plan where there was none\n{before}\n"
    difference = plan_diff.compare(_data(before), _data(after))
    if not difference.changes:
        return f"{title}\nthe same plan\n"
    rows = [(c.part, c.what, *plan_diff.both(c), plan_diff.percent(c)) for c in difference.changes]
    heading = ("", "", "as it is", "then", "")
    return "\n".join([title, plan_diff.headline(difference), *aligned([heading, *rows])]) + "\n"


def comparison_data(
    what: str, settings: Sequence[str], before: Plan | Exception, after: Plan | Exception
) -> dict[str, Any]:
    """The same for machines; `refusals` where there is no plan."""
    found: dict[str, Any] = {"what": what, "settings": list(settings)}
    if isinstance(before, Plan) and isinstance(after, Plan):
        return {**found, **plan_diff.as_data(plan_diff.compare(_data(before), _data(after)))}
    answers = {"before": before, "after": after}
    return {**found, "refusals": {k: "" if isinstance(v, Plan) else str(v) for k, v in answers.items()}}


def _data(plan: Plan) -> plan_diff.Plan:
    """What plan.json would hold."""
    return {"format": plan_json.PLAN_FORMAT, **to_data(plan)}
