"""The checked-in reports in headless Chromium: no error on the console, nothing wider than a telephone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.external
ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "examples").glob("*/*.plan/report.html"))
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# A page of our own that holds the report in a frame, and says how wide its content is.
FRAME = """
<!DOCTYPE html><body><iframe src="{page}" style="width:{width}px;height:800px;border:0"></iframe>
<p id="told"></p><script>
document.querySelector("iframe").onload = event => {{
  const root = event.target.contentDocument.documentElement;
  document.getElementById("told").textContent =
    `width ${{root.scrollWidth}} sections ${{root.querySelectorAll("section").length}}`;
}};
</script></body>
"""


@pytest.fixture(autouse=True)
def _browser() -> None:
    if BROWSER is None:
        reason = "no Chromium: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=5000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parents[1].name)
def test_a_report_fits(page: Path, width: int, tmp_path: Path) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(page=page.as_uri(), width=width))
    done = browse(frame, "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    told = re.search(r"width (\d+) sections (\d+)", done.stdout)
    assert told is not None, done.stdout + done.stderr
    assert int(told[1]) <= width
    assert int(told[2]) >= 7


@pytest.mark.parametrize("page", PAGES[:1], ids=lambda path: path.parents[1].name)
def test_an_error_would_be_seen(page: Path, tmp_path: Path) -> None:
    """The check above can fail: a page that asks for something outside is told on the console."""
    broken = tmp_path / "broken.html"
    text = page.read_text(encoding="utf-8")
    broken.write_text(text.replace("<main>", '<main><img src="http://127.0.0.1:9/x.png">'))
    assert "CONSOLE" in browse(broken, "--dump-dom").stderr


def test_it_prints(tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    browse(PAGES[0], f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
