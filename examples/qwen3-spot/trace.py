"""Makes spot.csv: three weeks of five zones with common shocks. Synthetic: no zone was ever probed for it.

usage: python examples/qwen3-spot/trace.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moeplan.planner.ir.spot import ZoneName
from moeplan.planner.placing.shocks import Shocks, ZoneRates, generate
from moeplan.planner.spot_traces import write_spot_trace

# Zone: share of time without a machine, hours that such a time lasts, machines while there are any.
ZONES = {
    "us-central1-a": (0.10, 1.0, 8),
    "us-central1-b": (0.15, 1.5, 8),
    "us-east4-a": (0.20, 2.0, 6),
    "us-west1-a": (0.35, 3.0, 4),
    "europe-west4-b": (0.08, 2.0, 8),
}
STEP_S, DAYS, SEED = 900.0, 21, 11


def main() -> None:
    rates = tuple(
        ZoneRates(
            name=ZoneName(cloud="gcp", region=zone[:-2], zone=zone),
            down_share=share,
            down_spell_s=3600.0 * hours,
            depth=depth,
            loses_all=0.6,
        )
        for zone, (share, hours, depth) in ZONES.items()
    )
    shocks = Shocks(zones=rates, within=0.6, across=0.25)
    made = generate(shocks, round(DAYS * 86400 / STEP_S), STEP_S, SEED)
    Path(__file__).with_name("spot.csv").write_text(write_spot_trace(replace(made, instance="L4")))


if __name__ == "__main__":
    main()
