"""No secret, account or path of a machine in anything that is generated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted((ROOT / "examples").glob("*/*.plan"))
FORBIDDEN = {
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a token of Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an AWS account": re.compile(r"arn:aws[a-z-]*:[a-z0-9-]*:[a-z0-9-]*:[0-9]{12}:"),
    "a password": re.compile(r"(password|passwd|api_?key|secret_?key)\s*[=:]", re.IGNORECASE),
    "a home folder": re.compile(r"(?<![\w.~])/(home/|Users/|root/)"),
}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.stem)
def test_generated_files(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert [what for what, pattern in FORBIDDEN.items() if pattern.search(text)] == [], path


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("key = AKIAIOSFODNN7EXAMPLE", "an AWS access key"),
        ("arn:aws:iam::123456789012:role/x", "an AWS account"),
        ("hf_abcdefghijklmnopqrstuv", "a token of Hugging Face"),
        ("path: /home/someone/plan", "a home folder"),
        ("source: /root/models", "a home folder"),
        ("db_password = x", "a password"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
    ],
)
def test_the_patterns_find_them(text: str, what: str) -> None:
    assert FORBIDDEN[what].search(text)
