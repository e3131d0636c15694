"""The generator of common shocks: what it was not fitted to comes out right as well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from spot_data import REGIONS, needs_data, published

from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.spot import ZoneName
from moeplan.planner.placing.shocks import Shocks, ZoneRates, fit_shocks, generate, joint_down
from moeplan.planner.spot_traces import read_spot_trace, write_spot_trace


def zones(*shares: float, depth: int = 1) -> tuple[ZoneRates, ...]:
    return tuple(
        ZoneRates(
            name=ZoneName(
                cloud="aws", region=f"us-east-{1 + n // 2}", zone=f"us-east-{1 + n // 2}{'ab'[n % 2]}"
            ),
            down_share=share,
            down_spell_s=7200.0,
            depth=depth,
            loses_all=0.5,
        )
        for n, share in enumerate(shares)
    )


SHOCKS = Shocks(zones=zones(0.2, 0.3, 0.4, 0.1), within=0.6, across=0.3)


@needs_data
def test_joint_outage_of_aws3() -> None:
    """Fitted to how often pairs of zones are down, all nine are down together within a factor of two of what
    was measured; independence is off by two orders of magnitude."""
    trace = published("aws3_first_half")
    down = trace.capacity == 0
    measured = float(down.all(axis=1).mean())
    predicted = joint_down(fit_shocks(trace))
    assert measured / 2 < predicted < measured * 2
    assert float(down.mean(axis=0).prod()) < measured / 100
    made = generate(fit_shocks(trace), 60_000, trace.step_s, seed=1)
    assert measured / 2 < float((made.capacity == 0).all(axis=1).mean()) < measured * 2


def test_zones_are_down_as_often_and_as_long_as_told() -> None:
    made = generate(SHOCKS, 150_000, 600.0, seed=7)
    down = made.capacity == 0
    for n, rates in enumerate(SHOCKS.zones):
        assert down[:, n].mean() == pytest.approx(rates.down_share, abs=0.03)
        spells = (down[1:, n] & ~down[:-1, n]).sum()
        assert down[:, n].sum() / spells * 600.0 == pytest.approx(rates.down_spell_s, rel=0.4)


def test_joint_outages_are_as_the_quadrature_says() -> None:
    made = generate(SHOCKS, 400_000, 600.0, seed=7)
    joint = float((made.capacity == 0).all(axis=1).mean())
    assert joint == pytest.approx(joint_down(SHOCKS), rel=0.2)
    assert joint_down(Shocks(zones=SHOCKS.zones, within=0.0, across=0.0)) == pytest.approx(
        0.2 * 0.3 * 0.4 * 0.1, rel=1e-3
    )


def test_fit_recovers_the_correlations() -> None:
    fitted = fit_shocks(generate(SHOCKS, 300_000, 600.0, seed=3))
    assert fitted.within == pytest.approx(0.6, abs=0.08)
    assert fitted.across == pytest.approx(0.3, abs=0.08)


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    one = generate(Shocks(zones=zones(0.2, 0.3, depth=4), within=0.6, across=0.3), 2000, 600.0, seed=5)
    again = generate(Shocks(zones=zones(0.2, 0.3, depth=4), within=0.6, across=0.3), 2000, 600.0, seed=5)
    assert np.array_equal(one.capacity, again.capacity)
    assert not np.array_equal(one.capacity, generate(SHOCKS, 2000, 600.0, seed=6).capacity[:, :2])
    path = tmp_path / "trace.csv"
    path.write_text(write_spot_trace(one))
    back = read_spot_trace(path, Span("spec.yaml"), REGIONS)
    assert np.array_equal(back.capacity, one.capacity)
    assert (back.zones, back.step_s, back.source) == (one.zones, one.step_s, one.source)


def test_some_losses_leave_machines() -> None:
    made = generate(Shocks(zones=zones(0.2, depth=4), within=0.0, across=0.0), 50_000, 600.0, seed=5)
    column = made.capacity[:, 0]
    losses = np.flatnonzero(column[1:] < column[:-1]) + 1
    assert 0.3 < float((column[losses] == 0).mean()) < 0.8
