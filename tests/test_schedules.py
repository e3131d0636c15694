"""Rewrites: each changes what it says, leaves the work alone, and keeps the schedule free of races."""

from __future__ import annotations

import pytest

from moeplan.planner import programs, schedules
from moeplan.planner.ir.schedule import OffloadConstants, Schedule, StreamConstants
from moeplan.planner.programs.proof import first_offence, neighbours

SIZES = OffloadConstants(
    layers=2,
    micro_batches=3,
    pieces=2,
    pages=3,
    slots=5,
    lead=1,
    disk_pages=0,
    cpu_attended=2,
    copied_up=1,
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
    layers=2, pages=3, resident=1, slots=2, places=0, guesses=0, lead=0, across=0, barrier=0, lean=0
)
OFFLOAD_REWRITES = (
    schedules.overlap_lanes,
    schedules.drop_barriers,
    schedules.interleave_pages,
    schedules.look_ahead,
    schedules.wrap_layers,
    schedules.prefetch_next_step,
    schedules.begin_next_step,
    schedules.attend_on_gpu,
    schedules.merge_pages,
    schedules.stage_further,
    schedules.drop_redundant_waits,
)


@pytest.mark.parametrize("start", sorted(schedules.OFFLOAD))
@pytest.mark.parametrize("rewrite", OFFLOAD_REWRITES, ids=lambda r: r.__name__)
def test_each_rewrite_keeps_the_promise(rewrite: schedules.Rewrite, start: str) -> None:
    """Applied to any schedule that has a name."""
    after = rewrite(schedules.named(SIZES, start))
    assert first_offence(after, programs.issue(after, neighbours(after))) is None


def ordering(schedule: Schedule) -> dict[str, int]:
    keys = ("lookahead", "wrap", "interleave", "across", "barrier")
    return {key: getattr(schedule.constants, key) for key in keys}


def test_what_the_names_mean() -> None:
    """MoE-Lightning, Figure 6: S2 moves whole layers, S3 has no overlap of CPU and GPU, S4 attends on the
    GPU."""
    named = {name: schedules.named(SIZES, name) for name in schedules.OFFLOAD}
    cgopipe = {"lookahead": 2, "wrap": 1, "interleave": 1, "across": 1, "barrier": 0}
    s4, s3, s2 = named["S4 (FlexGen)"], named["S3 (FlexGen, CPU attention)"], named["S2 (whole layers)"]
    assert ordering(named["CGOPipe"]) == cgopipe
    assert ordering(s2) == {**cgopipe, "interleave": 0}
    assert ordering(s3) == {"lookahead": 0, "wrap": 0, "interleave": 0, "across": 1, "barrier": 1}
    assert ordering(s4) == {"lookahead": 1, "wrap": 1, "interleave": 0, "across": 1, "barrier": 1}
    attention = {(s.constants.cpu_attended, s.constants.copied_up) for s in (s2, s3)}  # type: ignore[union-attr]
    assert attention == {(2, 1)}
    assert (s4.constants.cpu_attended, s4.constants.copied_up) == (0, 3)  # type: ignore[union-attr]
    assert ordering(named["sequential"])["barrier"] == 2


def test_merged_pages_fit_the_ring() -> None:
    """Half as many pages of twice the size take no more pinned memory than before."""
    after = schedules.merge_pages(schedules.named(SIZES, "CGOPipe")).constants
    assert isinstance(after, OffloadConstants)
    assert (after.pages, after.slots) == (2, 3)
    assert after.slots / after.pages <= SIZES.slots / SIZES.pages
    from_disk = schedules.merge_pages(
        schedules.named(SIZES._replace(pages=5, disk_pages=2), "CGOPipe")
    ).constants
    assert isinstance(from_disk, OffloadConstants)
    assert (from_disk.pages, from_disk.disk_pages) == (3, 2)  # two thirds hold two fifths
    assert schedules.merge_pages(schedules.named(SIZES._replace(pages=1), "CGOPipe")).constants.pages == 1


def test_look_ahead_ends_at_the_last_micro_batch() -> None:
    schedule = schedules.named(SIZES, "CGOPipe")
    assert schedules.look_ahead(schedule).constants == schedule.constants
    alone = schedules.named(SIZES._replace(micro_batches=1, cpu_attended=1, copied_up=0), "CGOPipe")
    assert ordering(alone)["lookahead"] == 0


def test_streamed_schedules() -> None:
    named = {name: schedules.named(STREAM, name).constants for name in schedules.STREAM}
    assert named["paged"] == STREAM._replace(lead=1, across=1, lean=1)
    assert named["layer by layer"] == STREAM._replace(across=1, barrier=1, lean=1)
    assert named["sequential"] == STREAM._replace(barrier=2, lean=1)
