"""The fleets that Mélange published: costs from allocations, savings against the best single type.

    python benchmarks/melange.py melange.json

The file holds Tables 3-8 of arXiv 2404.14527 (v4): 36 rows of a dataset, a latency target and a rate, each
with the mixed fleet and the four single-type fleets. Two printed costs do not follow from their counts:
misprints.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from tables import show

# USD/h of the paper's Table 1; H100 as it scales RunPod's price.
PRICES = {"L4": 0.70, "A10G": 1.01, "A100": 3.67, "H100": 7.516}
_CENT = 0.006


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One published comparison; `misprints` are single types whose printed cost is not count times price."""

    name: str
    printed: float
    recomputed: float
    best_single: float
    misprints: tuple[str, ...]

    @property
    def saving(self) -> float:
        """Against the best single type, as a share."""
        return max(0.0, 1.0 - self.recomputed / self.best_single)


def read_rows(path: Path) -> list[Row]:
    """The 36 rows, costs recomputed from the numbers of GPUs."""
    rows = []
    for row in json.loads(path.read_text(encoding="utf-8"))["tables3_8"]:
        single = {gpu: PRICES[gpu] * fleet["n"] for gpu, fleet in row["baselines"].items()}
        printed = {gpu: fleet["cost_usd_h"] for gpu, fleet in row["baselines"].items()}
        rows.append(
            Row(
                name=f"{row['dataset']} {row['tpot_slo_ms']} ms {row['rate_rps']}/s",
                printed=row["melange"]["cost_usd_h"],
                recomputed=sum(PRICES[gpu] * n for gpu, n in row["melange"]["alloc"].items()),
                best_single=min(single.values()),
                misprints=tuple(gpu for gpu in sorted(single) if abs(single[gpu] - printed[gpu]) > _CENT),
            )
        )
    return rows


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = read_rows(Path(sys.argv[1]))
    cells = [
        [r.name, f"{r.printed:.2f}", f"{r.recomputed:.2f}", f"{r.best_single:.2f}", f"{r.saving:.1%}",
         " ".join(r.misprints)]
        for r in rows
    ]  # fmt: skip
    show(["row", "printed USD/h", "recomputed", "best single type", "saving", "misprints"], cells)
    savings = [r.saving for r in rows]
    print(f"median saving {statistics.median(savings):.1%}, most {max(savings):.1%}, ", end="")
    print(f"none in {sum(s == 0 for s in savings)} of {len(rows)} rows")


if __name__ == "__main__":
    main()
