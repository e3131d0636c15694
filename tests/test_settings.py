"""Edits of a spec by dotted key: the same spec as if its text said so, messages that name the option."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import ONLINE, batch_spec
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner.diagnostics import CompileError
from moeplan.planner.spec import parse_spec

MARKET = ONLINE + "market: {gpus: [T4, L4], budget: $20/h, quota: {L4: 8}}\n"


@pytest.mark.parametrize(
    ("text", "settings", "as_text"),
    [
        (ONLINE, ["workload.online.rate=12/s"], ONLINE.replace("rate: 8/s", "rate: 12/s")),
        (ONLINE, ["workload.online.rate=+25%"], ONLINE.replace("rate: 8/s", "rate: 10/s")),
        (ONLINE, ["workload.online.slo.ttft=-50%"], ONLINE.replace("ttft: 2s", "ttft: 1s")),
        (ONLINE, ["workload.online.sizes.1.prompt=4096"], ONLINE.replace("prompt: 2048", "prompt: 4096")),
        (ONLINE, ["market.gpus=[T4, L4]"], ONLINE + "market: {gpus: [T4, L4]}\n"),
        (MARKET, ["market.budget="], MARKET.replace(" budget: $20/h,", "")),
        (MARKET, ["market.budget=+10%"], MARKET.replace("$20/h", "$22/h")),
        (MARKET, ["market.quota.L4=4"], MARKET.replace("L4: 8", "L4: 4")),
        (MARKET, ["market.gpus.1=A100"], MARKET.replace("[T4, L4]", "[T4, A100]")),
        (batch_spec(), ["model.quantize=fp8"], batch_spec(model="{name: mixtral-8x7b, quantize: fp8}")),
        (batch_spec(machine="{name: x, memory: 24 GiB}"), ["machine.memory=+10%"],
         batch_spec(machine="{name: x, memory: 26.4 GiB}")),
        (batch_spec(machine="x"), ["machine=y"], batch_spec(machine="y")),
        (batch_spec(), ["workload.batch.requests=+10%", "workload.batch.deadline=8h"],
         batch_spec(more=", deadline: 8h").replace("2000", "2200")),
    ],
)  # fmt: skip
def test_as_if_the_text_said_so(text: str, settings: list[str], as_text: str) -> None:
    assert parse_spec(text, "spec.yaml", settings) == parse_spec(as_text, "spec.yaml")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("workload.online.rate=12/x", "rate=12/x':1:22: workload.online.rate: '12/x' is not a rate"),
        ("workload.online.rat=12/s", "rat=12/s':1:21: unknown key 'rat' in workload.online"),
        ("workload.online.sizes.7.prompt=5", "'7' is no item|items 0 to 1"),
        ("market.budget=+10%", "has no number in the spec that \\+10% could be of"),
        ("market.budget=", "not in the spec, so there is nothing to remove"),
        ("name.first=x", "a single value on the way"),
        ("market.gpus=[", "expected"),
        ("workload.online.slo.ttft=-100%", "out of range"),
        ("rate", "a setting is key=value"),
        ("=5", "a setting is key=value"),
        ("model.name=&x y", "anchors"),
        ("workload.online.rate=", "workload.online needs 'rate'"),
    ],
)
def test_messages_name_the_option(setting: str, says: str) -> None:
    with pytest.raises(CompileError, match=says) as caught:
        parse_spec(ONLINE, "spec.yaml", [setting])
    assert str(caught.value).startswith(("--what-if '", "spec.yaml:"))


def test_what_a_later_pass_says_about_an_edited_value_names_the_option() -> None:
    spec = parse_spec(ONLINE, "spec.yaml", ["market.gpus=[T44]"])
    assert str(spec.span("market.gpus.0")) == "--what-if 'market.gpus=[T44]':1:14"
    assert str(spec.span("workload.online.rate")) == "spec.yaml:5:11"


@given(st.integers(1, 10**6), st.integers(-99, 400))
def test_a_percentage_is_of_the_number_that_is_there(requests: int, percent: int) -> None:
    """Whatever the number, the edited one is the number times the factor, rounded where it is whole."""
    text = batch_spec().replace("2000", str(requests))
    wanted = requests * (100 + percent) / 100
    try:
        batch = parse_spec(text, "spec.yaml", [f"workload.batch.requests={percent:+d}%"]).workload.batch
    except CompileError:
        assert wanted <= 0.5
        return
    assert batch is not None
    assert abs(batch.requests - wanted) <= 0.5


def test_an_edit_leaves_the_rest() -> None:
    before, after = parse_spec(MARKET, "spec.yaml"), parse_spec(MARKET, "spec.yaml", ["market.budget=$9/h"])
    assert after == replace(before, market=replace(before.market, budget_usd_per_hour=9.0))
