"""Quoting: whatever a value holds, the parser of the format gives it back."""

from __future__ import annotations

import jinja2
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from moeplan.codegen import render as module
from moeplan.codegen.data import rounded, to_json
from moeplan.codegen.render import render, yaml_scalar

scalars = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"])),
    st.integers(),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
)


@given(scalars)
@example("no")
@example("012")
@example("1e16")
@example("12:30:00")
@example("${x} %{y} {{ z }}")
@example("line\nbreak: [1, 2]")
@example("\x85\u2028\ufeff")
@example(1e16)
@example(1e-7)
def test_yaml_scalars_come_back(value: str | int | float | bool) -> None:
    back = yaml.safe_load(f"key: {yaml_scalar(value)}\nother: 1\n")
    assert back == {"key": value, "other": 1}
    assert type(back["key"]) is type(value)


def test_templates_render_where_no_folder_may_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder that someone else owns, say: templates are compiled anew each time."""

    def refuse() -> None:
        raise RuntimeError("no safe folder")

    monkeypatch.setattr(jinja2, "FileSystemBytecodeCache", refuse)
    environment = module._environment.__wrapped__()
    assert environment.bytecode_cache is None
    assert environment.from_string("{{ x }}").render(x=1) == "1"


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        render("skypilot/job.yaml.j2")


def test_floats_are_rounded_once_and_infinities_are_null() -> None:
    assert rounded(0.1 + 0.2) == 0.3
    assert rounded(123456789.0) == 123457000.0
    assert to_json({"b": float("inf"), "a": (1, 2)}) == '{\n  "a": [\n    1,\n    2\n  ],\n  "b": null\n}\n'
