"""The recorded flags are what the engines' published packages hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from record_flags import PACKAGES, READERS, RECORDS

pytestmark = pytest.mark.external
FOLDER = Path(os.environ.get("MOEPLAN_ENGINE_PACKAGES", Path(__file__).parents[2] / "build" / "engines"))


@pytest.mark.parametrize("name", PACKAGES)
def test_record_is_current(name: str) -> None:
    found = sorted(FOLDER.glob(PACKAGES[name]))
    if not found:
        missing = f"no {PACKAGES[name]} in {FOLDER}: make test-engines downloads it"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    assert READERS[name](found[-1]) == json.loads((RECORDS / f"{name}.json").read_text())
