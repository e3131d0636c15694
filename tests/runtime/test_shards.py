"""A batch file divided and put together again: each request exactly once, in its place."""

from __future__ import annotations

import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime_min.__main__ import main
from moeplan.runtime_min.errors import RunError
from moeplan.runtime_min.shards import merge, split

texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def write_batch(path: Path, names: list[str]) -> Path:
    path.write_text(
        "".join(json.dumps({"custom_id": name, "body": {"prompt": name}}) + "\n" for name in names)
    )
    return path


def record(line: int, name: str, text: str, error: object = None) -> str:
    body = {"id": f"batch_req_{line}", "custom_id": name, "response": text, "error": error}
    return json.dumps(body) + "\n"


def names_in(path: Path) -> list[str]:
    return [json.loads(line)["custom_id"] for line in path.read_text().splitlines()]


@settings(max_examples=25)
@given(st.lists(texts, unique=True, min_size=1, max_size=40), st.integers(1, 9), st.randoms())
def test_every_request_once(names: list[str], parts: int, draw: random.Random) -> None:
    """Whatever the ids: split, answer the parts in any order and some of them twice, merge."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        source = write_batch(folder / "in.jsonl", names)
        count = split(source, folder / "parts", parts)
        files = sorted((folder / "parts").iterdir())
        assert len(files) == count <= parts
        assert sorted(name for file in files for name in names_in(file)) == sorted(names)
        (folder / "answers").mkdir()
        for n, file in enumerate(draw.sample(files + files[:1], len(files) + 1)):
            lines = [record(i, name, name) for i, name in enumerate(names_in(file), start=1)]
            (folder / "answers" / f"{n}.jsonl").write_text("".join(lines))
        assert merge(source, folder / "answers", folder / "out.jsonl") == 0
        records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        assert [(r["custom_id"], r["response"]) for r in records] == [(name, name) for name in names]
        assert [r["id"] for r in records] == [f"batch_req_{n + 1}" for n in range(len(names))]


def test_more_requests_move_none(tmp_path: Path) -> None:
    """A part depends on the custom_id alone: a longer file keeps every request where it was."""
    split(write_batch(tmp_path / "a", [f"r{n}" for n in range(50)]), tmp_path / "one", 7)
    split(write_batch(tmp_path / "b", [f"r{n}" for n in range(80)]), tmp_path / "two", 7)
    for part in (tmp_path / "one").iterdir():
        assert set(names_in(part)) <= set(names_in(tmp_path / "two" / part.name))


def test_answers_before_errors(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", ["a", "b"])
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "1.jsonl").write_text(record(1, "a", "", "no") + record(2, "b", "", "no"))
    (tmp_path / "answers" / "2.jsonl").write_text(record(1, "b", "yes") + record(2, "b", "again"))
    assert merge(source, tmp_path / "answers", tmp_path / "out.jsonl") == 1
    records = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["response"] for line in records] == ["", "yes"]


def test_other_engines_keep_their_identifiers(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", ["a"])
    (tmp_path / "answers").mkdir()
    line = json.dumps({"id": "vllm-3f", "custom_id": "a", "response": {}, "error": None})
    (tmp_path / "answers" / "1.jsonl").write_text(line + "\n")
    merge(source, tmp_path / "answers", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["id"] == "vllm-3f"


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (record(1, "a", "x"), "has no answer to: 'b', 'c', 'd' and 1 more"),
        (record(1, "z", "x"), "has no such request: .*1.jsonl:1: 'z'"),
        (record(1, "a", "x") + '{"custom', "1.jsonl:2: is not a record"),
    ],
)
def test_nothing_is_written_of_a_merge_that_fails(tmp_path: Path, answers: str, message: str) -> None:
    source = write_batch(tmp_path / "in.jsonl", list("abcde"))
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "1.jsonl").write_text(answers)
    with pytest.raises(RunError, match=message):
        merge(source, tmp_path / "answers", tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers", "in.jsonl"]


def test_requests_without_an_id_of_their_own(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"custom_id": "a"}\n{"custom_id": "a"}\n{}\n[1]\nnot JSON\n{"custom_id": ""}\n')
    with pytest.raises(RunError, match="no custom_id of its own: line 2, line 3, line 4 and 2 more"):
        split(source, tmp_path / "parts", 2)
    assert not (tmp_path / "parts").exists()


def test_a_folder_of_other_parts_is_left_alone(tmp_path: Path) -> None:
    source = write_batch(tmp_path / "in.jsonl", ["a", "b"])
    split(source, tmp_path / "parts", 1)
    with pytest.raises(RunError, match="holds parts already"):
        split(source, tmp_path / "parts", 2)
    assert names_in(tmp_path / "parts" / "part-00000.jsonl") == ["a", "b"]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_batch(tmp_path / "in.jsonl", ["a", "b"])
    assert main(["split", str(source), str(tmp_path / "parts"), "--parts", "1"]) == 0
    assert main(["merge", str(source), str(tmp_path / "parts"), "--output", str(tmp_path / "o.jsonl")]) == 0
    assert main(["merge", str(source), str(tmp_path / "none"), "--output", str(tmp_path / "p.jsonl")]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["split", str(source), str(tmp_path / "more"), "--parts", "0"])
    said = capsys.readouterr()
    assert "wrote 1 parts" in said.out
    assert "has no answer to: 'a', 'b'" in said.err
    assert "is not a number from 1" in said.err
