"""Every command of every tutorial runs and says what the page has it say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tutorials import FOLDER, refreshed

PAGES = sorted(FOLDER.glob("*.md"))


def test_there_are_tutorials() -> None:
    assert {page.stem for page in PAGES} >= {"offload", "online", "spot"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tutorial(page: Path, tmp_path: Path) -> None:
    """`python tests/tutorials.py` brings a page up to date after an intended change."""
    text = page.read_text(encoding="utf-8")
    assert "```sh\n" in text
    assert refreshed(text, tmp_path) == text
