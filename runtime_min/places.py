"""Which pages of experts a routed decode pass reads, and where they lie.

Pages are numbered within their layer; 0 stands for none, as page 0 holds no experts. Places are numbered
from 1, those of guesses first, and each is a slot of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from moeplan.runtime_min.layers import Routing
from moeplan.runtime_min.plan_file import RuntimePlan


@dataclass(slots=True)
class Counts:
    """Pages so far: those that moved and were hit, those read on a guess, and the guesses that were hit."""

    hit: int = 0
    guessed: int = 0
    right: int = 0


@dataclass(slots=True)
class Places:
    """The places of the layer at hand, and the guesses for it and for the layer that follows."""

    plan: RuntimePlan
    pages: list[int] = field(default_factory=list)  # by place, those that are hit
    counts: Counts = field(default_factory=Counts)
    _likely: list[list[int]] = field(default_factory=lambda: [[], []])  # for even and odd layers

    def expect(self, layer: int, weights: Tensor, experts: Tensor) -> None:
        """Guess the pages of `layer` from what its router says early: weights and experts [T, K]."""
        score: dict[int, float] = {}
        for e, weight in zip(experts.flatten().tolist(), weights.flatten().tolist(), strict=True):
            page = self._page_of(e)
            score[page] = score.get(page, 0.0) + weight
        moving = (page for page in score if page >= self.plan.pages.resident_pages)
        ranked = sorted(moving, key=lambda page: (-score[page], page))
        self._likely[layer % 2] = ranked[: self.plan.pages.guesses]

    def place(self, layer: int, routing: Routing) -> None:
        """Find the pages that `routing` hits: right guesses where they were read, the others in order."""
        wanted, likely = self._hit_pages(routing.starts), self._likely[layer % 2]
        guessed = [page if page in wanted else 0 for page in likely]
        rest = sorted(wanted - set(likely))
        plan = self.plan.pages
        self.pages = [*_padded(guessed, plan.guesses), *_padded(rest, plan.places)]
        self.counts.hit += len(wanted)
        self.counts.guessed += len(likely)
        self.counts.right += len(wanted) - len(rest)

    def guess(self, layer: int, place: int) -> int:
        """The page to be read for `place` before `layer` is routed."""
        likely = self._likely[layer % 2]
        return likely[place - 1] if place <= len(likely) else 0

    def _hit_pages(self, starts: Sequence[int]) -> set[int]:
        experts = range(len(starts) - 1)
        pages = {self._page_of(e) for e in experts if starts[e] < starts[e + 1]}
        return {page for page in pages if page >= self.plan.pages.resident_pages}

    def _page_of(self, e: int) -> int:
        return 1 + e // self.plan.pages.experts_per_page


def _padded(pages: list[int], places: int) -> list[int]:
    return pages + [0] * (places - len(pages))
