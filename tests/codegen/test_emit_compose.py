"""compose.yaml: parsed back, and its commands as the engines take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from conftest import ONLINE, batch_spec
from hypothesis import example, given
from hypothesis import strategies as st

from moeplan.codegen.emit import compose
from moeplan.codegen.render import expanded_scalar
from moeplan.planner.ir.plan import Plan
from moeplan.runtime_min.__main__ import _parser

Compile = Callable[[str], Plan]


def service(plan: Plan) -> tuple[str, dict[str, Any]]:
    document = yaml.safe_load(compose.emit(plan)["compose.yaml"])
    ((name, found),) = document["services"].items()
    return name, found


def test_runtime_min(compile_text: Compile) -> None:
    """Its own parser takes the command, and the folder is the one that the plan has."""
    plan = compile_text(batch_spec(machine="g4dn.16xlarge"))
    name, found = service(plan)
    program, *arguments = found["command"]
    assert program == "runtime_min"
    options = _parser().parse_args(arguments)
    assert str(options.runtime_dir) == f"/plan/runtime/{plan.replicas[0].name}"
    assert name == plan.replicas[0].name
    assert {mount["target"] for mount in found["volumes"]} >= {"/plan", "/checkpoint", "/requests"}
    assert found["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 1
    assert "ports" not in found
    assert "never run on a GPU" in compose.emit(plan)["compose.yaml"]


@pytest.mark.parametrize("online", [True, False])
def test_vllm_on_a_machine_of_ones_own(compile_text: Compile, online: bool) -> None:
    machine = "a2-ultragpu-2g"
    text = ONLINE + f"machine: {machine}\n" if online else batch_spec(machine=machine)
    plan = compile_text(text)
    policy = plan.replicas[0].policy
    assert policy.engine == "vllm"
    _, found = service(plan)
    words = found["command"]
    assert words[0] == ("serve" if online else "run-batch")
    assert words[words.index("--max-num-seqs") + 1] == str(policy.sequences)
    assert found["entrypoint"] == ["vllm"]
    assert found["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 2
    assert found.get("ports", []) == (["127.0.0.1:8000:8000"] if online else [])


def test_nothing_where_all_is_rented(compile_text: Compile) -> None:
    assert compose.emit(compile_text(ONLINE)) == {}


def substituted(text: str) -> str:
    """What compose makes of a value without variables: two dollars are one, a lone one is refused."""
    out, rest = "", text
    while rest:
        if rest.startswith("$"):
            assert rest.startswith("$$"), f"a variable in {text!r}"
            rest = rest[1:]
        out, rest = out + rest[0], rest[1:]
    return out


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example("${HOME:-x} $HOME $$ $(MODEL) %{y} {{ z }}")
@example("no")
@example("012")
@example("1e16")
@example("line\nbreak: [1, 2]")
def test_strings_are_values(value: str) -> None:
    assert substituted(yaml.safe_load(f"- {expanded_scalar(value)}\n")[0]) == value
