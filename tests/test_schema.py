"""The JSON Schema and the parser accept and refuse the same documents."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_spec import FULL, SHORT

from moeplan.planner.diagnostics import CompileError
from moeplan.planner.schema import STRICTER_THAN_SCHEMA, spec_reference, spec_schema
from moeplan.planner.spec import parse_spec

VALIDATOR = jsonschema.Draft202012Validator(spec_schema())

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*/spec.yaml"))


def parser_codes(data: Any) -> set[str]:
    """Diagnostic codes of the parser on `data` written as YAML; empty where it accepts."""
    try:
        parse_spec(yaml.safe_dump(data, allow_unicode=True), "spec.yaml")
    except CompileError as error:
        return {diagnostic.code for diagnostic in error.diagnostics}
    return set()


def agree(data: Any) -> bool:
    """Compare the two; True where the document is accepted."""
    codes, valid = parser_codes(data), VALIDATOR.is_valid(data)
    assert valid == (not codes - STRICTER_THAN_SCHEMA.keys()), (valid, codes, data)
    return valid and not codes


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(spec_schema())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_examples_are_valid(path: Path) -> None:
    assert agree(yaml.safe_load(path.read_text()))


VALUES: list[Any] = [
    None,
    True,
    0,
    1,
    -3,
    10**13,
    0.5,
    2.0,
    1.5,
    1e16,
    "",
    "x",
    "aws",
    "spot",
    "fp16",
    "8/s",
    "8 / s",
    "120ms",
    "2 s",
    "2 sec",
    "24 GiB",
    "$20/h",
    "20 USD/h",
    "70%",
    "0.5 %",
    "512 tokens",
    "512",
    "aws/us-east-1",
    "A100-80GB",
    "no",
    "a b",
    [],
    ["aws"],
    ["aws", "aws"],
    ["T4", "L4"],
    [1],
    {},
    {"T4": 8},
    {"T4": 1.0},
    {"T4": "8"},
    {"name": "x"},
    {"file": "m.yaml"},
    {"prompt": 5, "output": 6},
    [{"prompt": 5, "output": 6}],
    {"ttft": "1s", "itl": "1s"},
    {"prompts": "p.jsonl"},
    {"requests": 5, "prompt": 6, "output": 7},
]
KEYS = [
    "name",
    "path",
    "file",
    "memory",
    "prompts",
    "requests",
    "rate",
    "trace",
    "sizes",
    "machine",
    "market",
    "nmae",
]


def mutated(data: Any, draw: random.Random) -> Any:
    """A copy with one entry dropped, added or replaced, somewhere."""
    data = copy.deepcopy(data)
    holders = [node for node in _nodes(data) if node]
    node = draw.choice(holders)
    at = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
    action, value = draw.randrange(3), copy.deepcopy(draw.choice(VALUES))
    if action == 0:
        node[at] = value
    elif action == 1:
        del node[at]
    elif isinstance(node, dict):
        node[draw.choice(KEYS)] = value
    else:
        node.append(copy.deepcopy(draw.choice([node[at], value])))
    return data


def _nodes(data: Any) -> list[Any]:
    if isinstance(data, dict):
        return [data] + [node for value in data.values() for node in _nodes(value)]
    if isinstance(data, list):
        return [data] + [node for value in data for node in _nodes(value)]
    return []


@given(st.integers(0, 2**32), st.integers(0, 2))
@settings(max_examples=1500)
def test_parser_and_schema_agree(seed: int, edits: int) -> None:
    draw = random.Random(seed)
    data = yaml.safe_load(draw.choice([FULL, SHORT]))
    for _ in range(edits):
        data = mutated(data, draw)
    agree(data)


def test_the_comparison_meets_both_answers() -> None:
    """Guards the test above: its documents must often be accepted and often refused."""
    answers = []
    for seed in range(300):
        draw = random.Random(seed)
        answers.append(agree(mutated(yaml.safe_load(draw.choice([FULL, SHORT])), draw)))
    assert 30 < sum(answers) < 270


def test_reference_is_generated() -> None:
    path = Path(__file__).parents[1] / "docs" / "spec.md"
    assert path.read_text(encoding="utf-8") == spec_reference()
