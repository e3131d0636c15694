"""The pre-commit hook and the workflow of docs/ci.md, run in a scratch repository as CI would run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import batch_spec

ROOT = Path(__file__).parents[1]
HOOK: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]
WORKFLOW_TEXT = (
    (ROOT / "docs" / "ci.md").read_text().split("## GitHub Actions\n\n```yaml\n")[1].split("```")[0]
)
WORKFLOW: dict[str, Any] = yaml.safe_load(WORKFLOW_TEXT)


def shell(repository: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A step as GitHub runs it: bash that stops at the first error, our commands on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    environment = {**os.environ, "PATH": path, **env}
    return subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one spec and its plan."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "spec.yaml").write_text(batch_spec(machine="cpu-2core"))
    done = shell(
        folder,
        "git init -q && git config user.email a@b && git config user.name a && "
        "moeplan compile spec.yaml && git add -A && git commit -qm 'a plan'",
    )
    assert done.returncode == 0, done.stderr
    return folder


def steps(word: str) -> str:
    """The script of the workflow's step whose script has `word`."""
    (found,) = [step["run"] for step in WORKFLOW["jobs"]["plans"]["steps"] if word in step.get("run", "")]
    return str(found)


def test_the_hook_runs_for_specs_and_plans_only() -> None:
    files = re.compile(HOOK["files"])
    assert HOOK["pass_filenames"] is False
    assert all(files.search(name) for name in ("spec.yaml", "a/spec.yaml", "job.plan/report.md"))
    assert not any(files.search(name) for name in ("README.md", "my-spec.yaml", "plan/x"))


def test_the_hook_passes_and_fails(repository: Path) -> None:
    """Clean, edited by hand, and with a changed spec; and it writes nothing."""
    assert shell(repository, HOOK["entry"]).returncode == 0
    report = repository / "job.plan" / "report.md"
    before = report.read_text()
    report.write_text(before + "by hand\n")
    failed = shell(repository, HOOK["entry"])
    report.write_text(before)
    assert failed.returncode == 1
    assert "job.plan/report.md: edited by hand" in failed.stderr
    spec = repository / "spec.yaml"
    text = spec.read_text()
    spec.write_text(text.replace("2000", "1000"))
    failed = shell(repository, HOOK["entry"])
    spec.write_text(text)
    assert failed.returncode == 1
    assert "job.plan/plan.json: stale" in failed.stderr
    assert shell(repository, "git status --porcelain -uno").stdout == ""


def test_the_workflow_checks_and_says_what_changes(repository: Path) -> None:
    """A branch that changes the spec and its plan: the check passes, the comment has the change."""
    base = shell(repository, "git rev-parse HEAD").stdout.strip()
    spec = repository / "spec.yaml"
    spec.write_text(spec.read_text().replace("2000", "2500"))
    done = shell(repository, "git switch -qc more && moeplan compile spec.yaml && git commit -qam more")
    assert done.returncode == 0, done.stderr
    assert shell(repository, steps("moeplan check")).returncode == 0
    summary = repository.parent / "summary.md"
    told = shell(repository, steps("moeplan diff"), BASE=base, GITHUB_STEP_SUMMARY=str(summary))
    assert told.returncode == 0, told.stderr
    comment = (repository / "comment.md").read_text()
    assert comment == summary.read_text()
    assert "| **work** | batch requests | 2,000 | 2,500 | +25 % |" in comment
    assert shell(repository, "git switch -q -").returncode == 0


def test_the_workflow_comments_only_where_something_changes(tmp_path: Path) -> None:
    """The last step asks for nothing where the comment is empty, and for one comment where it is not."""
    (tmp_path / "bin").mkdir()
    gh = tmp_path / "bin" / "gh"
    gh.write_text('#!/bin/sh\necho "$@" >> asked\n')
    gh.chmod(0o755)
    script = f"PATH={shlex.quote(str(gh.parent))}:$PATH\n{steps('gh pr comment')}"
    (tmp_path / "comment.md").write_text("")
    assert shell(tmp_path, script, NUMBER="7").returncode == 0
    assert not (tmp_path / "asked").exists()
    (tmp_path / "comment.md").write_text("a change\n")
    assert shell(tmp_path, script, NUMBER="7").returncode == 0
    assert (tmp_path / "asked").read_text() == "pr comment 7 --body-file comment.md\n"


def test_one_bad_spec_does_not_hide_the_others(repository: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: x\n")
    done = shell(repository, f"moeplan check {shlex.quote(str(bad))} spec.yaml")
    assert done.returncode == 2
    assert "bad.yaml:1:1: the spec needs 'model'" in done.stderr
    assert "job.plan: " in done.stdout


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    done = shell(tmp_path, "moeplan check")
    assert done.returncode == 2
    assert "no spec.yaml below this folder has a plan folder beside it" in done.stderr


def test_completion_knows_the_commands(tmp_path: Path) -> None:
    """What the installed bash completion asks the program, and gets."""
    asked = {"_MOEPLAN_COMPLETE": "complete_bash", "COMP_WORDS": "moeplan exp", "COMP_CWORD": "1"}
    done = shell(tmp_path, "moeplan", **asked)
    assert done.stdout.split() == ["explain"], done.stderr
