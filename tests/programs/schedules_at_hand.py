"""Schedules of all kinds and odd sizes, and the passes to issue them with."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from moeplan.planner import schedules
from moeplan.planner.ir.schedule import OffloadConstants, Schedule, StreamConstants

SIZES = OffloadConstants(
    layers=3,
    micro_batches=4,
    pieces=2,
    pages=4,
    slots=6,
    lead=1,
    disk_pages=1,
    cpu_attended=4,
    copied_up=0,
    decode_cpu_experts=0,
    prefill_cpu_experts=0,
    lookahead=0,
    wrap=0,
    interleave=0,
    across=0,
    barrier=0,
    lean=0,
)
STREAM = StreamConstants(
    layers=3, pages=5, resident=1, slots=3, places=0, guesses=0, lead=0, across=0, barrier=0, lean=0
)
ROUTED = STREAM._replace(places=3, guesses=2)


def every_offload(seed: int, count: int) -> list[Schedule]:
    """`count` of all combinations of sizes, placements and orders, drawn at random."""
    return random.Random(seed).sample([*_offloads()], count)


def _offloads() -> Iterator[Schedule]:
    for layers, n in itertools.product((1, 2, 3), (1, 2, 3, 5)):
        for pages, staged in ((0, False), (1, True), (n, False), (n, True), (n + 2, True)):
            for c in _placed(layers, n, pages, pages + 2 if staged else 0):
                yield from _ordered(c)


def _placed(layers: int, n: int, pages: int, slots: int) -> Iterator[OffloadConstants]:
    attention = {(n, 0), (0, n), (n // 2, n - n // 2), (n // 2, 0), (0, 0)}
    for (cpu, up), experts in itertools.product(sorted(attention), (0, 1)):
        yield SIZES._replace(
            layers=layers,
            micro_batches=n,
            pages=pages,
            slots=slots,
            disk_pages=int(slots > 0 and n > 1),
            cpu_attended=cpu,
            copied_up=up,
            decode_cpu_experts=experts,
            prefill_cpu_experts=int(experts and not pages),
        )


def _ordered(c: OffloadConstants) -> Iterator[Schedule]:
    aheads = range(min(4, c.micro_batches))
    for ahead, wrap, interleave in itertools.product(aheads, (0, 1), (0, 1)):
        for across, barrier, lean in itertools.product((0, 1, 2), (0, 1, 2), (0, 1)):
            yield Schedule(
                kind="offload",
                name="any",
                constants=c._replace(
                    lookahead=ahead,
                    lead=max(1, min(ahead, c.slots - 1)),
                    wrap=wrap,
                    interleave=interleave,
                    across=across,
                    barrier=barrier,
                    lean=lean,
                ),
            )


def every_stream() -> list[Schedule]:
    """All combinations of small sizes and orders."""
    return [
        Schedule(
            kind="stream",
            name="any",
            constants=StreamConstants(
                layers=layers,
                pages=pages,
                resident=resident,
                slots=slots,
                places=places,
                guesses=guesses,
                lead=lead,
                across=across,
                barrier=barrier,
                lean=lean,
            ),
        )
        for layers, pages, resident in ((1, 1, 0), (2, 3, 1), (3, 4, 0), (2, 4, 2), (2, 3, 3))
        for slots in ((1, 2, 5) if resident < pages else (0,))
        for places, guesses in _places(pages, resident, slots)
        for lead in sorted({0, max(0, slots - 1)})
        for across, barrier, lean in itertools.product((0, 1), (0, 1, 2), (0, 1))
    ]


def _places(pages: int, resident: int, slots: int) -> list[tuple[int, int]]:
    """Places and guesses: none, one, as many as there are pages of experts that move."""
    most = pages - max(1, resident)
    free = slots - (resident == 0)  # beside the page of attention
    return sorted(
        {(0, 0)} | {(p, g) for p in (1, most) for g in (0, 1, p) if p <= most and g <= min(p, free)}
    )


def every_named() -> list[Schedule]:
    """The schedules that have names."""
    return [
        *(schedules.named(SIZES, name) for name in schedules.OFFLOAD),
        *(schedules.named(sizes, name) for sizes in (STREAM, ROUTED) for name in schedules.STREAM),
    ]
