"""The one Jinja2 environment: strict about names, with a quoting filter per output format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import yaml


def render(template: str, **values: Any) -> str:
    """Render templates/`template`. Raises jinja2.UndefinedError on a name that has no value."""
    return _environment().get_template(template).render(**values)


def verbatim(path: str) -> str:
    """templates/`path` as it is."""
    return files("moeplan.templates").joinpath(path).read_text(encoding="utf-8")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moeplan.templates", ""),
        undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        bytecode_cache=_compiled(),
    )
    environment.filters["python"] = repr
    environment.filters["upper_names"] = _upper_names
    environment.filters["yaml"] = yaml_scalar
    environment.filters["expanded"] = expanded_scalar
    return environment


def _compiled() -> jinja2.BytecodeCache | None:
    """Compiled templates, kept among temporary files; None where the user has no such folder of their own."""
    try:
        return jinja2.FileSystemBytecodeCache()
    except (OSError, RuntimeError):
        return None


def _upper_names(names: Sequence[str]) -> str:
    return ", ".join(name.upper() for name in names)


def yaml_scalar(value: object) -> str:
    """A YAML flow scalar that YAML 1.1 and 1.2 parsers read back as `value`, type included.

    Strings are double-quoted and so never look like a number, boolean or date.
    """
    if not isinstance(value, (str, int, float, bool)):
        raise TypeError(f"{value} is not a scalar")  # a name without a value raises here as elsewhere
    style = '"' if isinstance(value, str) else None
    return yaml.safe_dump(value, default_style=style, width=math.inf).splitlines()[0]


def expanded_scalar(value: str) -> str:
    """A YAML scalar that docker compose, or Kubernetes in a command, reads as `value`.

    Both put variables where they find a dollar, and take two for one.
    """
    return yaml_scalar(value.replace("$", "$$"))
