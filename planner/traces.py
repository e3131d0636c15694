"""Request traces as published: Azure's, Mooncake's or plain CSV, or JSON lines; gzipped or not."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.spec import Spec

_MOST_PROBLEMS = 5
_GZIP = b"\x1f\x8b"
# Burstiness is measured within stretches of a trace, so that a rate that drifts over hours is none.
_STRETCHES = 8
_FEWEST_GAPS = 100

Row = tuple[float, int, int]  # arrival in seconds, prompt tokens, output tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """Requests in the order of their arrival, [n] each; the first of a file arrives at 0.

    `unread` rows of the file are in no array; `first_unread` says where the first is and why.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    unread: int = 0
    first_unread: str = ""

    @property
    def requests(self) -> int:
        return len(self.arrival_s)

    @property
    def rate_per_s(self) -> float:
        """Mean arrivals per second between the first and the last."""
        return (self.requests - 1) / float(self.arrival_s[-1])

    @property
    def arrival_cv(self) -> float:
        """Coefficient of variation of the gaps between arrivals, within stretches of the trace.

        Each stretch, an eighth of the gaps (of at least 100), is compared with its own mean: a Poisson stream
        whose rate drifts over the trace has about 1, not more.
        """
        gaps = np.diff(self.arrival_s)
        stretches = np.array_split(gaps, max(1, min(_STRETCHES, len(gaps) // _FEWEST_GAPS)))
        squares = [(g.var() / g.mean() ** 2, len(g)) for g in stretches if g.mean() > 0]
        return math.sqrt(sum(square * n for square, n in squares) / sum(n for _, n in squares))

    def dispersion(self, window_s: float) -> float:
        """Index of dispersion: variance over mean of the arrivals in windows of `window_s` seconds.

        1 for a Poisson stream; drift over the trace counts, as capacity must be there for it too.
        """
        counts = np.bincount((self.arrival_s / window_s).astype(np.int64))
        return float(counts.var() / counts.mean())

    def at_rate(self, rate_per_s: float) -> RequestTrace:
        """The same requests, all gaps longer or shorter by one factor."""
        return replace(self, arrival_s=self.arrival_s * (self.rate_per_s / rate_per_s))

    def part(self, which: NDArray[np.bool_]) -> RequestTrace:
        """The requests at which `which` [n] is true, when they were."""
        return RequestTrace(
            arrival_s=self.arrival_s[which],
            prompt_tokens=self.prompt_tokens[which],
            output_tokens=self.output_tokens[which],
        )

    def unread_note(self) -> str:
        """What was not read, or nothing."""
        if not self.unread:
            return ""
        return f"{self.unread:,} of {self.requests + self.unread:,} rows not read, first: {self.first_unread}"


def spec_trace(spec: Spec, folder: Path) -> RequestTrace | None:
    """The spec's request trace; None where it has none. Raises CompileError."""
    online = spec.workload.online
    if online is None or not online.trace_file:
        return None
    return read_trace(folder / online.trace_file, spec.span("workload.online.trace"))


def read_trace(path: Path, span: Span) -> RequestTrace:
    """Read the trace at `path`, which `span` names.

    CSV or JSON lines, gzipped or not, with the names of Azure's public traces (TIMESTAMP, ContextTokens,
    GeneratedTokens), of Mooncake's (timestamp in ms, input_length, output_length) or plain ones (arrival_s,
    input_tokens, output_tokens). Single rows that cannot be read are counted. Raises CompileError for a
    file that cannot be read, or of which more than half cannot.
    """
    text = _text(path, span)
    rows: list[Row] = []
    problems: list[Diagnostic] = []
    unread = 0
    try:
        for line, row in _rows(path, text, span):
            if isinstance(row, str):
                unread += 1
                place = Span(str(path), line, 1)
                if unread <= _MOST_PROBLEMS:
                    problems.append(
                        Diagnostic(code="bad-trace", span=place, message=f"cannot read this request: {row}")
                    )
            else:
                rows.append(row)
    except csv.Error as error:
        raise _refusal(span, f"{path}: is no CSV: {error}") from None
    _require(path, span, rows, unread, problems)
    rows.sort()
    arrival, prompt, output = zip(*rows, strict=True)
    first = f"{path.name}:{problems[0].span.line}: {problems[0].message}" if problems else ""
    return RequestTrace(
        arrival_s=np.array(arrival) - arrival[0],
        prompt_tokens=np.array(prompt, np.int64),
        output_tokens=np.array(output, np.int64),
        unread=unread,
        first_unread=first,
    )


def _require(
    path: Path, span: Span, rows: Sequence[Row], unread: int, problems: Sequence[Diagnostic]
) -> None:
    """Raises CompileError where too little of the trace was read."""
    reason = ""
    if unread > len(rows):
        reason = f"{unread:,} of {len(rows) + unread:,} rows cannot be read"
    elif len(rows) < 2:
        reason = "fewer than two requests"
    elif min(rows)[0] == max(rows)[0]:
        reason = "all requests arrive at one instant"
    if reason:
        summary = Diagnostic(code="bad-trace", span=span, message=f"{path}: {reason}")
        raise CompileError(*problems, summary)


def _refusal(span: Span, message: str, hint: str = "") -> CompileError:
    return CompileError(Diagnostic(code="bad-trace", span=span, message=message, hint=hint))


def _text(path: Path, span: Span) -> str:
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text, nor that gzipped"
        raise CompileError(
            Diagnostic(code="unreadable-file", span=span, message=f"trace {path}: {reason}")
        ) from None


def _rows(path: Path, text: str, span: Span) -> Iterator[tuple[int, Row | str]]:
    """By line: a request, or what is wrong with it."""
    if text.lstrip()[:1] == "{":
        return _json_rows(text)
    return _csv_rows(path, text, span)


def _csv_rows(path: Path, text: str, span: Span) -> Iterator[tuple[int, Row | str]]:
    reader = csv.reader(text.splitlines())
    header = [name.strip() for name in next(reader, [])]
    form = next((form for form in _FORMS if set(form) <= set(header)), None)
    if form is None:
        accepted = " or ".join(",".join(form) for form in _FORMS)
        raise _refusal(span, f"{path}: unknown columns", f"the header must have {accepted}")
    seconds, places = _FORMS[form], [header.index(name) for name in form]
    most = max(places)
    for cells in reader:
        if len(cells) > most:
            yield reader.line_num, _row(seconds, *(cells[place] for place in places))
        elif cells:
            yield reader.line_num, f"{len(cells)} cells in this row"


def _json_rows(text: str) -> Iterator[tuple[int, Row | str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            form = next(form for form in _FORMS if set(form) <= set(item))
            yield number, _row(_FORMS[form], *(str(item[name]) for name in form))
        except StopIteration:
            yield number, f"it has none of {' or '.join(','.join(form) for form in _FORMS)}"
        except (ValueError, TypeError, RecursionError):
            yield number, "it is no JSON object"


def _row(seconds: Callable[[str], float], arrival: str, prompt: str, output: str) -> Row | str:
    try:
        sizes = _whole_number(prompt), _whole_number(output)
        if not (0 < sizes[0] < 10**7 and sizes[1] < 10**7):
            return "token counts must be from 1 to 10,000,000"
        return seconds(arrival), sizes[0], max(1, sizes[1])
    except (ValueError, OverflowError) as error:
        return str(error)


_NUMBER = re.compile("[0-9]{1,12}")


def _whole_number(cell: str) -> int:
    if not _NUMBER.fullmatch(cell.strip()):
        raise ValueError(f"{cell[:40]!r} is not a number of tokens")
    return int(cell)


def _plain_seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("the arrival time is not a finite number")
    return value


def _milliseconds(text: str) -> float:
    return _plain_seconds(text) / 1e3


def _moment(text: str) -> float:
    """A timestamp, in seconds (Azure's have seven fractional digits), or a number of seconds."""
    try:
        return _plain_seconds(text)
    except ValueError:
        date, _, fraction = text.partition(".")
        digits = re.match(r"[0-9]*", fraction)
        zone = fraction[digits.end() :] if digits else ""
        moment = datetime.fromisoformat(date + zone)
        utc = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return utc.timestamp() + float(f"0.{digits.group() if digits else 0}0")


# By the names of arrival, prompt and output: how the arrival is read.
_FORMS: dict[tuple[str, str, str], Callable[[str], float]] = {
    ("arrival_s", "input_tokens", "output_tokens"): _plain_seconds,
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): _moment,
    ("timestamp", "input_length", "output_length"): _milliseconds,
}
