"""The text of an explanation: aligned, complete, and of a flip only what is new."""

from __future__ import annotations

from moeplan.codegen.explanation import aligned, explanation_text
from moeplan.planner.ir.analysis import BatchPoint
from moeplan.planner.ir.explanation import Batches, Explanation, Flip, Option, Outcome, Question


def outcome(fleet: str, usd_per_hour: float = 0.0, tokens_per_s: float = 0.0, refusal: str = "") -> Outcome:
    return Outcome(
        fleet=fleet, usd_per_hour=usd_per_hour, usd=0.0, hours=0.0, tokens_per_s=tokens_per_s, refusal=refusal
    )


CHOSEN = outcome("1 × box, weights on dram, bound by gpu in decode", tokens_per_s=100.0)
FOUND = Explanation(
    name="job",
    outcome=CHOSEN,
    bottlenecks=(("batch-box", "decode: gpu"),),
    questions=(
        Question(
            text="why this GPU",
            options=(
                Option(name="T4", setting="market.gpus=[T4]", outcome=CHOSEN, chosen=True),
                Option(
                    name="L4",
                    setting="market.gpus=[L4]",
                    outcome=outcome("2 × l4", tokens_per_s=250.0),
                    chosen=False,
                ),
                Option(name="V100", setting="", outcome=outcome("", refusal="needs 60 GiB"), chosen=False),
            ),
        ),
    ),
    batches=(
        Batches(
            replica="batch-box",
            chosen=8,
            points=(
                BatchPoint(batch=8, tokens_per_s=100.0, ttft_s=1.0, itl_s=0.1, excluded=""),
                BatchPoint(batch=16, tokens_per_s=150.0, ttft_s=2.0, itl_s=0.2, excluded="SLO"),
            ),
        ),
    ),
    limits=Question(text="what binds", options=()),
    flips=(
        Flip(
            what="link bandwidth",
            key="link_bandwidth",
            unchanged_percent=-10.0,
            percent=-12.5,
            outcome=outcome("1 × box, weights on dram, bound by h2d in decode", tokens_per_s=90.0),
        ),
        Flip(what="memory", key="m", unchanged_percent=50.0, percent=None, outcome=None),
        Flip(
            what="rate", key="r", unchanged_percent=0.0, percent=10.0, outcome=outcome("", refusal="too much")
        ),
    ),
    solved=7,
)


def test_everything_is_told() -> None:
    assert explanation_text(FOUND).splitlines() == [
        "job: 1 × box, weights on dram, bound by gpu in decode, 100 tokens/s generated",
        "  bottleneck of batch-box: decode: gpu",
        "",
        "why this GPU: each alone, solved again",
        "  T4    100 tokens/s generated  chosen     1 × box, weights on dram, bound by gpu in decode",
        "  L4    250 tokens/s generated  2.5 times  2 × l4",
        "  V100  none: needs 60 GiB",
        "",
        "why 8 in flight on each copy of batch-box",
        "  8   100 tokens/s  TTFT 1 s  ITL 100 ms  chosen",
        "  16  150 tokens/s  TTFT 2 s  ITL 200 ms  breaks the SLO",
        "",
        "sensitivity: the smallest change of each input that was found to change the plan",
        "  link bandwidth  -12.5 %  bound by h2d in decode  90 tokens/s generated",
        "  memory          +50 %    the same plan",
        "  rate            +10 %    no plan                 none: too much",
        "",
        "7 fleets solved; try one with --what-if 'KEY=+10%', a machine with --why-not",
    ]


def test_columns_stay_narrow() -> None:
    (line,) = aligned([["a" * 100, "b"]])
    assert line == "  " + "a" * 63 + "…" + "  b"
    assert aligned([]) == []
