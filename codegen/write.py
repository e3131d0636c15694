"""The one place that writes files, and the check of what is on disk against what would be written."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from moeplan.codegen.data import to_json

LOCK = "moeplan.lock"
_LOCK_FORMAT = 1
# Raised when the same plan is written in other bytes; a version of the tool itself would make every
# upgrade look like drift.
_GENERATOR = "1"

DriftKind = Literal["missing", "stale", "edited by hand", "obsolete"]


@dataclass(frozen=True, slots=True)
class Drift:
    """One file that is not what the spec compiles to. `want` is empty for an obsolete file."""

    path: str
    kind: DriftKind
    have: str
    want: str

    def diff(self) -> str:
        """A unified diff from what is there to what should be."""
        lines = difflib.unified_diff(
            self.have.splitlines(keepends=True), self.want.splitlines(keepends=True), self.path, self.path
        )
        return "".join(lines)


def with_lock(
    files: Mapping[str, str],
    inputs: Mapping[str, str],
    solver: Mapping[str, object],
    catalog: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """`files` and the moeplan.lock that describes them: digests of inputs and outputs, solver status.

    `catalog` says which prices there were, if the plan rests on prices; see `older_catalog`.
    """
    lock: dict[str, Any] = {
        "format": _LOCK_FORMAT,
        "generator": _GENERATOR,
        "inputs": dict(inputs),
        "solver": dict(solver),
        "files": {path: _digest(text.encode()) for path, text in files.items()},
    }
    if catalog:
        lock["catalog"] = dict(catalog)
    return {**files, LOCK: to_json(lock)}


class ConflictError(Exception):
    """Writing would destroy what is not ours: files edited by hand, or that no lock lists."""

    def __init__(self, folder: Path, conflicts: Mapping[str, str]) -> None:
        self.conflicts = conflicts
        super().__init__("\n".join(f"{folder / path}: {why}" for path, why in conflicts.items()))


def write(files: Mapping[str, str], folder: Path, force: bool = False) -> list[str]:
    """Make `folder` hold `files`; return the paths that changed.

    A file is written to a temporary name and renamed, and only if its bytes differ. Files that the old
    lock lists and `files` lacks are removed; others are never touched. The lock comes last.
    Raises OSError, and unless `force` ConflictError where a file to replace or remove is not as we wrote it.
    """
    locked = _locked(folder)
    obsolete = [path for path in locked if path not in files]
    if not force and (conflicts := _conflicts(files, folder, locked)):
        raise ConflictError(folder, conflicts)
    changed = []
    for path in sorted(files, key=lambda path: (path == LOCK, path)):
        if write_file(folder / path, files[path].encode()):
            changed.append(path)
    for path in obsolete:
        (folder / path).unlink(missing_ok=True)
        _remove_empty(folder / path, folder)
    return changed + obsolete


def _conflicts(files: Mapping[str, str], folder: Path, locked: Mapping[str, str]) -> dict[str, str]:
    """Paths on disk that differ from what we wrote and from what we would write, and in which way."""
    found = {}
    for path in sorted({*files, *locked} - {LOCK}):
        try:
            have = (folder / path).read_bytes()
        except OSError:
            continue
        if path in locked and _digest(have) != locked[path] and have != files.get(path, "").encode():
            found[path] = "edited by hand"
        elif path not in locked and have != files[path].encode():
            found[path] = "not written by moeplan"
    return found


def check(files: Mapping[str, str], folder: Path) -> list[Drift]:
    """Compare `folder` with `files` without writing; one Drift per file that differs."""
    locked = _locked(folder)
    found = []
    for path, want in sorted(files.items()):
        try:
            on_disk = (folder / path).read_bytes()
        except OSError:
            found.append(Drift(path, "missing", "", want))
            continue
        if on_disk != want.encode() and not (path == LOCK and _same_but_catalog(on_disk, want)):
            edited = path in locked and _digest(on_disk) != locked[path]
            have = on_disk.decode("utf-8", "replace")
            found.append(Drift(path, "edited by hand" if edited else "stale", have, want))
    for path in sorted(locked):
        if path not in files and (folder / path).exists():
            have = (folder / path).read_bytes().decode("utf-8", "replace")
            found.append(Drift(path, "obsolete", have, ""))
    return found


def older_catalog(files: Mapping[str, str], folder: Path) -> str:
    """How the catalog of the plan in `folder` differs from that of `files`; empty: it does not.

    Other prices need not change a plan, so `check` does not count them as drift by themselves.
    """
    had, has = _lock_at(folder).get("catalog"), json.loads(files[LOCK]).get("catalog")
    if not isinstance(had, dict) or has is None or had == has:
        return ""
    age = "an older" if str(had.get("newest")) < has["newest"] else "another"
    return f"compiled against {age} catalog: prices up to {had.get('newest')}, now up to {has['newest']}"


def _same_but_catalog(on_disk: bytes, want: str) -> bool:
    """Whether two locks differ in the catalog only."""
    try:
        had, has = json.loads(on_disk), json.loads(want)
        return {**had, "catalog": None} == {**has, "catalog": None} and ("catalog" in had) == (
            "catalog" in has
        )
    except (ValueError, TypeError):
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _locked(folder: Path) -> dict[str, str]:
    """{path: sha256} of the lock on disk; empty where there is none that can be read."""
    files = _lock_at(folder).get("files")
    return (
        {path: str(sha) for path, sha in files.items() if _is_inside(path)} if isinstance(files, dict) else {}
    )


def _lock_at(folder: Path) -> dict[str, Any]:
    """The lock on disk; empty where there is none that can be read."""
    try:
        lock = json.loads((folder / LOCK).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return lock if isinstance(lock, dict) else {}


def _is_inside(path: str) -> bool:
    """A lock is a file that anyone may edit: it must not make us remove files elsewhere."""
    parts = PurePosixPath(path)
    return not parts.is_absolute() and ".." not in parts.parts and bool(parts.parts)


def write_file(path: Path, data: bytes) -> bool:
    """Write under a temporary name and rename; False where the bytes are there already. Raises OSError."""
    if path.is_file() and path.read_bytes() == data:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another compilation has its own
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _remove_empty(path: Path, folder: Path) -> None:
    """Remove the folders that `path` leaves empty, up to `folder`."""
    for parent in path.parents:
        if parent == folder or any(parent.iterdir()):
            return
        parent.rmdir()
