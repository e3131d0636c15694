"""profile.csv: the user's own measurements, as the planner reads them and as `moeplan run` adds to them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.machine import Machine
from moeplan.planner.ir.policy import Engine
from moeplan.planner.ir.profile import FIGURES, FigureName
from moeplan.planner.request_files import read_input
from moeplan.planner.suggest import nearest

POINT_COLUMNS = ("machine", "model", "engine", "gpus", "prompt_tokens", "output_tokens", "batch")
COLUMNS = (*POINT_COLUMNS, *FIGURES)
_ENGINES: tuple[Engine, ...] = get_args(Engine)
_CELL = re.compile(r'\s*"((?:[^"]|"")*)"\s*(?=,|$)|([^,]*)')
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?", re.ASCII)
_MOST_GPUS, _MOST_TOKENS, _MOST_SEQUENCES = 1024, 10**7, 10**6

_Cells = Mapping[str, tuple[str, Span]]  # column -> text and place


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRow:
    """One measured point: `batch` requests in flight on one copy of the model over `gpus` GPUs.

    Token counts are means. `figures` holds what was measured, of one copy; `line` is the row's place, 0 for
    a row that is in no file yet.
    """

    line: int = 0
    machine: str
    model: str
    engine: Engine
    gpus: int
    prompt_tokens: float
    output_tokens: float
    batch: int
    figures: Mapping[FigureName, float]

    @property
    def point(self) -> tuple[str, str, str, int, float, float, int]:
        """What was measured on what; no two rows of a profile share it."""
        return (
            self.machine,
            self.model,
            self.engine,
            self.gpus,
            self.prompt_tokens,
            self.output_tokens,
            self.batch,
        )


def read_profile(
    path: Path, span: Span, machines: Mapping[str, Machine], models: Sequence[str]
) -> tuple[ProfileRow, ...]:
    """The rows of a profile. Raises CompileError with every problem of the file, by line and column.

    `machines` and `models` are the names that a row may have; `span` is where the spec names the file.
    """
    header, lines = _split(read_input(path, span, "profile"), str(path))
    reader = _Reader(machines, models)
    rows = [row for line in lines if (row := reader.row(header, line, str(path)))]
    reader.refuse_duplicates(rows, str(path))
    if not lines:
        reader.problem(Span(str(path), 1, 1), "empty-profile", "the profile has a header and no rows")
    if reader.problems:
        raise CompileError(*reader.problems)
    return tuple(rows)


def read_text(path: Path) -> str:
    """A profile to add a row to; only its header where there is none yet.

    Raises OSError, and CompileError where the text is no CSV with the header of a profile.
    """
    try:
        text = path.read_text(encoding="utf-8-sig") if path.exists() else ""
    except UnicodeDecodeError:
        problem = Diagnostic(code="unreadable-file", span=Span(str(path)), message="is not UTF-8 text")
        raise CompileError(problem) from None
    text = text if text.strip() else ",".join(COLUMNS) + "\n"
    _split(text, str(path))
    return text


def with_row(text: str, path: str, row: ProfileRow) -> str:
    """`text` with `row` in place of the row of the same point, or at the end; raises as `read_text` does."""
    header, lines = _split(text, path)
    wanted = _row_text(header, row)
    kept = text.rstrip("\n").split("\n")
    points = {number: _key(header, line) for number, line in lines}
    same = [number for number, key in points.items() if key == _key(header, wanted)]
    for number in same:
        kept[number - 1] = wanted
    return "\n".join(kept if same else [*kept, wanted]) + "\n"


def _row_text(header: Sequence[tuple[int, str]], row: ProfileRow) -> str:
    values: dict[str, str] = {
        "machine": row.machine,
        "model": row.model,
        "engine": row.engine,
        "gpus": str(row.gpus),
        "prompt_tokens": f"{row.prompt_tokens:.6g}",
        "output_tokens": f"{row.output_tokens:.6g}",
        "batch": str(row.batch),
    }
    for figure, value in row.figures.items():
        values[figure] = f"{value:.6g}"
    return ",".join(_quoted(values.get(name, "")) for _, name in header)


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if "," in cell or '"' in cell else cell


def _key(header: Sequence[tuple[int, str]], line: str) -> tuple[str | float, ...]:
    """What identifies a row's point, whichever way its numbers are written."""
    cells = dict(zip((name for _, name in header), (text for _, text in _cells(line)), strict=False))
    return tuple(_number_or_text(cells.get(name, "")) for name in POINT_COLUMNS)


def _number_or_text(text: str) -> str | float:
    return float(text) if _NUMBER.fullmatch(text) else text


def _split(text: str, path: str) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
    """The header's (column, name) and the other lines with their numbers; raises CompileError."""
    lines = [
        (number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip("\r ,")
    ]
    place = Span(path, lines[0][0], 1) if lines else Span(path)
    header = _cells(lines[0][1]) if lines else []
    names = [name for _, name in header]
    problems = [
        Diagnostic(
            code="missing-column",
            span=place,
            message=f"the header has no column {name!r}" if lines else f"empty: no column {name!r}",
            hint=f"the columns are {', '.join(COLUMNS)}",
        )
        for name in POINT_COLUMNS
        if name not in names
    ]
    if lines and not set(FIGURES) & set(names):
        message = "the header has no measured figure"
        problems.append(Diagnostic(code="missing-column", span=place, message=message, hint=_figures_hint()))
    for at, (column, name) in enumerate(header):
        span = Span(path, lines[0][0], column)
        if name not in COLUMNS:
            hint = nearest(name, COLUMNS, f"the columns are {', '.join(COLUMNS)}")
            problems.append(
                Diagnostic(code="unknown-column", span=span, message=f"unknown column {name!r}", hint=hint)
            )
        elif name in names[:at]:
            problems.append(
                Diagnostic(code="repeated-column", span=span, message=f"column {name!r} comes twice")
            )
    if problems:
        raise CompileError(*problems)
    return header, lines[1:]


def _cells(line: str) -> list[tuple[int, str]]:
    """(column, text) of each cell of one line of CSV; a quoted cell may hold commas."""
    cells, at = [], 0
    while at <= len(line):
        found = _CELL.match(line, at)
        assert found is not None  # the second alternative takes anything up to a comma
        quoted, plain = found.groups()
        lead = 0 if quoted is not None else len(plain) - len(plain.lstrip())
        cells.append((at + lead + 1, plain.strip() if quoted is None else quoted.replace('""', '"')))
        at = found.end() + 1
    return cells


def _figures_hint() -> str:
    return f"at least one of {', '.join(FIGURES)}"


class _Reader:
    """Turns lines into rows and collects what is wrong with them."""

    def __init__(self, machines: Mapping[str, Machine], models: Sequence[str]) -> None:
        self.machines, self.models = machines, models
        self.problems: list[Diagnostic] = []

    def problem(self, span: Span, code: str, message: str, hint: str = "") -> None:
        self.problems.append(Diagnostic(code=code, span=span, message=message, hint=hint))

    def row(self, header: Sequence[tuple[int, str]], line: tuple[int, str], path: str) -> ProfileRow | None:
        """The row of a line; None, and problems, where it cannot be read."""
        number, text = line
        before, found = len(self.problems), _cells(text)
        if len(found) != len(header):
            message = f"{len(found)} cells under a header of {len(header)}"
            self.problem(Span(path, number, 1), "bad-row", message)
            return None
        cells = {
            name: (cell, Span(path, number, column))
            for (_, name), (column, cell) in zip(header, found, strict=True)
        }
        machine = self._name("machine", cells, self.machines)
        model = self._name("model", cells, self.models)
        engine = self._name("engine", cells, _ENGINES)
        gpus = self._gpus(cells, machine, engine)
        prompt = self._number("prompt_tokens", cells, 1.0, _MOST_TOKENS)
        output = self._number("output_tokens", cells, 1.0, _MOST_TOKENS)
        batch = self._whole("batch", cells, 1, _MOST_SEQUENCES)
        figures = self._figures(cells, Span(path, number, 1))
        if len(self.problems) > before:
            return None
        return ProfileRow(
            line=number,
            machine=machine,
            model=model,
            engine=cast(Engine, engine),
            gpus=gpus,
            prompt_tokens=prompt,
            output_tokens=output,
            batch=batch,
            figures=figures,
        )

    def _name(self, column: str, cells: _Cells, known: Sequence[str] | Mapping[str, object]) -> str:
        text, span = cells[column]
        if text not in known:
            lists = f"`moeplan catalog {column}s` lists them"
            others = f"one of {', '.join(_ENGINES)}" if column == "engine" else lists
            self.problem(
                span, f"unknown-{column}", f"no {column} named {text!r}", nearest(text, known, others)
            )
        return text

    def _gpus(self, cells: _Cells, machine: str, engine: str) -> int:
        """GPUs of one copy of the model: none only under runtime_min, no more than the machine has."""
        gpus = self._whole("gpus", cells, 0, _MOST_GPUS)
        span, found = cells["gpus"][1], self.machines.get(machine)
        if found and gpus > found.gpus:
            self.problem(span, "bad-value", f"gpus: {machine} has {found.gpus}, not {gpus}")
        elif engine == "vllm" and gpus == 0:
            self.problem(span, "bad-value", "gpus: vLLM needs at least one")
        return gpus

    def _whole(self, column: str, cells: _Cells, low: int, high: int) -> int:
        text, span = cells[column]
        if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
            self.problem(
                span, "bad-value", f"{column}: {text!r} is not a whole number from {low} to {high:,}"
            )
            return low
        return int(text)

    def _number(self, column: str, cells: _Cells, low: float, high: float) -> float:
        text, span = cells[column]
        value = _number_or_text(text)
        if not isinstance(value, float) or not low <= value <= high:
            self.problem(
                span, "bad-value", f"{column}: {text!r} is not a number from {low:.0f} to {high:,.0f}"
            )
            return low
        return value

    def _figures(self, cells: _Cells, place: Span) -> dict[FigureName, float]:
        """What was measured; an empty cell was not."""
        figures: dict[FigureName, float] = {}
        for name in FIGURES:
            text, span = cells.get(name, ("", place))
            value = _number_or_text(text)
            if isinstance(value, float) and 0 < value < math.inf:
                figures[name] = value
            elif text:
                hint = "leave the cell empty where nothing was measured"
                self.problem(span, "bad-value", f"{name}: {text!r} is not a number above 0", hint)
        if not figures and not any(cells.get(name, ("", place))[0] for name in FIGURES):
            self.problem(place, "nothing-measured", "a row without a measured figure", _figures_hint())
        return figures

    def refuse_duplicates(self, rows: Sequence[ProfileRow], path: str) -> None:
        """Two rows of one point contradict each other, or one of them is idle."""
        first: dict[object, int] = {}
        for row in rows:
            if row.point in first:
                message = f"the same machine, model, engine, sizes and batch as line {first[row.point]}"
                self.problem(Span(path, row.line, 1), "duplicate-row", message, "keep one, or their mean")
            first.setdefault(row.point, row.line)
