"""Why a plan is as it is: what other choices would have come to, what binds, what would change it."""

from __future__ import annotations

from dataclasses import dataclass

from moeplan.planner.ir.analysis import BatchPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a spec compiles to in one line, or `refusal`: why it does not, all else then 0 or empty.

    `usd` and `hours` are of the batch work, `tokens_per_s` what all replicas generate when full.
    """

    fleet: str
    usd_per_hour: float
    usd: float
    hours: float
    tokens_per_s: float
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """Another choice, the setting that forces it, and what it comes to; `chosen` where it is the plan."""

    name: str
    setting: str
    outcome: Outcome
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A decision and everything that was to choose from."""

    text: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """A replica with fewer and more sequences in flight than the `chosen`."""

    replica: str
    chosen: int
    points: tuple[BatchPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """The smallest change of one input that was found to change the decision, in per cent of the input.

    Solved at `unchanged_percent` and at `percent`: the plan changes between the two. `percent` is None where
    it is the same up to `unchanged_percent`.
    """

    what: str
    key: str
    unchanged_percent: float
    percent: float | None
    outcome: Outcome | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """All of it. `solved` counts the fleets that were chosen anew for it."""

    name: str
    outcome: Outcome
    bottlenecks: tuple[tuple[str, str], ...]
    questions: tuple[Question, ...]
    batches: tuple[Batches, ...]
    limits: Question
    flips: tuple[Flip, ...]
    solved: int
