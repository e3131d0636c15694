"""`key=value` on the tree of a spec: what `--what-if` edits, checked afterwards as if the file had said so.

Edited values have their place in the option, so that a message about one names the option and its column.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import yaml

from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.language import SPEC, Block, Field, Kind, Listing, Scalar, Table
from moeplan.planner.units import TOKENS
from moeplan.planner.yaml_nodes import read_nodes

_KEY = re.compile(r"[a-z_]+(\.[A-Za-z0-9_+./ -]+?)*")
_RELATIVE = re.compile(r"([-+])([0-9]{1,6}(?:\.[0-9]{1,6})?)%")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_DIGITS = 12


def split_setting(setting: str, option: str = "--what-if") -> tuple[str, str]:
    """Key and value of `key=value`. Raises CompileError."""
    key, equals, value = setting.partition("=")
    if not equals or not _KEY.fullmatch(key):
        hint = f"for example {option} 'workload.online.rate=12/s'"
        raise _error("bad-setting", Span(_place(setting, option)), "a setting is key=value", hint)
    return key, value


def relative(value: str) -> Fraction | None:
    """The factor that `+20%` or `-5%` stands for; None for other values."""
    found = _RELATIVE.fullmatch(value.strip())
    if not found:
        return None
    change = Fraction(found[2]) / 100
    return 1 + change if found[1] == "+" else 1 - change


def edit(root: yaml.MappingNode, settings: Sequence[str], option: str = "--what-if") -> None:
    """Set, scale (`+20%`) or remove (no value) the nodes that `settings` name. Raises CompileError.

    A key that the spec language does not have is inserted all the same: the reader knows what to say.
    """
    for setting in settings:
        _Edit(setting, option).apply(root)


class _Edit:
    """One setting."""

    def __init__(self, setting: str, option: str) -> None:
        self.path = _place(setting, option)
        self.key, self.value = split_setting(setting, option)
        self.column = len(self.key) + 1

    def apply(self, root: yaml.MappingNode) -> None:
        *parents, last = self.key.split(".")
        node: yaml.Node = root
        kind: Kind | None = SPEC
        for part in parents:
            kind = _kind(kind, part)
            child = _child(node, part) or self._composed("{}")
            whole = self._whole(child, kind)
            self._set(node, part, whole)
            node = whole
        if not self.value.strip():
            self._remove(node, last)
        elif (factor := relative(self.value)) is not None and (_kind(kind, last) or _child(node, last)):
            self._scale(node, last, factor, _is_whole(_kind(kind, last)))
        else:
            self._set(node, last, self._composed(self.value))

    def _set(self, node: yaml.Node, name: str, value: yaml.Node) -> None:
        if isinstance(node, yaml.SequenceNode):
            node.value[self._index(node, name)] = value
            return
        assert isinstance(node, yaml.MappingNode)  # _whole made it one
        names = [key.value for key, _ in node.value]
        key = yaml.ScalarNode("tag:yaml.org,2002:str", name, value.start_mark, value.end_mark)
        at = names.index(name) if name in names else len(names)
        node.value[at : at + 1] = [(key, value)]

    def _remove(self, node: yaml.Node, name: str) -> None:
        if _child(node, name) is None:
            raise self._problem(f"{self.key} is not in the spec, so there is nothing to remove")
        if isinstance(node, yaml.SequenceNode):
            del node.value[self._index(node, name)]
        else:
            node.value = [(key, old) for key, old in node.value if key.value != name]

    def _scale(self, node: yaml.Node, name: str, factor: Fraction, whole: bool) -> None:
        """The number in the value as it stands, times `factor`; its unit stays."""
        old = _child(node, name)
        found = _NUMBER.search(old.value) if isinstance(old, yaml.ScalarNode) else None
        if found is None:
            hint = "give the value itself"
            raise self._problem(f"{self.key} has no number in the spec that {self.value} could be of", hint)
        assert old is not None  # it has the number
        number = _decimal(Fraction(found.group()) * factor, whole)
        text = old.value[: found.start()] + number + old.value[found.end() :]
        self._set(node, name, self._composed(text))

    def _whole(self, node: yaml.Node, kind: Kind | None) -> yaml.Node:
        """The node as a mapping or list: a lone scalar stands for its block's short key."""
        if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)):
            return node
        if not isinstance(kind, Block) or not kind.short or not isinstance(node, yaml.ScalarNode):
            raise self._problem(f"{self.key}: there is a single value on the way to this key in the spec")
        key = yaml.ScalarNode("tag:yaml.org,2002:str", kind.short, node.start_mark, node.end_mark)
        return yaml.MappingNode("tag:yaml.org,2002:map", [(key, node)], node.start_mark, node.end_mark)

    def _index(self, node: yaml.SequenceNode, name: str) -> int:
        if not name.isdecimal() or int(name) >= len(node.value):
            raise self._problem(f"{self.key}: the list in the spec has items 0 to {len(node.value) - 1}")
        return int(name)

    def _composed(self, text: str) -> yaml.Node:
        """The value's node, its column counted from the start of the setting."""
        node, problems = read_nodes(" " * self.column + text, self.path)
        if node is None or problems:
            raise CompileError(*problems)
        return node

    def _problem(self, message: str, hint: str = "") -> CompileError:
        return _error("bad-setting", Span(self.path, 1, self.column + 1), message, hint)


def _child(node: yaml.Node, name: str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == name), None)
    if isinstance(node, yaml.SequenceNode) and name.isdecimal() and int(name) < len(node.value):
        item: yaml.Node = node.value[int(name)]
        return item
    return None


def _kind(kind: Kind | None, name: str) -> Kind | None:
    """The kind of what `name` holds; None where the language has no such key."""
    match kind:
        case Block():
            field: Field | None = kind.fields.get(name)
            return field.kind if field else None
        case Listing():
            return kind.item
        case Table():
            return kind.value
        case Scalar() | None:
            return None


def _is_whole(kind: Kind | None) -> bool:
    """Whether values are counts: 26.4 GiB is an amount of memory, 26.4 requests are none."""
    return isinstance(kind, Scalar) and kind.integral and kind.units in (None, TOKENS)


def _decimal(value: Fraction, whole: bool) -> str:
    """`value` as plain decimal text."""
    if whole:
        return str(round(value))
    return f"{float(value):.{_DIGITS}f}".rstrip("0").rstrip(".")


def _place(setting: str, option: str) -> str:
    return f"{option} '{setting}'"


def _error(code: str, span: Span, message: str, hint: str) -> CompileError:
    return CompileError(Diagnostic(code=code, span=span, message=message, hint=hint))
