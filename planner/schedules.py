"""Schedules as rewrites of each other: from one task after another to CGOPipe, and beyond it.

A rewrite takes a schedule and returns a better one of the same work. What each is worth on a given machine
the simulator says; that the result is free of races the verifier proves.
Source: MoE-Lightning (ASPLOS'25), Figure 6 (S2, S3, S4) and Algorithm 1; FlexGen (ICML'23), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

from moeplan.planner.ir.schedule import OffloadConstants, Schedule, StreamConstants

Rewrite = Callable[[Schedule], Schedule]

_LOOKAHEAD = 2  # MoE-Lightning, Algorithm 1
_BATCH, _TASK = 1, 2  # barriers
_PAGES, _ATTENTION = 1, 2  # what goes on across steps


def sequential(constants: OffloadConstants | StreamConstants) -> Schedule:
    """One task after another: the start of all rewriting."""
    if isinstance(constants, StreamConstants):
        one_by_one = constants._replace(lead=0, across=0, barrier=_TASK, lean=0)
        return Schedule(kind="stream", name="sequential", constants=one_by_one)
    plain = constants._replace(lookahead=0, lead=1, wrap=0, interleave=0, across=0, barrier=_TASK, lean=0)
    return Schedule(kind="offload", name="sequential", constants=plain)


# Rewrites


def overlap_lanes(s: Schedule) -> Schedule:
    """Lanes meet after each micro-batch of a layer only, as FlexGen's do; without a GPU, after each layer."""
    return _with(s, barrier=_BATCH)


def drop_barriers(s: Schedule) -> Schedule:
    """Lanes wait for what they need and for nothing else."""
    return _with(s, barrier=0)


def interleave_pages(s: Schedule) -> Schedule:
    """A layer's weights come in pages between the micro-batches' hidden states, not before them."""
    return _with(s, interleave=1)


def look_ahead(s: Schedule) -> Schedule:
    """Attention of one micro-batch more runs ahead of the experts, and as many pages are staged ahead."""
    at = _offload(s)
    ahead = max(0, min(at.lookahead + 1, at.micro_batches - 1))
    return _with(s, lookahead=ahead, lead=max(at.lead, min(ahead, at.slots - 1)))


def wrap_layers(s: Schedule) -> Schedule:
    """Attention runs ahead into the next layer."""
    return _with(s, wrap=1)


def prefetch_next_step(s: Schedule) -> Schedule:
    """The next step's first pages are moved during this one: no bubble at the LM head."""
    return _with(s, across=max(s.constants.across, _PAGES))


def begin_next_step(s: Schedule) -> Schedule:
    """Attention runs ahead into the next step: a micro-batch's token is chosen as soon as its layers are
    done."""
    return _with(s, across=_ATTENTION)


def attend_on_gpu(s: Schedule) -> Schedule:
    """All attention on the GPU, over a cache copied up: where FlexGen computes it."""
    at = _offload(s)
    return _with(s, copied_up=at.cpu_attended + at.copied_up, cpu_attended=0)


def merge_pages(s: Schedule) -> Schedule:
    """Half as many pages, twice as large: fewer, longer copies. The pinned ring grows no larger."""
    at = _offload(s)
    if at.pages < 2 or 0 < at.slots < 3:
        return s
    pages = -(-at.pages // 2)
    slots = at.slots * pages // at.pages
    disk_pages = -(-at.disk_pages * pages // at.pages)  # at least the same share
    return _with(s, pages=pages, disk_pages=disk_pages, slots=slots, lead=max(1, min(at.lead, slots - 1)))


def stage_further(s: Schedule) -> Schedule:
    """Pages are staged as far ahead as the pinned ring has slots."""
    return _with(s, lead=max(1, s.constants.slots - 1))


def read_ahead(s: Schedule) -> Schedule:
    """Reading of pages is issued as early as their slots allow."""
    return _with(s, lead=max(0, s.constants.slots - 1))


def drop_redundant_waits(s: Schedule) -> Schedule:
    """Without the waits that follow from others and from the lanes' own order."""
    return _with(s, lean=1)


def _with(s: Schedule, **changes: int) -> Schedule:
    constants: Any = s.constants._replace(**changes)
    return replace(s, constants=constants)


def _offload(s: Schedule) -> OffloadConstants:
    assert isinstance(s.constants, OffloadConstants)
    return s.constants


# Schedules by name: the rewrites that make each from the sequential one

_FLEXGEN: tuple[Rewrite, ...] = (overlap_lanes, prefetch_next_step)
_FASTDECODE: tuple[Rewrite, ...] = (
    drop_barriers,
    *[look_ahead] * _LOOKAHEAD,
    wrap_layers,
    prefetch_next_step,
)
OFFLOAD: dict[str, tuple[Rewrite, ...]] = {
    "sequential": (),
    "S4 (FlexGen)": (*_FLEXGEN, attend_on_gpu, look_ahead, wrap_layers),
    "S3 (FlexGen, CPU attention)": _FLEXGEN,
    "S2 (whole layers)": _FASTDECODE,
    "CGOPipe": (*_FASTDECODE, interleave_pages),
}
STREAM: dict[str, tuple[Rewrite, ...]] = {
    "sequential": (),
    "layer by layer": (overlap_lanes, prefetch_next_step),
    "paged": (drop_barriers, read_ahead, prefetch_next_step),
}


def named(constants: OffloadConstants | StreamConstants, name: str) -> Schedule:
    """The schedule called `name` in OFFLOAD or STREAM, for these sizes."""
    rewrites = (STREAM if isinstance(constants, StreamConstants) else OFFLOAD)[name]
    made = reduce(lambda s, rewrite: rewrite(s), rewrites, sequential(constants))
    return replace(drop_redundant_waits(made), name=name)
