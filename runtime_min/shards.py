"""One batch file for several machines: parts by custom_id, and their answers put together again.

A part is written whole or not at all, and answers of any number of runs may be merged: each request gets
exactly one record, in the order of the batch file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeplan.runtime_min.batch_file import record_line
from moeplan.runtime_min.errors import RunError, replaced, written

_SHOWN = 3  # problems of a kind that a message names


def split(input: Path, folder: Path, parts: int) -> int:
    """Write folder/part-NNNNN.jsonl, each request in the part that its custom_id hashes to; return how many.

    Parts that would be empty are left out. Raises RunError where a request has no custom_id of its own, or
    the folder holds parts already: answers to other parts would be taken for answers to these.
    """
    if any(folder.glob("part-*.jsonl")):
        raise RunError(f"{folder}: holds parts already", "name a folder of its own for each batch")
    texts: dict[int, list[bytes]] = {}
    for identity, _, line in _requests(input):
        texts.setdefault(zlib.crc32(identity.encode()) % parts, []).append(line)
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, lines in sorted(texts.items()):
            with replaced(folder / f"part-{number:05}.jsonl") as file:
                file.writelines(lines)
    return len(texts)


def merge(input: Path, answers: Path, output: Path) -> int:
    """Write one record per request of `input`, from all answers/*.jsonl; return how many are errors.

    Of several records of one request an answer counts before an error, then the first in the order of file
    names. Raises RunError, and writes nothing, where a request has no record or a record no request.
    """
    lines = {identity: number for identity, number, _ in _requests(input)}
    found: dict[str, tuple[bool, bytes]] = {}  # by custom_id: whether it is an answer, and the record
    unknown = []
    for path in sorted(answers.glob("*.jsonl")):
        for place, record in _records(path):
            identity = record.get("custom_id")
            if not isinstance(identity, str) or identity not in lines:
                unknown.append(f"{place}: {identity!r}")
                continue
            answered = not record.get("error")
            if identity not in found or (answered and not found[identity][0]):
                found[identity] = answered, _numbered(record, lines[identity])
    missing = [repr(identity) for identity in lines if identity not in found]
    _refuse(f"{input} has no such request", unknown, "merge answers to this batch file only")
    _refuse(f"{answers} has no answer to", missing, "the same jobs, started again, do what is left")
    with replaced(output) as file:
        file.writelines(found[identity][1] for identity in lines)
    return sum(not answered for answered, _ in found.values())


def _refuse(what: str, cases: list[str], hint: str) -> None:
    if cases:
        more = f" and {len(cases) - _SHOWN} more" if len(cases) > _SHOWN else ""
        raise RunError(f"{what}: {', '.join(cases[:_SHOWN])}{more}", hint)


def _requests(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """custom_id, line number and text of every request; raises RunError after the last if one lacks an id."""
    seen: set[str] = set()
    problems = []
    for number, line in _lines(path):
        try:
            identity = json.loads(line.decode("utf-8-sig"))["custom_id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            identity = None
        if not isinstance(identity, str) or not identity or identity in seen:
            problems.append(f"line {number}")
            continue
        seen.add(identity)
        yield identity, number, line if line.endswith(b"\n") else line + b"\n"
    _refuse(f"{path}: no custom_id of its own", problems, "number the requests")


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise RunError(f"{path}:{number}: is not a record", "remove the file: its part is done again")
        yield f"{path}:{number}", record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None


def _numbered(record: dict[str, Any], line: int) -> bytes:
    """The record, with the request's line in the whole file where runtime_min wrote its line in the part."""
    with suppress(KeyError, TypeError, ValueError, AttributeError):  # another engine's identifier
        record_line(record)
        record = {**record, "id": f"batch_req_{line}"}
    return json.dumps(record).encode() + b"\n"
