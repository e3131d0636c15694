"""Files of requests as the planner reads them: prompts (OpenAI batch format) and traces (CSV)."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.spec import Spec
from moeplan.planner.ir.workload import Bucket

_T = TypeVar("_T")

# English and code run at about four bytes a token with the vocabularies of current models, small
# vocabularies nearer to three; the longest prompt is bounded more carefully than the mean.
_MEAN_BYTES_PER_TOKEN = 3.5
_BOUND_BYTES_PER_TOKEN = 2.0
_DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions without max_tokens
_TRACE_COLUMNS = (
    ("arrival_s", "input_tokens", "output_tokens"),
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
)
_PROMPT_BANDS, _OUTPUT_BANDS = 4, 3
_MOST_PROBLEMS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsFile:
    """What the planner learns from a file of requests, without a tokenizer."""

    requests: int
    unreadable: int
    min_prompt_tokens: int
    mean_prompt_tokens: float
    max_prompt_tokens: int
    mean_output_tokens: float
    max_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Request sizes and arrivals of a trace, in buckets evaluated at their means."""

    buckets: tuple[Bucket, ...]
    max_prompt_tokens: int
    max_output_tokens: int
    rate_per_s: float
    arrival_cv: float


def read_input(path: Path, span: Span, what: str) -> str:
    """The text of a file that the spec names at `span`. Raises CompileError there if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise CompileError(
            Diagnostic(code="unreadable-file", span=span, message=f"{what} {path}: {reason}")
        ) from None


def read_prompts(spec: Spec, folder: Path) -> PromptsFile | None:
    """Sizes of the requests of the spec's prompts file; None where it has none. Raises CompileError."""
    batch = spec.workload.batch
    if batch is None or not batch.prompts_file:
        return None
    span = spec.span("workload.batch.prompts")
    path = folder / batch.prompts_file
    lines = [line for line in read_input(path, span, "prompts file").split("\n") if line.strip()]
    sizes = [size for line in lines if (size := _request_size(line))]
    if not sizes:
        raise CompileError(
            Diagnostic(
                code="no-requests",
                span=span,
                message=f"{path} holds no request that can be read",
                hint="one JSON object a line, as in the OpenAI batch format: custom_id, url, body",
            )
        )
    prompt_bytes, outputs = [p for p, _ in sizes], [o for _, o in sizes]
    return PromptsFile(
        requests=len(sizes),
        unreadable=len(lines) - len(sizes),
        min_prompt_tokens=max(1, math.floor(min(prompt_bytes) / _MEAN_BYTES_PER_TOKEN)),
        mean_prompt_tokens=max(1.0, sum(prompt_bytes) / len(sizes) / _MEAN_BYTES_PER_TOKEN),
        max_prompt_tokens=math.ceil(max(prompt_bytes) / _BOUND_BYTES_PER_TOKEN) + 8,
        mean_output_tokens=max(1.0, sum(outputs) / len(sizes)),
        max_output_tokens=max(outputs),
    )


def _request_size(line: str) -> tuple[int, int] | None:
    """(prompt bytes, output tokens) of one request line; None for one that the runtime will refuse."""
    try:
        body = json.loads(line)["body"]
        text = body["prompt"] if "prompt" in body else "".join(str(m["content"]) for m in body["messages"])
        wanted = body.get("max_tokens") or body.get("max_completion_tokens") or _DEFAULT_MAX_TOKENS
        if isinstance(text, str) and isinstance(wanted, int) and 0 < wanted < 10**7:
            return len(text.encode("utf-8", "replace")), wanted
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def read_trace(spec: Spec, folder: Path) -> Trace | None:
    """Sizes and arrivals of the spec's request trace; None where it has none. Raises CompileError."""
    online = spec.workload.online
    if online is None or not online.trace_file:
        return None
    span = spec.span("workload.online.trace")
    path = folder / online.trace_file
    rows = _trace_rows(path, read_input(path, span, "trace"), span)
    rows.sort()
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(rows)]
    mean_gap = sum(gaps) / len(gaps)
    if mean_gap <= 0:
        raise CompileError(
            Diagnostic(code="bad-trace", span=span, message=f"{path}: all requests arrive at one instant")
        )
    variance = sum((gap - mean_gap) ** 2 for gap in gaps) / len(gaps)
    return Trace(
        buckets=_buckets([(prompt, output) for _, prompt, output in rows]),
        max_prompt_tokens=max(prompt for _, prompt, _ in rows),
        max_output_tokens=max(output for _, _, output in rows),
        rate_per_s=1.0 / mean_gap,
        arrival_cv=math.sqrt(variance) / mean_gap,
    )


def _trace_rows(path: Path, text: str, span: Span) -> list[tuple[float, int, int]]:
    """(arrival in seconds, prompt tokens, output tokens) per row; every bad row is reported by line."""
    try:
        return _checked_rows(path, csv.DictReader(text.splitlines()), span)
    except csv.Error as error:
        raise CompileError(
            Diagnostic(code="bad-trace", span=span, message=f"{path}: is no CSV: {error}")
        ) from None


def _checked_rows(path: Path, reader: csv.DictReader[str], span: Span) -> list[tuple[float, int, int]]:
    columns = next((c for c in _TRACE_COLUMNS if set(c) <= set(reader.fieldnames or ())), None)
    if columns is None:
        accepted = " or ".join(",".join(c) for c in _TRACE_COLUMNS)
        raise CompileError(
            Diagnostic(
                code="bad-trace",
                span=span,
                message=f"{path}: unknown columns",
                hint=f"the header must have {accepted}",
            )
        )
    rows, problems = [], []
    for row in reader:
        try:
            rows.append(_trace_row([row[c] for c in columns]))
        except (ValueError, TypeError, OverflowError) as error:
            place = Span(str(path), reader.line_num, 1)
            problems.append(
                Diagnostic(code="bad-trace", span=place, message=f"cannot read this request: {error}")
            )
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        note = [Diagnostic(code="bad-trace", span=span, message=f"{path}: {more} more rows cannot be read")]
        raise CompileError(*problems[:_MOST_PROBLEMS], *(note if more > 0 else []))
    if len(rows) < 2:
        raise CompileError(
            Diagnostic(code="bad-trace", span=span, message=f"{path}: fewer than two requests")
        )
    return rows


def _trace_row(cells: list[str]) -> tuple[float, int, int]:
    prompt, output = _whole_number(cells[1]), _whole_number(cells[2])
    if not (0 < prompt < 10**7 and 0 <= output < 10**7):
        raise ValueError("token counts must be from 1 to 10,000,000")
    return _seconds(cells[0]), prompt, max(1, output)


def _whole_number(cell: str | None) -> int:
    if cell is None or not re.fullmatch("[0-9]{1,12}", cell.strip()):
        raise ValueError(f"{cell!r} is not a number of tokens")
    return int(cell)


def _seconds(text: str) -> float:
    """A number of seconds, or a timestamp (Azure's traces have seven fractional digits)."""
    try:
        value = float(text)
    except ValueError:
        date, _, fraction = text.partition(".")
        digits = re.match(r"[0-9]*", fraction)
        zone = fraction[digits.end() :] if digits else ""
        moment = datetime.fromisoformat(date + zone)
        utc = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return utc.timestamp() + float(f"0.{digits.group() if digits else 0}0")
    if not math.isfinite(value):
        raise ValueError("the arrival time is not a finite number")
    return value


def _buckets(sizes: list[tuple[int, int]]) -> tuple[Bucket, ...]:
    """Equal-count bands of prompt length, each cut into bands of output length, at the bands' means."""
    return tuple(
        Bucket(
            prompt_tokens=sum(p for p, _ in cell) / len(cell),
            output_tokens=sum(o for _, o in cell) / len(cell),
            share=len(cell) / len(sizes),
        )
        for band in _bands(sorted(sizes), _PROMPT_BANDS)
        for cell in _bands(sorted(band, key=lambda size: (size[1], size[0])), _OUTPUT_BANDS)
    )


def _bands(items: list[_T], count: int) -> Iterable[list[_T]]:
    edges = [round(i * len(items) / count) for i in range(count + 1)]
    return (items[a:b] for a, b in itertools.pairwise(edges) if b > a)
