"""Shared records: small, but each made by the real passes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from moeplan.planner.catalog import Catalog, load_catalog
from moeplan.planner.diagnostics import Span
from moeplan.planner.ir.plan import Plan

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH = """\
name: {name}
model: {model}
workload:
  batch: {{requests: 2000, prompt: 77, output: 128{more}}}
"""
ONLINE = """\
name: chat
model: qwen3-30b-a3b
workload:
  online:
    rate: 8/s
    sizes:
      - {prompt: 512, output: 128, share: 70%}
      - {prompt: 2048, output: 256, share: 30%}
    slo: {ttft: 2s, itl: 100ms}
"""

# No property fails because a machine is slow, none today that held yesterday: examples follow from the test's
# text. `make test-all` tries others.
_ANY_SPEED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", _ANY_SPEED, derandomize=True)
settings.register_profile("others", _ANY_SPEED)
settings.load_profile("same")

_PLANS: dict[str, Plan] = {}  # of texts: a plan is frozen


@functools.cache
def example_plan(name: str) -> Plan:
    """The plan of an example, compiled once."""
    from moeplan.planner.pipeline import compile_plan

    path = EXAMPLES / name / "spec.yaml"
    return compile_plan(path.read_bytes(), str(path))


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    return load_catalog(None, Span("spec.yaml"))


@pytest.fixture
def compile_text(tmp_path: Path) -> Callable[[str], Plan]:
    """Compile spec text as if it lay in a folder of its own; text that no file lies beside only once."""
    from moeplan.planner.pipeline import compile_plan

    def compiled(text: str) -> Plan:
        if any(tmp_path.iterdir()):
            return compile_plan(text, str(tmp_path / "spec.yaml"))
        if text not in _PLANS:
            _PLANS[text] = compile_plan(text, str(tmp_path / "spec.yaml"))
        return _PLANS[text]

    return compiled


def batch_spec(machine: str = "", model: str = "mixtral-8x7b", more: str = "", name: str = "job") -> str:
    """A batch spec, pinned to `machine` if one is given; `more` goes into the batch mapping."""
    text = BATCH.format(name=name, model=model, more=more)
    return text + (f"machine: {machine}\n" if machine else "")
