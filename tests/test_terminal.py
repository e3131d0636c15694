"""What a terminal gets and a file does not: a line of progress that is gone at the end, and emphasis."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import batch_spec

from moeplan.planner import terminal

CODE = "import sys; sys.argv[0] = 'moeplan'; from moeplan.planner.cli import main; main()"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_emphasis_changes_no_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    text = "job: model\n  deploy      1 × box\n  next best   2 × other: 5\n"
    styled = terminal.styled(text)
    assert styled.startswith("\x1b[1mjob: model\x1b[0m\n  \x1b[2mdeploy\x1b[0m      1 × box\n")
    assert "\x1b[2mnext best\x1b[0m   2" in styled
    assert styled.replace("\x1b[1m", "").replace("\x1b[2m", "").replace("\x1b[0m", "") == text


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_emphasis_where_it_is_not_wanted(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv(name, value)
    assert terminal.styled("job\n  deploy  1") == "job\n  deploy  1"


def test_nothing_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.StringIO())
    assert terminal.styled("job\n  deploy  1") == "job\n  deploy  1"
    with terminal.Status() as status:
        status.show("policies")
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_compiling_on_a_terminal(tmp_path: Path) -> None:
    """Passes are announced on the terminal and the line is cleared; standard output stays a clean pipe."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(batch_spec(machine="cpu-2core"))
    screen, end = pty.openpty()
    command = [sys.executable, "-c", CODE, "compile", str(spec), "--no-html"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True)
    os.close(end)
    told = b""
    while chunk := _read(screen):
        told += chunk
    os.close(screen)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "… policies".encode() in told
    assert told.endswith(b"\r\x1b[K")


def _read(file: int) -> bytes:
    """What is left; a terminal whose other end is closed raises instead of ending."""
    try:
        return os.read(file, 4096)
    except OSError:
        return b""
