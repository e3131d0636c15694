"""What bounds a pass and what comes next, for lanes that overlap and for parts that add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import ONLINE, batch_spec
from hypothesis import given
from hypothesis import strategies as st

from moeplan.codegen.emit import emit_all
from moeplan.planner.ir.plan import Plan
from moeplan.planner.ir.policy import LaneTime, PassTime

SECONDS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6)


def pass_time(seconds: list[float], overlap: bool, serial_s: float = 0.0) -> PassTime:
    lanes = tuple(LaneTime(lane=f"l{n}", seconds=s) for n, s in enumerate(seconds))
    return PassTime(lanes=lanes, serial_s=serial_s, overlap=overlap)


@pytest.mark.parametrize(
    ("seconds", "overlap", "text"),
    [
        ([1.0, 3.0, 1.5], True, "decode: l1; next l2 at 50%"),
        ([1.0, 3.0, 1.0], False, "decode: l1, 60% of the time; next l0, 20%"),
        ([2.0], True, "decode: l0"),
        ([2.0], False, "decode: l0, 100% of the time"),
        ([2.0, 0.0], True, "decode: l0"),
        ([2.0, 2.0], True, "decode: l0; next l1 at 100%"),
    ],
)
def test_in_words(seconds: list[float], overlap: bool, text: str) -> None:
    assert str(pass_time(seconds, overlap).bottleneck("decode")) == text


@given(SECONDS)
def test_taking_the_bound_away_shows_the_next(seconds: list[float]) -> None:
    """Overlapping: without the bound the next lane's time remains; adding: the pass shrinks by its share."""
    for overlap in (True, False):
        whole = pass_time(seconds, overlap)
        found = whole.bottleneck("decode")
        rest = [s for n, s in enumerate(seconds) if f"l{n}" != found.lane]
        left = pass_time(rest or [0.0], overlap).seconds / whole.seconds
        assert left == pytest.approx(found.next_share if overlap else 1.0 - found.share, abs=1e-9)


@given(SECONDS, st.floats(0, 100))
def test_lanes_that_overlap_are_never_slower(seconds: list[float], serial_s: float) -> None:
    assert pass_time(seconds, True, serial_s).seconds <= pass_time(seconds, False, serial_s).seconds * (
        1 + 1e-12
    )


@pytest.mark.parametrize(
    ("text", "overlap"),
    [
        (ONLINE.replace("8/s", "1/s") + "machine: a2-ultragpu-1g\n", False),
        (batch_spec("g4dn.16xlarge"), True),
    ],
)
def test_every_replica_tells_it(compile_text: Callable[[str], Plan], text: str, overlap: bool) -> None:
    """vLLM's steps are a sum of parts, the bundled runtime's lanes overlap; both reports name two of them."""
    plan = compile_text(text)
    policy = plan.replicas[0].policy
    assert policy.decode.overlap is overlap
    assert policy.bottleneck.next_lane
    files = emit_all(plan)
    assert f"Bottleneck: {policy.bottleneck}." in files["report.md"]
    assert f'"next_lane": "{policy.bottleneck.next_lane}"' in files["plan.json"]
