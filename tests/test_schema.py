"""The JSON Schema accepts what the parser accepts, but for the rules listed; the reference is current."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplan.planner.diagnostics import CompileError
from moeplan.planner.fields import Field, Group, ListOf, TableOf
from moeplan.planner.schema import EXAMPLE, STRICTER, spec_reference, spec_schema
from moeplan.planner.spec import SPEC, parse_spec

ROOT = Path(__file__).parents[1]
STRICTER_CODES = {rule.code for rule in STRICTER}
VALIDATOR = jsonschema.Draft202012Validator(spec_schema())
Data = Any


def fields(group: Group) -> list[Field]:
    """Every field of a group and of the groups below it."""
    found = list(group.fields)
    for one in group.fields:
        kind = one.kind.item if isinstance(one.kind, ListOf) else one.kind
        found += fields(kind) if isinstance(kind, Group) else []
    return found


# Documents: valid ones from a grammar of their own, then damaged


def optional(required: dict[str, st.SearchStrategy[Data]], **more: st.SearchStrategy[Data]) -> Data:
    return st.fixed_dictionaries(required, optional=more)


NAMES = st.sampled_from(["m", "mixtral-8x7b", "Qwen/Qwen3-30B", "n1-custom-64+4xT4", "a b", "123", "on", "é"])
PATHS = st.sampled_from(["p", "./x.jsonl", "/abs/olute", "..", " ", "a\nb", "ü"])
TOKENS = st.sampled_from([1, 77, 512.0, 10_000_000, "1 token", "77 tokens", "77tokens"])
DURATIONS = st.sampled_from(["1s", "2 s", "120ms", "1.5 min", "0.01h", "1500000µs"])
DEADLINES = st.sampled_from(["1s", "90 min", "8h", "0.5d", "365d"])
PROMISES = st.sampled_from([0.5, 0.99, 0.99999, "99%", "99.5 %", "50%"])
MODELS = st.one_of(
    NAMES,
    optional({"name": NAMES}, dtype=st.sampled_from(["bf16", "fp16", "float32"])),
    optional({"path": PATHS}, dtype=st.just("bf16")),
)
BATCHES = st.one_of(
    optional(
        {"requests": st.sampled_from([1, 1000, 10**12, 2e9]), "prompt": TOKENS, "output": TOKENS},
        deadline=DEADLINES,
    ),
    optional({"prompts": PATHS}, prompt=TOKENS, output=TOKENS, deadline=DEADLINES),
)
SHARES = st.sampled_from([["100%"], [1], ["70%", 0.3], [0.25, 0.25, "50 %"], ["33.3333%"] * 3])
SIZES = st.one_of(
    st.just([{"prompt": 1, "output": "1 token"}]),
    st.tuples(SHARES, TOKENS, TOKENS).map(
        lambda drawn: [{"prompt": drawn[1], "output": drawn[2], "share": share} for share in drawn[0]]
    ),
)
SLOS = optional({"ttft": DURATIONS, "itl": DURATIONS}, attainment=PROMISES)
RATES = st.sampled_from(["8/s", "500/min", "3600 /h", "0.5/s"])
ONLINES = st.one_of(
    optional({"rate": RATES, "sizes": SIZES, "slo": SLOS}),
    optional({"trace": PATHS, "slo": SLOS}, rate=RATES),
)
WORKLOADS = st.one_of(
    optional({"batch": BATCHES}),
    optional({"online": ONLINES}),
    optional({"batch": BATCHES, "online": ONLINES}),
)
MEMORY = st.sampled_from(["24 GiB", "500MB", 2**34, 2.0**34])
MACHINES = st.one_of(
    NAMES, optional({"name": NAMES}, memory=MEMORY), optional({"file": PATHS}, memory=MEMORY)
)
MARKETS = optional(
    {},
    clouds=st.sampled_from([["aws", "gcp", "azure"], ["gcp", "aws"]]),
    regions=st.sampled_from([["aws/us-east-1"], ["gcp/us-central1", "aws/us-east-1"]]),
    gpus=st.lists(NAMES, min_size=1, max_size=3, unique=True),
    purchase=st.sampled_from(["any", "spot", "on-demand"]),
    budget=st.sampled_from(["$20/h", "0.5 USD/h"]),
    quota=st.dictionaries(NAMES, st.sampled_from([0, 4, 10**6]), min_size=1, max_size=3),
    availability=PROMISES,
)
TOP: dict[str, st.SearchStrategy[Data]] = {
    "name": st.sampled_from(["a", "mixtral-t4", "1-2"]),
    "model": MODELS,
    "workload": WORKLOADS,
}
VALID = st.one_of(
    optional(TOP, machine=MACHINES, catalog=PATHS), optional(TOP, market=MARKETS, catalog=PATHS)
)

KEYS = sorted({one.key for one in fields(SPEC)})
ODD = [
    *(None, True, False, 0, 1, -1, 0.5, 1.5, 1e300, 10**400, "", " ", "x", "512", "010", "2e9", "on", "99%"),
    *([], {}, [1], [[]], [{}], ["T4"], {"name": "m"}, {"T4": 1}, {"": 1}, {"prompt": 1, "output": 1}),
]
# Values that are wrong, or nearly so, for one key.
ODD_AT: dict[Any, list[Data]] = {
    "name": ["Upper", "a" * 42, "a" * 43, "-a", "a.b", " m", "a\tb"],
    "model": ["", {"name": "m", "path": "p"}, {"dtype": "bf16"}, {"path": "a\0b"}],
    "dtype": ["float16", "BF16"],
    "workload": [{"batch": {"prompts": "p"}}, {"batch": {"requests": 1}}],
    "requests": [1.5, 10**12 + 1, "1000", "1000 requests"],
    "prompt": ["0 tokens", "1.5 tokens", "77 words", 10_000_001],
    "output": ["20000000 tokens", "1 tokens", -5],
    "prompts": ["a\0b", "a" * 4096, "a" * 4097],
    "deadline": ["0s", "1000d", "8", "8 hours", "1:30", 8, "-1h", "9999999999999999s"],
    "rate": ["8", 8, "8/sec", "2000000/s", "0/s", "1/d"],
    "share": [70, "70", "170%", "0%", 1e-7, "0.00001%", "40%", 0.4],
    "sizes": [[{"prompt": 1, "output": 1}] * 2, [{"prompt": 1, "output": 1, "share": 0.4}], ["x"]],
    "ttft": ["2", 2, "2d", "0.5ms"],
    "itl": ["100", 0.1, "2h", "1us"],
    "attainment": [1, "100%", 0.4, "49%", "0.99", 99],
    "machine": ["", {"name": "m", "file": "f"}, {"memory": 2**30}],
    "memory": ["24", "24 gib", "3 PiB", "1 B", 1, 2**60, 1.5e9 + 0.5, "1e3 GiB"],
    "clouds": [["aws", "ibm"], ["azure"], ["aws", "aws"], "aws"],
    "regions": [
        ["us-east-1"],
        ["azure/eastus"],
        ["ibm/eu"],
        ["aws/"],
        ["aws/us-east-1"] * 2,
        "aws/us-east-1",
    ],
    "gpus": [["T4", "T4"], "T4", [""]],
    "purchase": ["Spot", "ondemand", True],
    "budget": ["$20", 20, "20$/h", "$0/h", "$2000000/h"],
    "quota": [{"T4": -1}, {"T4": 1.5}, {"T4": 4.0}, {" ": 1}, ["T4"]],
    "availability": [1.0, "99", "99.9999%", 0.99999],
}


def places(data: Data) -> list[tuple[Data, Any]]:
    """Every container in `data` with each key or index in it."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    return [pair for key in keys for pair in [(data, key), *places(data[key])]]


_DROPPED, _MISSPELT = object(), object()
Draw = Callable[[st.SearchStrategy[Any]], Any]


def odd_value(draw: Draw, key: Any) -> Data:
    return deepcopy(draw(st.sampled_from(ODD_AT.get(key, ODD)) | st.sampled_from(ODD)))


def damage(data: Data, draw: Draw) -> None:
    """Drop, rename, add or replace something, in place."""
    container, key = draw(st.sampled_from(places(data)))
    what = draw(st.sampled_from(["replace", "drop", "replace", "rename", "add", "replace", "swap"]))
    if what == "drop":
        del container[key]
    elif what == "replace" or isinstance(container, list):
        container[key] = odd_value(draw, key)
    elif what == "rename":
        container[draw(st.sampled_from([*KEYS, f"{key}s"]))] = container.pop(key)
    elif what == "add":
        added = draw(st.sampled_from(KEYS))
        container[added] = odd_value(draw, added)
    else:
        other, place = draw(st.sampled_from(places(data)))
        container[key] = deepcopy(other[place])


@st.composite
def documents(draw: Draw) -> Data:
    data = deepcopy(draw(VALID))
    for _ in range(draw(st.integers(1, 3))):
        if places(data):
            damage(data, draw)
    return data


class Quoting(yaml.SafeDumper):
    """Writes text in quotes, so that it stays text whatever it looks like."""


Quoting.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)
Quoting.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


def problem_codes(data: Data) -> set[str]:
    """The codes of what the parser finds wrong with `data`."""
    try:
        parse_spec(yaml.dump(data, Dumper=Quoting, allow_unicode=True), "spec.yaml")
    except CompileError as error:
        return {problem.code for problem in error.diagnostics}
    return set()


# The tests


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(spec_schema())
    assert json.loads(json.dumps(spec_schema())) == spec_schema()


@given(VALID)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_both_accept_valid_specs(data: Data) -> None:
    assert problem_codes(data) == set()
    assert [error.message for error in VALIDATOR.iter_errors(data)] == []


def compare(data: Data) -> set[str]:
    """The schema refuses what the parser refuses for any reason that is not listed as stricter."""
    codes = problem_codes(data)
    assert VALIDATOR.is_valid(data) == (not codes - STRICTER_CODES), (codes, data)
    return codes


@given(documents())
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_both_accept_the_same(data: Data) -> None:
    compare(data)


WHOLE = (
    yaml.safe_load(EXAMPLE),
    {
        "name": "a",
        "model": {"name": "m", "dtype": "bf16"},
        "workload": {"online": {"trace": "t", "slo": {"ttft": "1s", "itl": "1s"}}},
        "machine": {"file": "m.yaml", "memory": "24 GiB"},
        "catalog": "c",
    },
    {
        "name": "a",
        "model": {"path": "p"},
        "workload": {"batch": {"prompts": "p.jsonl", "prompt": 1}},
        "machine": {"name": "m"},
    },
)


def damaged_everywhere(whole: Data) -> Iterator[Data]:
    """`whole` with one damage: each odd value at each place, each key dropped and misspelt."""
    for number, (_, key) in enumerate(places(whole)):
        for change in [*ODD_AT.get(key, []), *ODD, _DROPPED, _MISSPELT]:
            data = deepcopy(whole)
            container, _ = places(data)[number]
            if change is _DROPPED:
                del container[key]
            elif change is _MISSPELT and isinstance(container, dict):
                container[f"{key}s"] = container.pop(key)
            elif change is not _MISSPELT:
                container[key] = change
            yield data


def test_one_damage_at_a_time() -> None:
    """Both outcomes and every kind of error come up, and both agree on all of them."""
    seen = Counter[str]()
    for whole in WHOLE:
        for data in damaged_everywhere(whole):
            seen.update(compare(data) or {"accepted"})
    assert seen["accepted"] > 150
    for code in ("unknown-key", "missing-key", "wrong-type", "wrong-unit", "wrong-text", "out-of-range"):
        assert seen[code] > 50, seen
    for code in ("conflicting-keys", "unknown-word", "nothing-given", "repeated-value"):
        assert seen[code] >= 3, seen
    for code in ("amount-out-of-range", "shares-sum", "region-outside-clouds"):
        assert seen[code] >= 3, seen


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("workload.batch.deadline: 0s", "amount-out-of-range"),
        ("workload.batch.deadline: 400d", "amount-out-of-range"),
        ("market: {clouds: [aws], regions: [gcp/us-central1]}", "region-outside-clouds"),
        ("workload.online.sizes: [{prompt: 1, output: 1, share: 99%}]", "shares-sum"),
    ],
)
def test_stricter_rules_on_values(text: str, code: str) -> None:
    """What only the parser refuses, and the schema lets pass."""
    key, _, value = text.partition(": ")
    data = yaml.safe_load(EXAMPLE)
    *groups, last = key.split(".")
    inner = data
    for group in groups:
        inner = inner[group]
    inner[last] = yaml.safe_load(value)
    assert problem_codes(data) == {code}
    assert VALIDATOR.is_valid(data)


def test_the_rules_of_text_are_all_provoked() -> None:
    """Every stricter rule is shown at work, here or in the table of wrong files."""
    provoked = (ROOT / "tests" / "test_spec.py").read_text(encoding="utf-8")
    assert [
        code for code in sorted(STRICTER_CODES) if f"[{code}]" not in provoked and f'"{code}"' not in provoked
    ] == []


def test_the_example_is_a_spec() -> None:
    parse_spec(EXAMPLE, "spec.yaml")
    assert VALIDATOR.is_valid(yaml.safe_load(EXAMPLE))
    assert set(yaml.safe_load(EXAMPLE)) == {"name", "model", "workload", "market"}


@pytest.mark.parametrize("one", fields(SPEC), ids=lambda one: one.key)
def test_every_field_is_explained(one: Field) -> None:
    """A meaning, and an example or a closed set of values."""
    assert one.doc.endswith(".")
    assert one.examples or one.default
    assert not (one.required and one.default)
    assert isinstance(one.kind, TableOf) or f"| `{one.key}` | " in spec_reference()


def schema_nodes(schema: Data) -> list[dict[str, Any]]:
    inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    return [
        *([schema] if isinstance(schema, dict) else []),
        *(node for one in inner for node in schema_nodes(one)),
    ]


def test_examples_and_defaults_fit_their_own_schema() -> None:
    checked = 0
    for node in schema_nodes(spec_schema()):
        values = [*node.get("examples", []), *([node["default"]] if "default" in node else [])]
        for value in values if isinstance(node.get("description"), str) else []:
            jsonschema.Draft202012Validator(node).validate(value)
            checked += 1
    assert checked > 40


def test_editors_may_search_with_patterns() -> None:
    """Patterns are anchored and hold nothing that only Python's regular expressions know."""
    patterns = {
        node["pattern"] for node in schema_nodes(spec_schema()) if isinstance(node.get("pattern"), str)
    }
    for pattern in patterns:
        assert pattern.startswith("^")
        assert pattern.endswith("$")
        assert not re.search(r"\(\?[^:]|\\[AZdwsb]|\{,", pattern)


def test_the_reference_is_current() -> None:
    """Run `python -m moeplan.planner.schema > docs/spec.md` after a change of the table."""
    assert (ROOT / "docs" / "spec.md").read_text(encoding="utf-8") == spec_reference()
