"""YAML text -> values that know their place, and typed reading of groups of keys with every problem noted."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span

_FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FILE_BYTES_LIMIT = 16 * 2**20
_DEPTH_LIMIT = 20
_TAG = "tag:yaml.org,2002:"
_NUMBER_AS_TEXT = re.compile(r"[-+]?\d+(\.\d*)?[eE]\d+")
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?(KiB|MiB|GiB|TiB|kB|MB|GB|TB)")
_BYTES_PER = {
    **{unit: 1024**power for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), start=1)},
    **{unit: 1000**power for power, unit in enumerate(("kB", "MB", "GB", "TB"), start=1)},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One value of a YAML file: a scalar, a list of entries or a mapping from keys to entries.

    `key_span` is where its key stands, if it has one.
    """

    value: object
    span: Span
    key_span: Span | None = None


class Problems:
    """Everything wrong with one set of files, raised together."""

    def __init__(self) -> None:
        self._found: list[Diagnostic] = []

    def add(self, span: Span, message: str, hint: str = "") -> None:
        """Note a problem."""
        self._found.append(Diagnostic(code="catalog-file", span=span, message=message, hint=hint))

    def extend(self, error: CompileError) -> None:
        """Note what another step raised."""
        self._found.extend(error.diagnostics)

    def found(self) -> tuple[Diagnostic, ...]:
        """Everything noted, each once, in file order."""
        return CompileError(*dict.fromkeys(self._found)).diagnostics

    def raise_all(self) -> None:
        """Raise CompileError if anything was noted."""
        if self._found:
            raise CompileError(*self.found())


def read_text(path: Path, where: Span, problems: Problems) -> str | None:
    """The text of a UTF-8 file, or None after noting at `where` why it cannot be had."""
    try:
        if path.stat().st_size > _FILE_BYTES_LIMIT:
            problems.add(where, f"{path} is larger than {_FILE_BYTES_LIMIT // 2**20} MiB")
            return None
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.add(where, f"{path} is not UTF-8 text: byte {error.start}")
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        problems.add(where, f"{path} cannot be read: {reason}")
    return None


def parse_yaml(text: str, path: str, problems: Problems, *, built_in: bool = False) -> Entry | None:
    """The one document in `text`, or None after noting why there is none."""
    # The C loader overflows its stack on deeply nested text, so it reads nothing but our own files.
    loader = _FAST_LOADER if built_in else yaml.SafeLoader
    try:
        node = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.add(_span(path, mark) if mark else Span(path), f"not YAML: {error.problem or error.context}")
        return None
    except RecursionError:
        problems.add(Span(path), "nested too deeply")
        return None
    except (yaml.YAMLError, ValueError) as error:
        problems.add(Span(path), f"not YAML: {str(error).splitlines()[0]}")
        return None
    if node is None:
        problems.add(Span(path), "the file is empty")
        return None
    return _Tree(path, problems).entry(node, _DEPTH_LIMIT)


class _Tree:
    """Turns composed nodes into entries. Aliases are refused: small text could stand for a huge tree."""

    def __init__(self, path: str, problems: Problems) -> None:
        self._path = path
        self._problems = problems
        self._seen: set[int] = set()

    def entry(self, node: yaml.Node, depth: int) -> Entry:
        """The entry of `node`; null in place of what is refused."""
        span = _span(self._path, node.start_mark)
        if isinstance(node, yaml.ScalarNode):
            return Entry(self._scalar(node, span), span)
        if id(node) in self._seen:
            return self._refused(span, "anchors and aliases are not read here")
        if depth == 0:
            return self._refused(span, f"nested deeper than {_DEPTH_LIMIT} levels")
        self._seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            return Entry([self.entry(item, depth - 1) for item in node.value], span)
        return Entry(self._mapping(node, depth), span)

    def _refused(self, span: Span, reason: str) -> Entry:
        self._problems.add(span, reason)
        return Entry(None, span)

    def _mapping(self, node: yaml.Node, depth: int) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for key, value in node.value:
            span = _span(self._path, key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self._problems.add(span, "a key must be a plain word")
            elif key.value in entries:
                self._problems.add(span, f"key '{key.value}' appears twice")
            else:
                inner = self.entry(value, depth - 1)
                entries[key.value] = Entry(inner.value, inner.span, span)
        return entries

    def _scalar(self, node: yaml.ScalarNode, span: Span) -> object:
        kind = node.tag.removeprefix(_TAG)
        try:
            if kind == "int":
                return int(node.value)
            if kind == "float":
                return float(node.value.removesuffix(".nan").removesuffix(".NaN") or "nan")
        except ValueError:
            self._problems.add(span, f"'{_cut(node.value)}' is not a plain decimal number")
            return None
        if kind == "bool":
            return node.value.lower() in ("true", "yes", "on")
        if kind == "null":
            return None
        return str(node.value)


def _span(path: str, mark: yaml.Mark) -> Span:
    return Span(path, mark.line + 1, mark.column + 1)


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


class Fields:
    """Typed access to one mapping of a file.

    A figure is a number, or `[number, source]` where the source is a key of the file's `sources` table.
    Wrong values are noted and replaced by the lowest allowed one, so that reading goes on.
    """

    def __init__(
        self, entry: Entry | None, name: str, problems: Problems, sources: Collection[str] = ()
    ) -> None:
        self.name = name
        self.span = entry.span if entry else Span("")
        self.problems = problems
        self.figure_sources: dict[str, str] = {}
        self._sources = sources
        self._read: set[str] = set()
        self._entries: Mapping[str, Entry] = {}
        if entry is not None and isinstance(entry.value, dict):
            self._entries = entry.value
        elif entry is not None:
            problems.add(entry.span, f"{name} is {shown(entry.value)}, expected a group of keys")

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    @property
    def keys(self) -> tuple[str, ...]:
        """Every key, in the order of the file."""
        return tuple(self._entries)

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Every key with its entry, all of them thereby read."""
        self._read.update(self._entries)
        yield from self._entries.items()

    def place(self, key: str) -> Span:
        """Where `key` is, or the group where it is not."""
        entry = self._entries.get(key)
        return entry.span if entry else self.span

    def wrong(self, key: str, problem: str, hint: str = "") -> None:
        """Note that the value of `key` cannot be."""
        self.problems.add(self.place(key), f"{self.name}: {problem}", hint)

    def _take(self, key: str, expected: str | None) -> Entry | None:
        """The entry of `key`; where it is absent and `expected` says what it must be, a note."""
        self._read.add(key)
        entry = self._entries.get(key)
        if entry is None and expected is not None:
            self.problems.add(self.span, f"{self.name}: missing key '{key}'", f"expected {expected}")
        return entry

    def group(self, key: str, required: bool = False) -> Fields | None:
        """The nested group `key`, None where absent."""
        entry = self._take(key, "a group of keys" if required else None)
        if entry is None:
            return None
        return Fields(entry, f"{self.name}: {key}", self.problems, self._sources)

    def text(self, key: str, default: str | None = None, choices: Collection[str] = ()) -> str:
        """A string; required where there is no default."""
        entry = self._take(key, "a word" if default is None else None)
        if entry is None:
            return default or ""
        if not isinstance(entry.value, str) or not entry.value.strip():
            self.wrong(key, f"'{key}' is {shown(entry.value)}, expected a word")
        elif choices and entry.value not in choices:
            self.wrong(key, f"'{key}' is {shown(entry.value)}", f"one of: {', '.join(sorted(choices))}")
        else:
            return entry.value
        return default or ""

    def count(self, key: str, highest: int, default: int | None = None) -> int:
        """A whole number from 1 to `highest`; required where there is no default."""
        entry = self._take(key, "a whole number" if default is None else None)
        if entry is None:
            return default or 1
        if isinstance(entry.value, bool) or not isinstance(entry.value, int):
            self.wrong(key, f"'{key}' is {shown(entry.value)}, expected a whole number")
        elif not 1 <= entry.value <= highest:
            self.wrong(key, f"'{key}' is {shown(entry.value)}, expected 1 to {highest}")
        else:
            return entry.value
        return 1

    def figure(self, key: str, lowest: float, highest: float, default: float | None = None) -> float:
        """A number from `lowest` to `highest`, or with a source; required where there is no default."""
        entry = self._take(key, "a number" if default is None else None)
        if entry is None:
            return lowest if default is None else default
        number = self._number(key, self._without_source(key, entry).value)
        if number is None:
            return lowest
        if not lowest <= number <= highest:
            self.wrong(key, f"'{key}' is {number:.6g}, expected {lowest:.6g} to {highest:.6g}")
            return lowest
        return number

    def bytes(self, key: str, highest: float) -> int:
        """A size: a number of bytes, or text such as `16 GiB`."""
        entry = self._take(key, "bytes, or a size such as 16 GiB")
        if entry is None:
            return 1
        value = self._without_source(key, entry).value
        match = _BYTES.fullmatch(value) if isinstance(value, str) else None
        number = float(match[1]) * _BYTES_PER[match[2]] if match else self._number(key, value)
        if number is None:
            return 1
        if not 1 <= number <= highest:
            self.wrong(key, f"'{key}' is {number:.6g} bytes, expected 1 to {highest:.6g}")
            return 1
        return round(number)

    def _without_source(self, key: str, entry: Entry) -> Entry:
        """The entry itself, or the number of a [number, source] pair whose source is known."""
        if not isinstance(entry.value, list):
            return entry
        pair = entry.value
        if len(pair) != 2 or not isinstance(pair[1].value, str):
            self.wrong(key, f"'{key}' is a list, expected a number or [number, source]")
            return Entry(None, entry.span)
        if pair[1].value not in self._sources:
            self.problems.add(pair[1].span, f"{self.name}: source '{pair[1].value}' is not under 'sources'")
        self.figure_sources[key] = pair[1].value
        return Entry(pair[0].value, pair[0].span)

    def _number(self, key: str, value: object) -> float | None:
        if isinstance(value, int | float) and not isinstance(value, bool) and _finite(value):
            return float(value)
        hint = ""
        if isinstance(value, str) and _NUMBER_AS_TEXT.fullmatch(value):
            hint = "YAML reads this as text: write the point and the sign, as in 65.0e+12"
        self.wrong(key, f"'{key}' is {shown(value)}, expected a number", hint)
        return None

    def done(self, known: Collection[str] = ()) -> None:
        """Note every key that nobody read; `known` adds keys to those that the hint names."""
        names = ", ".join(sorted(self._read.union(known)))
        for key, entry in self._entries.items():
            if key not in self._read:
                problem = f"{self.name}: unknown key '{_cut(key)}'"
                self.problems.add(entry.key_span or entry.span, problem, f"known keys: {names}")


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def plain(entry: Entry) -> object:
    """The value without places, as a JSON reader would give it."""
    if isinstance(entry.value, dict):
        return {key: plain(value) for key, value in entry.value.items()}
    if isinstance(entry.value, list):
        return [plain(value) for value in entry.value]
    return entry.value


def shown(value: object) -> str:
    """A value as the user wrote it, cut to a readable length."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a group of keys"
    if isinstance(value, int) and abs(value) > 10**40:
        return "a huge number"
    return f"'{_cut(value)}'" if isinstance(value, str) else str(value)
