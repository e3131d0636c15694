"""Spec text -> Spec. Every problem of the text is reported at once, with its place and a hint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import yaml

from moeplan.planner import units
from moeplan.planner.diagnostics import CompileError, Diagnostic, Span
from moeplan.planner.ir.spec import (
    BatchSpec,
    MachineRef,
    MarketSpec,
    ModelRef,
    OnlineSpec,
    SizeSpec,
    Slo,
    Spec,
    WorkloadSpec,
)
from moeplan.planner.language import SPEC, Block, Kind, Listing, Scalar, Table
from moeplan.planner.suggest import nearest, nearest_word
from moeplan.planner.yaml_nodes import place, read_nodes

_SHARE_TOLERANCE = 1e-5  # thirds as 33.3333%
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]*([eE][-+][0-9]+)?")
_BAD = object()  # a value that already has its diagnostic


def parse_spec(text: str | bytes, path: str) -> Spec:
    """Return the spec in `text`; `path` names it in messages. Raises CompileError with every problem."""
    root, problems = read_nodes(text, path)
    reader = _Reader(path, problems)
    data = reader.read(root, SPEC, "") if root else {}
    if reader.problems:
        raise CompileError(*reader.problems)
    return _spec(path, data, reader.spans)


class _Reader:
    """Walks nodes and the language table together; collects values, spans and problems."""

    def __init__(self, path: str, problems: Sequence[Diagnostic]) -> None:
        self.path = path
        self.problems = list(problems)
        self.spans: dict[str, Span] = {}

    def problem(self, code: str, span: Span, message: str, hint: str = "") -> object:
        self.problems.append(Diagnostic(code=code, span=span, message=message, hint=hint))
        return _BAD

    def read(self, node: yaml.Node, kind: Kind, key: str) -> Any:
        """The value of `node` as `kind`, in base units; _BAD after a problem."""
        self.spans.setdefault(key, place(self.path, node.start_mark))
        match kind:
            case Scalar():
                return self._scalar(node, kind, key)
            case Block():
                return self._block(node, kind, key)
            case Listing():
                return self._listing(node, kind, key)
            case Table():
                return self._table(node, kind, key)

    # Mappings and lists

    def _block(self, node: yaml.Node, block: Block, key: str) -> Any:
        if block.short and isinstance(node, yaml.ScalarNode):
            value = self.read(node, block.fields[block.short].kind, f"{key}.{block.short}")
            return {block.short: value}
        if not isinstance(node, yaml.MappingNode):
            return self._wrong_type(node, "a mapping", key)
        found: dict[str, Any] = {}
        meant: set[str] = set()  # known keys that unknown ones seem to stand for
        for name, span, value in self._pairs(node, key):
            if name in block.fields:
                found[name] = self.read(value, block.fields[name].kind, f"{key}.{name}" if key else name)
            else:
                meant.add(nearest_word(name, block.fields))
                hint = nearest(name, block.fields, f"known keys: {', '.join(block.fields)}")
                self.problem("unknown-key", span, f"unknown key {name!r}{_inside(key)}", hint)
        self._check_keys(block, found.keys(), meant, place(self.path, node.start_mark), key)
        return found

    def _pairs(self, node: yaml.MappingNode, key: str) -> Iterator[tuple[str, Span, yaml.Node]]:
        """Name, place and value of each entry; a key that is no word or comes twice is a problem."""
        seen: set[str] = set()
        for name_node, value in node.value:
            span = place(self.path, name_node.start_mark)
            if not isinstance(name_node, yaml.ScalarNode):
                self.problem("bad-key", span, f"a key{_inside(key)} must be a word")
            elif name_node.value in seen:
                self.problem(
                    "duplicate-key", span, f"{name_node.value!r} comes twice{_inside(key)}", "keep one"
                )
            else:
                seen.add(name_node.value)
                yield name_node.value, span, value

    def _check_keys(
        self, block: Block, found: AbstractSet[str], meant: AbstractSet[str], span: Span, key: str
    ) -> None:
        """What is `found` must not exclude each other; what is neither found nor `meant` may be missing."""
        known = found | meant
        for name, field in block.fields.items():
            if field.required and name not in known:
                self._missing(name, span, key, field.kind)
        if block.any_of and not any(name in known for name in block.any_of):
            self.problem("missing-key", span, f"{key or 'the spec'} needs {' or '.join(block.any_of)}")
        if block.exclusive and all(name in found for name in block.exclusive):
            first, second = block.exclusive
            self.problem("exclusive-keys", self.spans[second], f"{first!r} and {second!r} exclude each other")
        present = [option for option in block.options if option.key in found]
        names = [option.key for option in block.options]
        if block.options and not any(option in known for option in names):
            self.problem("missing-key", span, f"{key} needs {' or '.join(names)}")
        if len(present) > 1:
            second = present[1].key
            place_of_second = self.spans[f"{key}.{second}"]
            self.problem(
                "exclusive-keys", place_of_second, f"{' and '.join(names)} exclude each other{_inside(key)}"
            )
        elif present:
            for name in present[0].needs:
                if name not in known:
                    self._missing(name, span, key, block.fields[name].kind)

    def _missing(self, name: str, span: Span, key: str, kind: Kind) -> None:
        hint = f"for example: {name}: {kind.examples[0]}" if isinstance(kind, Scalar) else ""
        self.problem("missing-key", span, f"{key or 'the spec'} needs {name!r}", hint)

    def _listing(self, node: yaml.Node, listing: Listing, key: str) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            return self._wrong_type(node, "a list", key)
        if not node.value:
            return self.problem(
                "empty-list", place(self.path, node.start_mark), f"{key} is empty", "leave it out"
            )
        items = [self.read(item, listing.item, f"{key}.{n}") for n, item in enumerate(node.value)]
        if listing.sums_to_one:
            self._check_sum(
                [item.get(listing.sums_to_one) for item in items if item is not _BAD], listing, key
            )
        seen: set[Any] = set()
        for n, item in enumerate(items if listing.once else ()):
            if item is not _BAD and item in seen:
                self.problem(
                    "repeated-item", self.spans[f"{key}.{n}"], f"{item!r} comes twice in {key}", "keep one"
                )
            seen.add(item)
        return tuple(items)

    def _check_sum(self, parts: Sequence[Any], listing: Listing, key: str) -> None:
        """The parts of the whole: all given and summing to one, or a single one left out."""
        name, span = listing.sums_to_one, self.spans[key]
        if len(parts) > 1 and None in parts:
            self.problem(
                "shares", span, f"each of {len(parts)} {key} needs a {name}", f"for example {name}: 50%"
            )
        elif (
            _BAD not in parts
            and parts != [None]
            and not math.isclose(sum(parts), 1.0, abs_tol=_SHARE_TOLERANCE)
        ):
            hint = "they must sum to 1 (100%)"
            self.problem("shares", span, f"the {name}s in {key} sum to {sum(parts):.6g}", hint)

    def _table(self, node: yaml.Node, table: Table, key: str) -> Any:
        if not isinstance(node, yaml.MappingNode):
            return self._wrong_type(node, "a mapping", key)
        found = {}
        for name, span, value in self._pairs(node, key):
            if not re.fullmatch(table.key.pattern, name):
                self.problem("bad-value", span, f"{name!r} is not {table.key.what}", _examples(table.key))
            found[name] = self.read(value, table.value, f"{key}.{name}")
        return found

    def _wrong_type(self, node: yaml.Node, wanted: str, key: str) -> object:
        found = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        found = "a mapping" if isinstance(node, yaml.MappingNode) else found
        span = place(self.path, node.start_mark)
        return self.problem("wrong-type", span, f"{key or 'the spec'} is {found}, expected {wanted}")

    # Single values

    def _scalar(self, node: yaml.Node, kind: Scalar, key: str) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return self._wrong_type(node, kind.what, key)
        span = place(self.path, node.start_mark)
        tag, text = node.tag.rpartition(":")[2], node.value
        if tag == "str":
            return self._text(text, kind, span, key)
        if tag in ("int", "float") and kind.number:
            return self._number(text, tag, kind, span, key)
        found = {"null": "empty", "bool": "true or false to YAML", "int": "a number", "float": "a number"}
        what = found.get(tag, f"a {tag} to YAML")
        hint = "quote it" if tag != "null" and kind.pattern and not kind.units else _examples(kind)
        return self.problem(
            "wrong-type", span, f"{key}: {_quoted(text)} is {what}, expected {kind.what}", hint
        )

    def _text(self, text: str, kind: Scalar, span: Span, key: str) -> Any:
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            return self.problem(
                "bad-value", span, f"{key} holds half a character", "write the character itself"
            )
        if kind.choices:
            if text in kind.choices:
                return text
            hint = nearest(text, kind.choices, _examples(kind))
            return self.problem("bad-value", span, f"{key}: {_quoted(text)} is not {kind.what}", hint)
        if not kind.pattern or not re.fullmatch(kind.pattern, text):
            return self.problem(
                "bad-value", span, f"{key}: {_quoted(text)} is not {kind.what}", _examples(kind)
            )
        if kind.units is None:
            return text
        value = units.parse(text, kind.units)
        return self._in_range(value, text, kind, span, key, bare=False)

    def _number(self, text: str, tag: str, kind: Scalar, span: Span, key: str) -> Any:
        """A bare number in plain decimal. YAML would read 010, 0x10, 1_000 and 1:30 as something else."""
        plain = _INTEGER if tag == "int" else _FLOAT
        if not plain.fullmatch(text) or len(text) > 40:
            message = f"{key}: {_quoted(text)} is not a plain decimal number"
            return self.problem("misread-number", span, message, _examples(kind))
        value = int(text) if tag == "int" else float(text)
        if kind.number == "integer" and value != (math.floor(value) if math.isfinite(value) else None):
            return self.problem("bad-value", span, f"{key}: {text} is not {kind.what}", _examples(kind))
        return self._in_range(value, text, kind, span, key, bare=True)

    def _in_range(self, value: Any, text: str, kind: Scalar, span: Span, key: str, bare: bool) -> Any:
        if not kind.low <= value <= kind.high:
            code = "out-of-range" if bare else "amount-out-of-range"
            hint = (
                f"the range is {kind.limits}; {_examples(kind)}"
                if kind.units
                else f"the range is {kind.limits}"
            )
            return self.problem(code, span, f"{key}: {text} is out of range", hint)
        return round(value) if kind.integral else float(value)


def _inside(key: str) -> str:
    return f" in {key}" if key else ""


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _examples(kind: Scalar) -> str:
    return f"for example {', '.join(kind.examples)}"


# Values to records


def _spec(path: str, data: Mapping[str, Any], spans: Mapping[str, Span]) -> Spec:
    work = data["workload"]
    return Spec(
        path=path,
        name=data["name"],
        model=ModelRef(**data["model"]),
        workload=WorkloadSpec(
            batch=_batch(work["batch"]) if "batch" in work else None,
            online=_online(work["online"]) if "online" in work else None,
        ),
        machine=_machine(data["machine"]) if "machine" in data else None,
        market=_market(data.get("market", {})),
        catalog=data.get("catalog", ""),
        profile_file=data.get("profile", ""),
        spans=spans,
    )


def _batch(data: Mapping[str, Any]) -> BatchSpec:
    return BatchSpec(
        requests=data.get("requests", 0),
        prompt_tokens=data.get("prompt", 0),
        output_tokens=data.get("output", 0),
        prompts_file=data.get("prompts", ""),
        deadline_s=data.get("deadline"),
    )


def _online(data: Mapping[str, Any]) -> OnlineSpec:
    slo = data["slo"]
    whole = sum(size.get("share", 1.0) for size in data.get("sizes", ()))
    sizes = tuple(
        SizeSpec(
            prompt_tokens=size["prompt"], output_tokens=size["output"], share=size.get("share", 1.0) / whole
        )
        for size in data.get("sizes", ())
    )
    return OnlineSpec(
        rate_per_s=data.get("rate"),
        sizes=sizes,
        trace_file=data.get("trace", ""),
        slo=Slo(ttft_s=slo["ttft"], itl_s=slo["itl"], attainment=float(slo.get("attainment", 0.99))),
    )


def _machine(data: Mapping[str, Any]) -> MachineRef:
    return MachineRef(name=data.get("name", ""), file=data.get("file", ""), memory_bytes=data.get("memory"))


def _market(data: Mapping[str, Any]) -> MarketSpec:
    return MarketSpec(
        clouds=data.get("clouds", ()),
        regions=data.get("regions", ()),
        gpus=data.get("gpus", ()),
        purchase=data.get("purchase", "any"),
        budget_usd_per_hour=data.get("budget"),
        quota=data.get("quota", {}),
        on_demand_floor=float(data.get("on_demand_floor", 0.0)),
        survive=float(data.get("survive", 0.0)),
        offload=data.get("offload", "last-resort"),
        availability=float(data.get("availability", 0.99)),
    )
