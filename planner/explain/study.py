"""One spec, solved again and again with settings; every answer is kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from moeplan.planner.diagnostics import InfeasibleError
from moeplan.planner.explain.case import Case, Source, decide, solve
from moeplan.planner.explain.outcomes import outcome_of
from moeplan.planner.ir.explanation import Outcome
from moeplan.planner.ir.fleet import Fleet
from moeplan.planner.ir.plan import Plan


class Study:
    """The plan of a spec and the fleets of its variations. `progress` is told what is being solved."""

    def __init__(
        self, source: Source, settings: tuple[str, ...] = (), progress: Callable[[str], None] | None = None
    ):
        self.source, self.settings = source, settings
        self.base = source.case(settings)
        self.solved = 0
        self.progress = progress or (lambda what: None)
        self._fleets: dict[tuple[str, ...], Fleet | InfeasibleError] = {}

    @cached_property
    def answer(self) -> Plan | InfeasibleError:
        """The whole plan, or why there is none."""
        self.progress(" ".join(self.settings) or "the spec as it is")
        return solve(self.base)

    @property
    def plan(self) -> Plan:
        """The plan. Raises InfeasibleError where there is none."""
        if isinstance(self.answer, InfeasibleError):
            raise self.answer
        return self.answer

    @property
    def fleet(self) -> Fleet:
        return self.plan.fleet

    def case(self, *settings: str) -> Case:
        return self.source.case((*self.settings, *settings))

    def decided(self, *settings: str) -> Fleet | InfeasibleError:
        """The fleet with `settings`. Raises CompileError where a setting is bad."""
        if settings not in self._fleets:
            self.progress(" ".join(settings))
            self._fleets[settings] = decide(self.case(*settings))
            self.solved += 1
        return self._fleets[settings]

    def outcome(self, *settings: str) -> Outcome:
        return outcome_of(self.decided(*settings))
