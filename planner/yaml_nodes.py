"""YAML text -> a tree of values that know their place, with everything refused noted at its place.

Only plain data is read: no anchors, aliases, merge keys, tags or second documents. YAML 1.1 and 1.2
disagree on what `on`, `010`, `12:30` or `2e9` are, so a scalar says in which `form` it is written and the
kind of its field decides.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span

BYTES_LIMIT = 2**20
DEPTH_LIMIT = 20
VALUES_LIMIT = 20_000

# "ambiguous" is what YAML readers read differently; "refused" has been noted as a problem already.
Form = Literal["text", "number", "bool", "null", "ambiguous", "refused"]

_NUMBER = re.compile(
    r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_BOOL = re.compile("true|True|TRUE|false|False|FALSE")
_OCTAL = re.compile(r"[-+]?0o[0-7]+")
# YAML allows no other characters. U+0085, U+2028 and U+2029 are line breaks to some readers only.
_REFUSED = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_LINE_BREAK = re.compile("\r\n|\r|\n")
_YAML = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Scalar:
    """One value. `text` is as written; quoted values are always text."""

    text: str
    form: Form
    span: Span

    @property
    def number(self) -> float:
        """The value of a number; infinite where it is too large to hold."""
        return float(self.text.lower().replace(".inf", "inf").replace(".nan", "nan"))


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list."""

    items: tuple[Node, ...]
    span: Span


@dataclass(frozen=True, slots=True)
class Mapped:
    """A group of keys, with the place of each key."""

    entries: Mapping[str, Node]
    key_spans: Mapping[str, Span]
    span: Span


Node = Scalar | Sequence | Mapped


@dataclass(frozen=True, slots=True)
class Document:
    """The tree of a file (None if there is none to go on with) and what is wrong with its YAML."""

    root: Node | None
    problems: tuple[Diagnostic, ...]


def read_yaml(text: str | bytes, path: str) -> Document:
    """Read one YAML file; any text or bytes whatever give a Document."""
    composer: _Composer | None = None
    try:
        composer = _Composer(_decoded(text, path), path)
        return Document(composer.document(), tuple(composer.problems))
    except CompileError as error:
        found = composer.problems if composer else []
        return Document(None, (*found, *error.diagnostics))


def _decoded(text: str | bytes, path: str) -> str:
    """The characters of the file; raises CompileError if they cannot be YAML."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > BYTES_LIMIT:
        raise _error("file-too-large", Span(path), f"the file is larger than {BYTES_LIMIT // 2**20} MiB")
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _error(
            "byte-order-mark",
            Span(path, 1, 1),
            "the file starts with a byte order mark",
            "save it as UTF-8 without BOM",
        )
    try:
        characters = data.decode("utf-8", "surrogatepass" if isinstance(text, str) else "strict")
    except UnicodeDecodeError as error:
        place = _place(path, data[: error.start].decode("utf-8"))
        message = f"byte 0x{data[error.start]:02x} is not UTF-8 text"
        raise _error("not-utf-8", place, message, "save the file as UTF-8") from None
    if refused := _REFUSED.search(characters):
        place = _place(path, characters[: refused.start()])
        raise _error("bad-character", place, f"character U+{ord(refused[0]):04X} is not allowed", "remove it")
    return characters


def _place(path: str, before: str) -> Span:
    """The place right after the text `before`."""
    lines = _LINE_BREAK.split(before)
    return Span(path, len(lines), len(lines[-1]) + 1)


def _error(code: str, span: Span, message: str, hint: str = "") -> CompileError:
    return CompileError(Diagnostic(code=code, span=span, message=message, hint=hint))


class _Composer:
    """Builds the tree from the parser's events, so that nothing is ever constructed from a tag."""

    def __init__(self, text: str, path: str) -> None:
        self.problems: list[Diagnostic] = []
        self._path = path
        self._values = 0
        # The C parser words its errors differently; this one is the same on every machine.
        self._loader = yaml.SafeLoader(text)

    def document(self) -> Node | None:
        """The one document; raises CompileError where reading cannot go on."""
        self._next()
        if isinstance(self._next(), yaml.StreamEndEvent):
            raise _error("empty-file", Span(self._path), "the file is empty", _SMALLEST)
        root = self._node(self._next(), depth=1)
        self._next()
        if not isinstance(event := self._next(), yaml.StreamEndEvent):
            hint = "keep what is above this line and move the rest to a file of its own"
            self._refuse("several-documents", self._span(event), "a second document starts here", hint)
        if isinstance(root, Scalar) and root.form == "null" and not root.text:
            raise _error("empty-file", Span(self._path), "the file is empty", _SMALLEST)
        return root

    def _node(self, event: yaml.Event, depth: int) -> Node:
        self._count(event, depth)
        refused = self._refuse_extras(event)
        span = self._span(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return Sequence(self._items(depth), span)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(span, depth)
        if refused or not isinstance(event, yaml.ScalarEvent):
            return Scalar("", "refused", span)
        return self._scalar(event, span)

    def _items(self, depth: int) -> tuple[Node, ...]:
        items = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return tuple(items)

    def _mapping(self, span: Span, depth: int) -> Mapped:
        entries: dict[str, Node] = {}
        key_spans: dict[str, Span] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            value = self._node(self._next(), depth + 1)
            if isinstance(key, Scalar) and self._usable(key, key_spans):
                entries[key.text], key_spans[key.text] = value, key.span
            elif not isinstance(key, Scalar):
                self._refuse("key-not-text", key.span, "a key must be a plain word")
        return Mapped(entries, key_spans, span)

    def _usable(self, key: Scalar, earlier: Mapping[str, Span]) -> bool:
        if key.form == "refused":
            return False
        if key.form == "ambiguous" and key.text == "<<":
            self._refuse("merge-key", key.span, "merge keys (<<) are not read here", "write the keys out")
            return False
        if key.text in earlier:
            message = f"key {shown(key.text)} appears twice, first on line {earlier[key.text].line}"
            self._refuse("duplicate-key", key.span, message, "keep one of them")
            return False
        return True

    def _scalar(self, event: yaml.ScalarEvent, span: Span) -> Scalar:
        if half := _SURROGATE.search(event.value):  # from an escape such as "\ud800"
            message = f"\\u{ord(half[0]):04x} is half a character"
            self._refuse("bad-character", span, message, "write the character itself")
        return Scalar(event.value, self._form(event), span)

    def _form(self, event: yaml.ScalarEvent) -> Form:
        if not event.implicit[0]:
            return "text"
        if _NUMBER.fullmatch(event.value):
            return "number"
        if _BOOL.fullmatch(event.value):
            return "bool"
        tag = self._loader.resolve(yaml.ScalarNode, event.value, (True, False))  # type: ignore[no-untyped-call]
        if tag == f"{_YAML}null":
            return "null"
        return "text" if tag == f"{_YAML}str" and not _OCTAL.fullmatch(event.value) else "ambiguous"

    def _refuse_extras(self, event: yaml.Event) -> bool:
        """Note an anchor, alias or tag; true where the value itself cannot be known."""
        span, tag = self._span(event), getattr(event, "tag", None)
        anchor = cut(getattr(event, "anchor", None) or "")
        if isinstance(event, yaml.AliasEvent):
            self._refuse("alias", span, f"aliases (*{anchor}) are not read here", "write the value out")
            return True
        if anchor:
            hint = "write the value out where it is used"
            self._refuse("anchor", span, f"anchors (&{anchor}) are not read here", hint)
        if tag is not None:
            written = cut(tag.replace(_YAML, "!!", 1))
            self._refuse("tag", span, f"tags ({written}) are not read here", "remove the tag")
        return tag is not None

    def _count(self, event: yaml.Event, depth: int) -> None:
        self._values += 1
        if depth > DEPTH_LIMIT:
            message = f"nested deeper than {DEPTH_LIMIT} levels"
            raise _error("nested-too-deep", self._span(event), message)
        if self._values > VALUES_LIMIT:
            message = f"more than {VALUES_LIMIT} keys and values"
            raise _error("too-many-values", self._span(event), message)

    def _next(self) -> yaml.Event:
        try:
            event: yaml.Event = self._loader.get_event()  # type: ignore[no-untyped-call]
            return event
        except yaml.MarkedYAMLError as error:
            raise self._syntax_error(error) from None
        except (yaml.YAMLError, ValueError, OverflowError):
            # The parser converts escapes and version numbers without looking, as in "\UFFFFFFFF".
            span = self._mark_span(self._loader.get_mark())
            raise _error("yaml-syntax", span, "this is not YAML", _SYNTAX_HINT) from None

    def _syntax_error(self, error: yaml.MarkedYAMLError) -> CompileError:
        problem, start = str(error.problem or error.context), error.context_mark
        span = self._mark_span(error.problem_mark or start or self._loader.get_mark())
        if "'\\t'" in problem:
            return _error("tab", span, "a tab where YAML allows only spaces", "indent with spaces")
        if "mapping values are not allowed" in problem:
            return _error("yaml-syntax", span, "a ':' that follows no key", _COLON_HINT)
        if start and ("stream end" in problem or "end of stream" in problem):
            hint = "close the quote or bracket"
            return _error("yaml-syntax", self._mark_span(start), "what starts here does not end", hint)
        if unquoted := re.search("found character (.*) that cannot start any token", problem):
            message = f"a value cannot start with {unquoted[1]}"
            return _error("yaml-syntax", span, message, "put the value in quotes")
        if found := re.search("but (?:found|got) (.*)", problem):
            problem = f"unexpected {_TOKENS.get(found[1], found[1])}"
        return _error("yaml-syntax", span, f"not YAML: {problem}", _SYNTAX_HINT)

    def _refuse(self, code: str, span: Span, message: str, hint: str = "") -> None:
        self.problems.append(Diagnostic(code=code, span=span, message=message, hint=hint))

    def _span(self, event: yaml.Event) -> Span:
        return self._mark_span(event.start_mark)

    def _mark_span(self, mark: Any) -> Span:
        """The place of a parser's mark, which counts from 0."""
        return Span(self._path, mark.line + 1, mark.column + 1)


_SMALLEST = "a spec has at least the keys name, model and workload"
_COLON_HINT = "check the indentation and the blank after each colon; text that has ': ' in it needs quotes"
# What the parser calls what it finds.
_TOKENS = {
    "'<scalar>'": "text",
    "'?'": "key",
    "'-'": "list item",
    "'<block mapping start>'": "group of keys",
    "'<block sequence start>'": "list",
    "'<block end>'": "end of indentation",
    "'<stream end>'": "end of the file",
    r"'\x00'": "end of the file",
}
_SYNTAX_HINT = "look for a missing quote, bracket, colon or indentation here or just above"


def shown(text: str) -> str:
    """A piece of the user's text as it can stand in a message: quoted, on one line, not too long."""
    return repr(cut(text))


def cut(text: str) -> str:
    """At most 40 characters of `text`."""
    return text if len(text) <= 40 else f"{text[:37]}..."
