"""Run the commands of a tutorial in an empty folder, and write what they say into its text blocks.

`python tests/tutorials.py` rewrites docs/tutorials; the tests compare.

A block whose first line is `# NAME` is a file. A `sh` block is run; the `text` block after it is what it
says on both streams.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w.-]+)\n")


def refreshed(text: str, folder: Path) -> str:
    """`text` with every text block as its commands say now; raises RuntimeError where one fails."""
    said = ""

    def block(found: re.Match[str]) -> str:
        nonlocal said
        kind, content = found.groups()
        if kind == "text":
            return f"```text\n{said}```"
        if kind == "sh":
            said = _run(content, folder)
        elif name := _FILE.match(content):
            body = content[name.end() :] if kind == "json" else content
            (folder / name[1]).write_text(body)
        return found.group()

    return _BLOCK.sub(block, text)


def _run(script: str, folder: Path) -> str:
    """Both streams, without colours and progress: they are no terminal."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{script}\n{done.stdout}")
    return done.stdout


def main() -> None:
    for page in sorted(FOLDER.glob("*.md")):
        with tempfile.TemporaryDirectory() as folder:
            page.write_text(refreshed(page.read_text(), Path(folder)))


if __name__ == "__main__":
    main()
