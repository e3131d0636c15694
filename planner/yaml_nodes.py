"""Spec text -> a YAML node tree whose every node has a place, or diagnostics. Nothing is constructed.

Anchors, aliases, tags and further documents are refused: a spec is plain data. PyYAML's pure-Python loader is
used on purpose: its C loader crashes on deeply nested text.
"""

from __future__ import annotations

from typing import Any

import yaml

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span

MOST_BYTES = 1 << 20
MOST_DEPTH = 20


def read_nodes(text: str | bytes, path: str) -> yaml.Node:
    """The root node of the one document in `text`; raises CompileError."""
    decoded = _decode(text, path)
    try:
        _check_events(decoded, path)
        root = yaml.compose(decoded, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        raise CompileError(_unreadable(decoded, path, error)) from None
    except yaml.MarkedYAMLError as error:
        raise CompileError(_syntax(path, error)) from None
    if root is None:
        raise _error("empty-file", Span(path), "the file is empty", "a spec needs name, model and workload")
    return root


def place(path: str, mark: Any) -> Span:
    """The span of a PyYAML mark, which counts from 0; the whole file for None."""
    return Span(path, mark.line + 1, mark.column + 1) if mark else Span(path)


def _error(code: str, span: Span, message: str, hint: str = "") -> CompileError:
    return CompileError(Diagnostic(code=code, span=span, message=message, hint=hint))


def _decode(text: str | bytes, path: str) -> str:
    if len(text) > MOST_BYTES:
        raise _error(
            "too-large", Span(path), f"the file has {len(text):,} bytes, at most {MOST_BYTES:,} are read"
        )
    if isinstance(text, str):
        return text.removeprefix("\ufeff")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = text[: error.start]
        span = Span(path, before.count(b"\n") + 1, error.start - before.rfind(b"\n"))
        raise _error("not-utf8", span, "this byte is not UTF-8 text", "save the file as UTF-8") from None


def _check_events(text: str, path: str) -> None:
    """Refuse what plain data does not need, before anything recurses over it."""
    depth = documents = 0
    problems: list[Diagnostic] = []

    def refuse(code: str, message: str, hint: str) -> None:
        span = place(path, event.start_mark)
        problems.append(Diagnostic(code=code, span=span, message=message, hint=hint))

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        documents += isinstance(event, yaml.DocumentStartEvent)
        if documents > 1:
            refuse("second-document", "a spec is one YAML document", "remove this `---`")
            break
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            refuse("anchor", "anchors and aliases are not supported", "write the value out")
        if tag := getattr(event, "tag", None):
            refuse("tag", f"the tag {tag} is not supported", "remove it")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            refuse("too-deep", f"nested more than {MOST_DEPTH} levels deep", "a spec needs six")
            break
    if problems:
        raise CompileError(*problems)


def _syntax(path: str, error: yaml.MarkedYAMLError) -> Diagnostic:
    problem = error.problem or error.context or "not valid YAML"
    hint = "indent with spaces, not tabs" if "\\t" in problem else ""
    if "mapping values are not allowed" in problem:
        hint = "quote a value that holds a colon"
    return Diagnostic(
        code="yaml", span=place(path, error.problem_mark or error.context_mark), message=problem, hint=hint
    )


def _unreadable(text: str, path: str, error: yaml.reader.ReaderError) -> Diagnostic:
    before = text[: error.position]
    span = Span(path, before.count("\n") + 1, error.position - before.rfind("\n"))
    return Diagnostic(code="yaml", span=span, message=f"character {error.character!r} is not allowed in YAML")
