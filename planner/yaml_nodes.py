"""Spec text -> a YAML node tree whose every node has a place, or diagnostics. Nothing is constructed.

Anchors, aliases, tags and further documents are refused: a spec is plain data. PyYAML's pure-Python loader is
used on purpose: its C loader crashes on deeply nested text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span

MOST_BYTES = 1 << 20
MOST_DEPTH = 20
MOST_VALUES = 20_000
_UNNAMED = "<unicode string>"  # what PyYAML calls a text without a name


def read_nodes(text: str | bytes, path: str) -> tuple[yaml.Node | None, list[Diagnostic]]:
    """The root node of the one document in `text`, and what stands in it that plain data does not need.

    No root where those problems make the tree unfit to walk. Raises CompileError where there is no tree.
    """
    decoded = _decode(text, path)
    try:
        problems, walkable = _check_events(decoded, path)
        root = _compose(decoded, path) if walkable else None
    except yaml.reader.ReaderError as error:
        raise CompileError(_unreadable(decoded, path, error)) from None
    except yaml.MarkedYAMLError as error:
        raise CompileError(_syntax(path, error)) from None
    except (ValueError, OverflowError):
        # PyYAML converts escapes and version numbers unchecked: "\\UFFFFFFFF", %YAML 1.999...
        raise _error("yaml", Span(path), "an escape or version number is out of range") from None
    if root is None and not problems:
        raise _error("empty-file", Span(path), "the file is empty", "a spec needs name, model and workload")
    return root, problems


def place(path: str, mark: Any) -> Span:
    """The span of a PyYAML mark, which counts from 0; the whole file `path` for None.

    A mark knows the text that it is in: not every node of a tree need be of one file.
    """
    if not mark:
        return Span(path)
    return Span(path if mark.name == _UNNAMED else mark.name, mark.line + 1, mark.column + 1)


def _compose(text: str, path: str) -> yaml.Node | None:
    """The tree of `text`, `path` in all its marks."""
    loader = yaml.SafeLoader(text)
    loader.name = path
    try:
        root: yaml.Node | None = loader.get_single_node()
        return root
    finally:
        loader.dispose()


def _error(code: str, span: Span, message: str, hint: str = "") -> CompileError:
    return CompileError(Diagnostic(code=code, span=span, message=message, hint=hint))


def _decode(text: str | bytes, path: str) -> str:
    if len(text) > MOST_BYTES:
        raise _error(
            "too-large", Span(path), f"the file has {len(text):,} bytes, at most {MOST_BYTES:,} are read"
        )
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            good = error.object[: error.start]
            span = Span(path, good.count(b"\n") + 1, error.start - good.rfind(b"\n"))
            raise _error("not-utf8", span, "this byte is not UTF-8 text", "save the file as UTF-8") from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if found := re.search("[\x85\u2028\u2029]", text):  # line ends to YAML 1.1, to editors not
        before = text[: found.start()]
        span = Span(path, before.count("\n") + 1, found.start() - before.rfind("\n"))
        raise _error("yaml", span, f"character U+{ord(found.group()):04X} is not allowed", "remove it")
    return text


def _check_events(text: str, path: str) -> tuple[list[Diagnostic], bool]:
    """What plain data does not need, found before anything recurses over it; and whether a tree is fit to."""
    depth = documents = values = 0
    problems: list[Diagnostic] = []

    def refuse(code: str, message: str, hint: str) -> None:
        span = place(path, event.start_mark)
        problems.append(Diagnostic(code=code, span=span, message=message, hint=hint))

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        values += isinstance(event, yaml.NodeEvent)
        if documents > 1:
            refuse("second-document", "a spec is one YAML document", "remove this `---`")
        elif depth > MOST_DEPTH:
            refuse("too-deep", f"nested more than {MOST_DEPTH} levels deep", "a spec needs six")
        elif values > MOST_VALUES:
            refuse(
                "too-many-values", f"more than {MOST_VALUES:,} keys and values", "a spec needs a few dozen"
            )
        else:
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                refuse("anchor", "anchors and aliases are not supported", "write the value out")
            if tag := getattr(event, "tag", None):
                refuse("tag", f"the tag {tag} is not supported", "remove it")
            continue
        return problems, False
    return problems, not any(problem.code == "anchor" for problem in problems)


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
