"""The runtime's own trap avoidance has to run before any test imports torch."""

import sys
from collections.abc import Iterator

import pytest

import moeplan.runtime_min  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def plain_schedules() -> Iterator[None]:
    """Schedules run as plain Python, also in fixtures: the same rows, without a second of compiling each.

    Commands that tests start compile them; test_parity.py and codegen/test_emit_schedule.py compare the two.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        yield
