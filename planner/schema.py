"""The table of the spec's keys -> its JSON Schema, for editors, and its reference, docs/spec.md.

`python -m moeplan.planner.schema` prints the reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from moeplan.planner import units
from moeplan.planner.fields import (
    AtLeastOne,
    Choice,
    ExactlyOne,
    Field,
    Group,
    Kind,
    ListOf,
    Measure,
    Needs,
    NotTogether,
    Rule,
    TableOf,
    Text,
    Whole,
)
from moeplan.planner.spec import SPEC
from moeplan.planner.yaml_nodes import BYTES_LIMIT, DEPTH_LIMIT, VALUES_LIMIT

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stricter:
    """A rule of the parser that JSON Schema cannot state, by the code of its diagnostic."""

    code: str
    rule: str


# Every way in which the parser refuses what the schema lets pass. The first three are about values, the
# others about the text of the file, of which a schema sees nothing.
STRICTER = (
    Stricter("amount-out-of-range", "An amount written with a unit is within the range of its key."),
    Stricter("shares-sum", "The shares of `workload.online.sizes` add up to 100%."),
    Stricter("region-outside-clouds", "Each of `market.regions` is in one of `market.clouds`."),
    Stricter("duplicate-key", "A key is given once."),
    Stricter(
        "ambiguous-value",
        "Words that YAML readers read differently, such as `on`, `no`, `010`, `1_000`, `12:30:00` or "
        "`2026-01-31`, are in quotes where text is meant and in plain digits where a number is meant.",
    ),
    Stricter("anchor", "There are no anchors (`&x`)."),
    Stricter("alias", "There are no aliases (`*x`)."),
    Stricter("merge-key", "There are no merge keys (`<<`)."),
    Stricter("tag", "There are no tags (`!x`)."),
    Stricter("key-not-text", "A key is a plain word."),
    Stricter("several-documents", "The file holds one document."),
    Stricter("empty-file", "The file holds something."),
    Stricter("yaml-syntax", "The file is YAML."),
    Stricter("tab", "Blanks are spaces."),
    Stricter("not-utf-8", "The file is UTF-8."),
    Stricter("byte-order-mark", "The file has no byte order mark."),
    Stricter("bad-character", "The file has no control characters."),
    Stricter("file-too-large", f"The file has at most {BYTES_LIMIT // 2**20} MiB."),
    Stricter("nested-too-deep", f"Values are nested at most {DEPTH_LIMIT} levels deep."),
    Stricter("too-many-values", f"The file has at most {VALUES_LIMIT} keys and values."),
)


def spec_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of a spec file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moeplan spec",
        "description": "A Mixture-of-Experts model, its workload and the machines it may run on.",
        **_schema(SPEC),
    }


def _schema(kind: Kind) -> Schema:
    match kind:
        case Text():
            return {"type": "string", "pattern": kind.pattern}
        case Choice():
            return {"enum": list(kind.options)}
        case Whole():
            return {"type": "integer", "minimum": kind.low, "maximum": kind.high}
        case Measure():
            return _measure_schema(kind)
        case ListOf():
            return _list_schema(kind)
        case TableOf():
            return _table_schema(kind)
        case Group():
            return _group_schema(kind)


def _measure_schema(kind: Measure) -> Schema:
    text = {"type": "string", "pattern": kind.quantity.pattern}
    if not kind.quantity.bare:
        return text
    low, high = kind.bounds
    number = {"type": "integer" if kind.quantity.whole else "number", "minimum": low, "maximum": high}
    return {"anyOf": [number, text]}


def _list_schema(kind: ListOf) -> Schema:
    schema = {"type": "array", "items": _schema(kind.item), "minItems": 1, "maxItems": kind.most}
    if kind.unique:
        schema["uniqueItems"] = True
    if kind.several_need:
        schema["anyOf"] = [{"maxItems": 1}, {"items": {"required": [kind.several_need]}}]
    return schema


def _table_schema(kind: TableOf) -> Schema:
    return {
        "type": "object",
        "propertyNames": {"pattern": kind.key.pattern},
        "additionalProperties": _schema(kind.value),
        "minProperties": 1,
        "maxProperties": kind.most,
    }


def _group_schema(kind: Group) -> Schema:
    group: Schema = {
        "type": "object",
        "properties": {one.key: _field_schema(one) for one in kind.fields},
        "required": [one.key for one in kind.fields if one.required],
        "additionalProperties": False,
    }
    if kind.rules:
        group["allOf"] = [_rule_schema(rule) for rule in kind.rules]
    if kind.short_for:
        return {"anyOf": [_schema(kind.field(kind.short_for).kind), group]}
    return group


def _field_schema(one: Field) -> Schema:
    schema: Schema = {"description": _plain(one), **_schema(one.kind)}
    if one.default is not None:
        schema["default"] = one.default
    if one.examples:
        schema["examples"] = [yaml.safe_load(text) for text in one.examples]
    return schema


def _plain(one: Field) -> str:
    """What editors show of a key: its meaning and its range, without Markdown."""
    limits = f" From {one.kind.low} to {one.kind.high}." if isinstance(one.kind, Measure) else ""
    return one.doc.replace("`", "") + limits


def _rule_schema(rule: Rule) -> Schema:
    match rule:
        case ExactlyOne(keys=keys):
            return {"oneOf": [{"required": [key]} for key in keys]}
        case AtLeastOne(keys=keys):
            return {"anyOf": [{"required": [key]} for key in keys]}
        case NotTogether(keys=keys):
            return {"not": {"required": list(keys)}}
        case Needs(key=key, others=others):
            return {"dependentRequired": {key: list(others)}}


EXAMPLE = """\
name: mixtral                      # names the plan, its folder and its cloud resources
model: mixtral-8x7b                # or {path: ./checkpoint, dtype: float32}
workload:
  batch:
    requests: 1000                 # or, with sizes of their own: prompts: prompts.jsonl
    prompt: 77
    output: 128
    deadline: 8h
  online:
    rate: 8/s
    sizes:                         # or, from a log: trace: trace.csv
      - {prompt: 512, output: 128, share: 70%}
      - {prompt: 2048, output: 256, share: 30%}
    slo: {ttft: 2s, itl: 100ms, attainment: 99%}
market:                            # or, on one given machine: machine: g4dn.8xlarge
  clouds: [aws, gcp]
  regions: [aws/us-east-1, gcp/us-central1]
  gpus: [T4, L4, A100-80GB]
  purchase: any
  budget: $20/h
  quota: {T4: 8, L4: 4}
  availability: 99%
"""

_INTRODUCTION = f"""\
<!-- Generated: python -m moeplan.planner.schema > docs/spec.md -->
# The spec

A spec is one YAML file. It says what to run, for which work, and on which machines. Everything in it:

```yaml
{EXAMPLE}```

Paths are relative to the folder of the spec. Every problem of a file is reported at once, each with its line
and column. `moeplan schema` prints a JSON Schema, with which an editor completes keys and marks most mistakes
while you type.

## Keys
"""

_YAML = """\
## YAML

Files are read as plain data: text, numbers, lists and groups of keys. A number may be written `1000`, `2.5`
or `2e9`; readers of older YAML take the last for text, moeplan does not. An amount with a unit needs no
quotes. A name that looks like something else does: `'123'`, `'on'`, `'2e9'`.
"""

_STRICTER = """\
## What an editor does not see

These rules are checked when the spec is compiled, and are not part of the JSON Schema. Each is given with the
code of its error.

| code | rule |
| --- | --- |
"""


def spec_reference() -> str:
    """Every key of a spec, in Markdown."""
    parts = [_INTRODUCTION, *_sections(SPEC, ""), _words(), _amounts(), _YAML]
    rules = "".join(f"| `{rule.code}` | {rule.rule} |\n" for rule in STRICTER)
    return "\n".join([*parts, _STRICTER + rules])


def _sections(kind: Group, place: str, doc: str = "") -> Iterator[str]:
    """One section for this group and one for each group below it."""
    title = f"### `{place}`\n\n{doc}\n" if place else "### At the top of the file\n"
    rows = "".join(_row(one) for one in kind.fields)
    rules = "".join(f"\n{_rule_text(rule)}\n" for rule in kind.rules)
    yield f"{title}\n| key | value | if left out | meaning |\n| --- | --- | --- | --- |\n{rows}{rules}"
    for one in kind.fields:
        inner = f"{place}.{one.key}" if place else one.key
        if isinstance(one.kind, Group):
            yield from _sections(one.kind, inner, one.doc)
        elif isinstance(one.kind, ListOf) and isinstance(one.kind.item, Group):
            yield from _sections(one.kind.item, f"{inner}[]", f"One of `{inner}`.")


def _row(one: Field) -> str:
    absent = "required" if one.required else f"`{one.default}`" if one.default is not None else ""
    examples = f" Example: {', '.join(f'`{text}`' for text in one.examples)}." if one.examples else ""
    return f"| `{one.key}` | {_kind_text(one.kind)} | {absent} | {one.doc}{examples} |\n"


def _kind_text(kind: Kind) -> str:
    match kind:
        case Text():
            return kind.what
        case Choice():
            return " or ".join(f"`{option}`" for option in kind.options)
        case Whole():
            return f"a whole number, {kind.low} to {kind.high}"
        case Measure():
            return f"{kind.quantity.what}, {kind.low} to {kind.high}"
        case ListOf():
            once = ", each once" if kind.unique else ""
            return f"a list of 1 to {kind.most}{once}: {_kind_text(kind.item)}"
        case TableOf():
            return f"1 to {kind.most} keys, {kind.key.what}, each with {_kind_text(kind.value)}"
        case Group():
            short = f"{_kind_text(kind.field(kind.short_for).kind)}, or " if kind.short_for else ""
            return f"{short}a group of keys"


def _rule_text(rule: Rule) -> str:
    match rule:
        case ExactlyOne(keys=keys):
            return f"Give exactly one of {_listed(keys)}."
        case AtLeastOne(keys=keys):
            return f"Give at least one of {_listed(keys)}."
        case NotTogether(keys=keys):
            return f"Do not give {_listed(keys)} together."
        case Needs(key=key, others=others):
            return f"`{key}` needs {_listed(others)}."


def _listed(keys: tuple[str, ...]) -> str:
    return " and ".join(f"`{key}`" for key in keys)


def _words() -> str:
    """The rules for words."""
    kinds = dict.fromkeys(kind for kind in _kinds(SPEC) if isinstance(kind, Text))
    rows = "".join(f"| {kind.what} | {kind.rule} |\n" for kind in kinds)
    return f"## Words\n\n| value | rule |\n| --- | --- |\n{rows}"


def _amounts() -> str:
    """The units there are."""
    quantities = (units.BYTES, units.DURATION, units.RATE, units.MONEY, units.FRACTION, units.TOKENS)
    rows = "".join(
        f"| {one.what} | {', '.join(f'`{unit}`' for unit in one.units).replace('_', '…')} "
        f"| {', '.join(f'`{text}`' for text in one.examples)} |\n"
        for one in quantities
    )
    return f"## Amounts\n\n| value | units | examples |\n| --- | --- | --- |\n{rows}"


def _kinds(kind: Kind) -> Iterator[Kind]:
    """`kind` and every kind within it."""
    yield kind
    inner: tuple[Kind, ...] = ()
    if isinstance(kind, Group):
        inner = tuple(one.kind for one in kind.fields)
    elif isinstance(kind, ListOf):
        inner = (kind.item,)
    elif isinstance(kind, TableOf):
        inner = (kind.key, kind.value)
    for one in inner:
        yield from _kinds(one)


if __name__ == "__main__":
    print(spec_reference(), end="")
