"""The runtime's own trap avoidance has to run before any test imports torch."""

import sys

import pytest

import moeplan.runtime_min  # noqa: F401


@pytest.fixture(autouse=True)
def plain_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedules run as plain Python: the same rows, without a second of compiling each.

    Commands that tests start compile them, and tests/codegen/test_emit_schedule.py compares the two.
    """
    monkeypatch.setitem(sys.modules, "numba", None)
