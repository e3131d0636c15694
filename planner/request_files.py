"""Prompts files (OpenAI batch format) as the planner reads them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.spec import Spec

# English and code run at about four bytes a token with the vocabularies of current models, small
# vocabularies nearer to three; the longest prompt is bounded more carefully than the mean.
_MEAN_BYTES_PER_TOKEN = 3.5
_BOUND_BYTES_PER_TOKEN = 2.0
_DEFAULT_MAX_TOKENS = 16  # OpenAI's default for completions without max_tokens


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
