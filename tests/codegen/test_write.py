"""Writing and checking: only changed bytes, only files of our own lock, and drift by kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeplan.codegen.write import LOCK, check, older_catalog, with_lock, write

FILES = {"plan.json": "{}\n", "runtime/a/schedule.py": "x = 1\n"}


def locked(files: dict[str, str]) -> dict[str, str]:
    return with_lock(files, {"spec": "0" * 64}, {"status": "optimal", "gap": 0.0})


def test_second_write_changes_nothing(tmp_path: Path) -> None:
    assert write(locked(FILES), tmp_path) == ["plan.json", "runtime/a/schedule.py", LOCK]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert write(locked(FILES), tmp_path) == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_fresh_folder_is_current(tmp_path: Path) -> None:
    write(locked(FILES), tmp_path)
    assert check(locked(FILES), tmp_path) == []


def test_drift_is_told_by_kind(tmp_path: Path) -> None:
    write(locked({**FILES, "old.yaml": "old\n", "gone.md": "text\n"}), tmp_path)
    (tmp_path / "plan.json").write_text("edited\n")
    (tmp_path / "gone.md").unlink()
    wanted = locked({"plan.json": "{}\n", "runtime/a/schedule.py": "x = 2\n", "gone.md": "text\n"})
    assert {drift.path: drift.kind for drift in check(wanted, tmp_path)} == {
        "gone.md": "missing",
        "moeplan.lock": "stale",
        "old.yaml": "obsolete",
        "plan.json": "edited by hand",
        "runtime/a/schedule.py": "stale",
    }


def test_check_writes_nothing(tmp_path: Path) -> None:
    check(locked(FILES), tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_diff_shows_the_lines(tmp_path: Path) -> None:
    write(locked(FILES), tmp_path)
    wanted = locked({**FILES, "runtime/a/schedule.py": "x = 2\n"})
    drift = next(drift for drift in check(wanted, tmp_path) if drift.path.endswith("schedule.py"))
    assert "-x = 1\n+x = 2\n" in drift.diff()


def test_obsolete_files_go_and_foreign_files_stay(tmp_path: Path) -> None:
    write(locked(FILES), tmp_path)
    (tmp_path / "notes.txt").write_text("mine\n")
    (tmp_path / "runtime" / "keep.txt").write_text("mine\n")
    assert "runtime/a/schedule.py" in write(locked({"plan.json": "{}\n"}), tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [LOCK, "notes.txt", "plan.json", "runtime/keep.txt"]


@pytest.mark.parametrize("path", ["../outside.txt", "/etc/hostname", "a/../../outside.txt", ""])
def test_a_forged_lock_cannot_remove_files_elsewhere(tmp_path: Path, path: str) -> None:
    folder, outside = tmp_path / "plan", tmp_path / "outside.txt"
    write(locked(FILES), folder)
    outside.write_text("precious\n")
    lock = json.loads((folder / LOCK).read_text())
    lock["files"][path] = "0" * 64
    (folder / LOCK).write_text(json.dumps(lock))
    write(locked(FILES), folder)
    assert outside.read_text() == "precious\n"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": 3}', '{"files": {"a": {}}}', "\xff"])
def test_a_broken_lock_is_no_crash(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text, encoding="latin-1")
    assert "moeplan.lock" in {drift.path for drift in check(locked(FILES), tmp_path)}
    write(locked(FILES), tmp_path)
    assert check(locked(FILES), tmp_path) == []


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    write(locked(FILES), tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up: the old bytes stay whole, and no temporary file is left behind."""
    write(locked(FILES), tmp_path)

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write(locked({**FILES, "plan.json": '{"new": 1}\n'}), tmp_path)
    assert (tmp_path / "plan.json").read_text() == "{}\n"
    assert not list(tmp_path.rglob("*.tmp"))


def priced(day: str, prices: str = "1", files: dict[str, str] = FILES) -> dict[str, str]:
    """FILES of a plan that rests on the prices of a day."""
    return with_lock(files, {"spec": "0" * 64}, {"status": "optimal"}, {"prices": prices, "newest": day})


def test_an_older_catalog_is_told_and_is_no_drift(tmp_path: Path) -> None:
    """New prices that leave the plan as it is: not drift, not silent."""
    write(priced("2026-08-03"), tmp_path)
    assert older_catalog(priced("2026-08-03"), tmp_path) == ""
    assert check(priced("2026-11-29", "2"), tmp_path) == []
    told = older_catalog(priced("2026-11-29", "2"), tmp_path)
    assert told == "compiled against an older catalog: prices up to 2026-08-03, now up to 2026-11-29"
    assert "another catalog" in older_catalog(priced("2026-08-03", "2"), tmp_path)
    assert write(priced("2026-11-29", "2"), tmp_path) == [LOCK]
    assert older_catalog(priced("2026-11-29", "2"), tmp_path) == ""


def test_prices_that_change_the_plan_are_drift(tmp_path: Path) -> None:
    write(priced("2026-08-03"), tmp_path)
    new = priced("2026-11-29", "2", {**FILES, "plan.json": '{"new": 1}\n'})
    assert {drift.path: drift.kind for drift in check(new, tmp_path)} == {"plan.json": "stale", LOCK: "stale"}


def test_a_lock_edited_elsewhere_is_drift(tmp_path: Path) -> None:
    """Only the catalog may differ; a lock without one is from before, and stale."""
    write(priced("2026-08-03"), tmp_path)
    lock = json.loads((tmp_path / LOCK).read_text())
    for changed in ({**lock, "generator": "0"}, {k: v for k, v in lock.items() if k != "catalog"}):
        (tmp_path / LOCK).write_text(json.dumps(changed))
        assert [drift.path for drift in check(priced("2026-08-03"), tmp_path)] == [LOCK]
