"""The kinds of field a spec is made of, as data, and how each is read.

One table of these (`moeplan.planner.spec.SPEC`) drives the parser, the JSON Schema and the reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any

from moeplan.planner.diagnostics import Diagnostic, Span
from moeplan.planner.suggest import nearest
from moeplan.planner.units import Quantity
from moeplan.planner.yaml_nodes import Mapped, Node, Scalar, Sequence, cut, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Text that matches `pattern`; `what` names it, `rule` says the pattern in words."""

    what: str
    pattern: str
    rule: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of a few words."""

    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """An amount with a unit from `low` to `high`, which are written as a user would."""

    quantity: Quantity
    low: str
    high: str

    @property
    def bounds(self) -> tuple[int | float, int | float]:
        """The range in base units."""
        return self.quantity.parse(self.low), self.quantity.parse(self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOf:
    """One to `most` items. Where `several_need` names a key, every item of more than one needs it."""

    item: Kind
    most: int
    unique: bool = False
    several_need: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableOf:
    """One to `most` keys of the user's own, each with a value of the same kind."""

    key: Text
    value: Kind
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExactlyOne:
    """Of these keys one is given, and no more."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AtLeastOne:
    """Of these keys one or more are given."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotTogether:
    """Of these keys not all are given."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """A key that is of no use without others."""

    key: str
    others: tuple[str, ...]


Rule = ExactlyOne | AtLeastOne | NotTogether | Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A fixed set of keys. Where `short_for` names one, its value may stand for the whole group."""

    fields: tuple[Field, ...]
    rules: tuple[Rule, ...] = ()
    short_for: str = ""

    def field(self, key: str) -> Field:
        """The field of that key."""
        return next(one for one in self.fields if one.key == key)

    @property
    def known_keys(self) -> str:
        """A hint."""
        return f"known keys: {', '.join(one.key for one in self.fields)}"


Kind = Text | Choice | Whole | Measure | ListOf | TableOf | Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One key: what it means, what it holds and, as it would be written, what it is if left out."""

    key: str
    kind: Kind
    doc: str
    examples: tuple[str, ...] = ()
    required: bool = False
    default: str | None = None


_DIGITS = "write it in digits alone, such as 1000"


@dataclass(slots=True)
class Reader:
    """Reads nodes by their kinds: returns values in base units, notes problems and places by dotted key.

    Where a problem is noted for a value, that value is None; nobody may use values if there are problems.
    """

    problems: list[Diagnostic] = field(default_factory=list)
    spans: dict[str, Span] = field(default_factory=dict)

    def read(self, kind: Kind, node: Node, key: str) -> Any:
        """The value of `node`, which stands at the dotted `key`."""
        if isinstance(node, Scalar) and node.form == "refused":
            return None
        match kind:
            case Text():
                return self._text(kind, node, key)
            case Choice():
                return self._choice(kind, node, key)
            case Whole():
                return self._whole(kind, node, key)
            case Measure():
                return self._measure(kind, node, key)
            case ListOf():
                return self._list(kind, node, key)
            case TableOf():
                return self._table(kind, node, key)
            case Group():
                return self._group(kind, node, key)

    def note(self, code: str, span: Span, message: str, hint: str = "") -> None:
        """Note a problem."""
        self.problems.append(Diagnostic(code=code, span=span, message=message, hint=hint))

    def _wrong(self, node: Node, key: str, expected: str, hint: str = "") -> None:
        """Note a value of the wrong type."""
        message = f"{key or 'the file'} is {described(node)}"
        if isinstance(node, Scalar) and node.form == "ambiguous":
            message = f"{message}, which YAML readers read differently; expected {expected}"
            self.note("ambiguous-value", node.span, message, hint)
        else:
            self.note("wrong-type", node.span, f"{message}; expected {expected}", hint)

    def _text(self, kind: Text, node: Node, key: str) -> str | None:
        if not isinstance(node, Scalar) or node.form == "null":
            self._wrong(node, key, kind.what)
        elif node.form != "text":
            self._wrong(node, key, kind.what, f"put it in quotes: '{cut(node.text)}'")
        elif not re.fullmatch(kind.pattern, node.text):
            self.note("wrong-text", node.span, f"{key} is {described(node)}; expected {kind.what}", kind.rule)
        else:
            return node.text
        return None

    def _choice(self, kind: Choice, node: Node, key: str) -> str | None:
        known = f"one of: {', '.join(kind.options)}"
        if not isinstance(node, Scalar) or node.form != "text":
            self._wrong(node, key, "a word", known)
        elif node.text not in kind.options:
            hint = nearest(node.text, kind.options, known)
            self.note("unknown-word", node.span, f"{key} cannot be {shown(node.text)}", hint)
        else:
            return node.text
        return None

    def _whole(self, kind: Whole, node: Node, key: str) -> int | None:
        if not isinstance(node, Scalar) or node.form != "number":
            self._wrong(node, key, "a whole number", _DIGITS)
        elif not kind.low <= node.number <= kind.high:
            self._out_of_range("out-of-range", node, key, f"from {kind.low} to {kind.high}")
        elif not node.number.is_integer():
            self._wrong(node, key, "a whole number", _DIGITS)
        else:
            return int(node.number)
        return None

    def _measure(self, kind: Measure, node: Node, key: str) -> int | float | None:
        what, hint = kind.quantity.what, f"write it as {_or(kind.quantity.examples)}"
        if not isinstance(node, Scalar) or node.form in ("null", "bool"):
            self._wrong(node, key, what, hint)
        elif node.form == "number":
            return self._bare(kind, node, key)
        elif (amount := _parsed(kind, node.text)) is None:
            if node.form == "ambiguous" and kind.quantity.bare:
                self._wrong(node, key, what, hint)
            else:
                self.note("wrong-unit", node.span, f"{key} is {shown(node.text)}; expected {what}", hint)
        else:
            return self._within(kind, amount, "amount-out-of-range", node, key)
        return None

    def _bare(self, kind: Measure, node: Scalar, key: str) -> int | float | None:
        """An amount that is written as a number alone."""
        if not kind.quantity.bare:
            hint = f"write it as {_or(kind.quantity.examples)}"
            self.note("wrong-unit", node.span, f"{key} is {cut(node.text)}, without a unit", hint)
        elif self._within(kind, node.number, "out-of-range", node, key) is not None:
            if (amount := _parsed(kind, node.number)) is not None:
                return amount
            self._wrong(node, key, "a whole number", _DIGITS)
        return None

    def _within(
        self, kind: Measure, amount: int | float, code: str, node: Scalar, key: str
    ) -> int | float | None:
        low, high = kind.bounds
        if low <= amount <= high:
            return amount
        self._out_of_range(code, node, key, f"from {kind.low} to {kind.high}")
        return None

    def _out_of_range(self, code: str, node: Scalar, key: str, limits: str) -> None:
        self.note(code, node.span, f"{key} is {cut(node.text)}, out of range", limits)

    def _list(self, kind: ListOf, node: Node, key: str) -> tuple[Any, ...]:
        if not isinstance(node, Sequence):
            text = node.text if isinstance(node, Scalar) and not isinstance(kind.item, Group) else ""
            self._wrong(node, key, "a list", f"write it in brackets: [{cut(text)}]" if text else "")
            return ()
        self._check_count(len(node.items), kind.most, node, key)
        values: list[Any] = []
        for number, item in enumerate(node.items):
            place = f"{key}.{number}"
            self.spans[place] = item.span
            values.append(self.read(kind.item, item, place))
            if kind.unique and values[-1] is not None and values[-1] in values[:-1]:
                self.note("repeated-value", item.span, f"{key} has {shown(values[-1])} twice", "remove one")
            if len(node.items) > 1:
                self._check_several(kind, item, key)
        return tuple(values)

    def _check_several(self, kind: ListOf, item: Node, key: str) -> None:
        """Note an item without the key that each of several items needs."""
        if not kind.several_need or not isinstance(kind.item, Group) or not isinstance(item, Mapped):
            return
        if kind.several_need not in _given(kind.item, item):
            self._missing(item.span, kind.several_need, f"each of several {key}")

    def _table(self, kind: TableOf, node: Node, key: str) -> dict[str, Any]:
        if not isinstance(node, Mapped):
            self._wrong(node, key, "a group of keys")
            return {}
        self._check_count(len(node.entries), kind.most, node, key)
        for name, span in node.key_spans.items():
            if not re.fullmatch(kind.key.pattern, name):
                message = f"key {shown(name)} in {key} cannot be {kind.key.what}"
                self.note("wrong-text", span, message, kind.key.rule)
        return {name: self._entry(kind.value, node, name, key) for name in node.entries}

    def _check_count(self, count: int, most: int, node: Node, key: str) -> None:
        if count == 0:
            self.note("nothing-given", node.span, f"{key} is empty", "name one or more, or leave the key out")
        if count > most:
            self.note("too-many", node.span, f"{key} has {count} entries", f"{most} at most")

    def _entry(self, kind: Kind, node: Mapped, name: str, key: str) -> Any:
        """The value of one key of a group."""
        place, value = joined(key, name), node.entries[name]
        self.spans[place] = value.span if isinstance(value, Scalar) else node.key_spans[name]
        return self.read(kind, value, place)

    def _group(self, kind: Group, node: Node, key: str) -> dict[str, Any]:
        if kind.short_for and isinstance(node, Scalar) and node.form != "null":
            self.spans[joined(key, kind.short_for)] = node.span
            given = {kind.short_for: self.read(kind.field(kind.short_for).kind, node, key)}
            return _defaults(kind) | given
        if not isinstance(node, Mapped):
            expected = "a name or a group of keys" if kind.short_for else "a group of keys"
            self._wrong(node, key, expected, kind.known_keys)
            return {}
        self._check_keys(kind, node, key)
        fields = [one for one in kind.fields if one.key in node.entries]
        return _defaults(kind) | {one.key: self._entry(one.kind, node, one.key, key) for one in fields}

    def _check_keys(self, kind: Group, node: Mapped, key: str) -> None:
        """Note the keys that are unknown, missing or do not go together."""
        names = [one.key for one in kind.fields]
        for name in _unknown(kind, node):
            message = f"unknown key {shown(name)}{f' in {key}' if key else ''}"
            self.note("unknown-key", node.key_spans[name], message, nearest(name, names, kind.known_keys))
        place, given = self.spans.get(key, node.span), _given(kind, node)
        for one in kind.fields:
            if one.required and one.key not in given:
                hint = f"such as {one.key}: {one.examples[0]}"
                self._missing(place, one.key, key or "the spec", hint)
        for rule in kind.rules:
            self._check_rule(rule, node, key, given)

    def _check_rule(self, rule: Rule, node: Mapped, key: str, given: Set[str]) -> None:
        place = self.spans.get(key, node.span)
        if isinstance(rule, Needs):
            for other in rule.others if rule.key in given else ():
                if other not in given:
                    self._missing(place, other, joined(key, rule.key))
            return
        if not isinstance(rule, NotTogether) and not given & set(rule.keys):
            message = f"{key or 'the spec'} needs one of the keys {_or(map(repr, rule.keys))}"
            self.note("missing-key", place, message)
        if not isinstance(rule, AtLeastOne):
            self._refuse_all(node, rule.keys, key)

    def _missing(self, place: Span, name: str, needy: str, hint: str = "") -> None:
        self.note("missing-key", place, f"{needy} needs the key {name!r}", hint)

    def _refuse_all(self, node: Mapped, names: tuple[str, ...], key: str) -> None:
        if all(name in node.entries for name in names):
            where = f" in {key}" if key else ""
            message = f"{' and '.join(map(repr, names))} cannot both be given{where}"
            place = max(node.key_spans[name] for name in names)
            self.note("conflicting-keys", place, message, "remove one of them")


def _unknown(kind: Group, node: Mapped) -> list[str]:
    names = {one.key for one in kind.fields}
    return [name for name in node.entries if name not in names]


def _given(kind: Group, node: Mapped) -> Set[str]:
    """The keys that are there, and those that an unknown key seems to misspell: one error is enough."""
    unknown = _unknown(kind, node)
    misspelt = {one.key for one in kind.fields if any(nearest(name, [one.key], "") for name in unknown)}
    return node.entries.keys() | misspelt


def _defaults(kind: Group) -> dict[str, Any]:
    return {
        one.key: one.kind.quantity.parse(one.default) if isinstance(one.kind, Measure) else one.default
        for one in kind.fields
        if one.default is not None
    }


def _parsed(kind: Measure, value: str | float) -> int | float | None:
    try:
        return kind.quantity.parse(value)
    except ValueError:
        return None


def joined(key: str, name: str) -> str:
    """The dotted key of `name` in the group at `key`."""
    return f"{key}.{name}" if key else name


def described(node: Node) -> str:
    """A value as a message names it."""
    if isinstance(node, Sequence):
        return "a list"
    if isinstance(node, Mapped):
        return "a group of keys"
    if node.form == "text":
        return shown(node.text)
    return cut(node.text) if node.text else "empty"


def _or(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
