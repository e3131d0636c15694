"""The language table as a JSON Schema for editors, and as the reference in docs/spec.md."""

from __future__ import annotations

from typing import Any

from moeplan.planner.language import SPEC, Block, Field, Kind, Listing, Scalar, Table

# What the parser refuses and JSON Schema cannot say, by diagnostic code.
STRICTER_THAN_SCHEMA = {
    "amount-out-of-range": "the range of a number inside text such as `24 GiB`",
    "shares": "shares that do not sum to 1, or are missing from some of several sizes",
    "duplicate-key": "a key that comes twice: YAML parsers differ, data has one",
    "misread-number": "octal, hexadecimal, sexagesimal and underscored numbers: data has the number",
}


def spec_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the spec as YAML data."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moeplan spec",
        "description": "Model, workload and machine or market: what `moeplan compile` reads.",
        **_schema(SPEC),
    }


def _schema(kind: Kind) -> dict[str, Any]:
    match kind:
        case Scalar():
            return _scalar(kind)
        case Listing():
            listed: dict[str, Any] = {"type": "array", "minItems": 1, "items": _schema(kind.item)}
            return {**listed, "uniqueItems": True} if kind.once else listed
        case Table():
            names = {"pattern": kind.key.pattern}
            return {"type": "object", "propertyNames": names, "additionalProperties": _schema(kind.value)}
        case Block():
            return _block(kind)


def _scalar(kind: Scalar) -> dict[str, Any]:
    if kind.choices:
        return {"enum": list(kind.choices)}
    forms: list[dict[str, Any]] = []
    if kind.number:
        forms.append({"type": kind.number, "minimum": kind.low, "maximum": kind.high})
    if kind.pattern:
        forms.append({"type": "string", "pattern": kind.pattern})
    form = forms[0] if len(forms) == 1 else {"anyOf": forms}
    return {**form, "examples": [_typed(kind, example) for example in kind.examples]}


def _typed(kind: Scalar, example: str) -> str | int | float:
    """A bare number among the examples is one in the schema too."""
    if not kind.number:
        return example
    try:
        return int(example) if kind.number == "integer" else float(example)
    except ValueError:
        return example


def _block(block: Block) -> dict[str, Any]:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: _field(field) for name, field in block.fields.items()},
        "additionalProperties": False,
    }
    required = [name for name, field in block.fields.items() if field.required]
    if required:
        schema["required"] = required
    if block.any_of:
        schema["anyOf"] = [{"required": [name]} for name in block.any_of]
    if block.exclusive:
        schema["not"] = {"required": list(block.exclusive)}
    if block.options:
        schema["oneOf"] = [
            {"required": [option.key, *option.needs], "properties": dict.fromkeys(others, False)}
            for option in block.options
            if (others := [other.key for other in block.options if other is not option])
        ]
    if not block.short:
        return schema
    return {"anyOf": [_schema(block.fields[block.short].kind), schema]}


def _field(field: Field) -> dict[str, Any]:
    described = {"description": field.doc[0].upper() + field.doc[1:] + "."}
    if field.default:
        described["default"] = field.default
    return {**described, **_schema(field.kind)}


_EXAMPLE = """\
```yaml
name: assistant
model: {path: ./our-checkpoint, dtype: bf16}     # or a catalog name: model: mixtral-8x7b
workload:
  batch: {prompts: nightly.jsonl, deadline: 8h}  # or {requests: 20000, prompt: 512, output: 128}
  online:
    rate: 8/s
    sizes:                                       # or trace: requests.csv
      - {prompt: 500, output: 150, share: 70%}
      - {prompt: 3000, output: 400, share: 30%}
    slo: {ttft: 2s, itl: 100ms, attainment: 99%}
market:                                          # or machine: g4dn.16xlarge, your own box
  clouds: [aws, gcp]
  gpus: [L4, A100-80GB, H100]
  quota: {H100: 8}
  budget: $40/h
```"""


def spec_reference() -> str:
    """docs/spec.md: every key of the language, generated from the table."""
    lines = [
        "# The spec",
        "",
        "One YAML file. `moeplan schema` prints a JSON Schema of it for editors. Generated from",
        "`planner/language.py`; edit that.",
        "",
        *_EXAMPLE.splitlines(),
        "",
        "| key | value | required | meaning |",
        "| --- | --- | --- | --- |",
        *_rows(SPEC, ""),
        "",
        "Units are written as in the examples. Bytes: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB. Durations: ms,",
        "s, min, h, d. Rates: /s, /min, /h. A share is a percentage or a number up to 1. Paths are relative",
        "to the spec file. Anchors, tags and further documents are refused.",
        "",
        "The parser also refuses, beyond what the JSON Schema can say:",
        "",
        *[f"- {what} (`{code}`)" for code, what in STRICTER_THAN_SCHEMA.items()],
    ]
    return "\n".join(lines) + "\n"


def _rows(block: Block, prefix: str) -> list[str]:
    rows = []
    for name, field in block.fields.items():
        key = f"{prefix}{name}"
        meaning = field.doc + (f"; default {field.default}" if field.default else "")
        rows.append(f"| `{key}` | {_value(field.kind)} | {_need(block, name, field)} | {meaning} |")
        inner = field.kind.item if isinstance(field.kind, Listing) else field.kind
        if isinstance(inner, Block):
            rows += _rows(inner, f"{key}[]." if isinstance(field.kind, Listing) else f"{key}.")
    return rows


def _need(block: Block, name: str, field: Field) -> str:
    """Whether a key must be there, in a phrase."""
    if field.required:
        return "yes"
    marks = [option.key for option in block.options]
    if name in marks:
        return f"one of {', '.join(f'`{mark}`' for mark in marks)}"
    with_keys = [option.key for option in block.options if name in option.needs]
    if with_keys:
        return f"with `{with_keys[0]}`"
    if name in block.any_of:
        return f"at least one of {', '.join(f'`{other}`' for other in block.any_of)}"
    if block.exclusive and name in block.exclusive:
        other = next(key for key in block.exclusive if key != name)
        return f"not with `{other}`"
    return ""


def _value(kind: Kind) -> str:
    match kind:
        case Scalar():
            limits = f" ({kind.limits})" if kind.limits else ""
            return ", ".join(f"`{example}`" for example in kind.examples) + limits
        case Listing():
            return "list" if isinstance(kind.item, Block) else f"list of {_value(kind.item)}"
        case Table():
            return f"{_value(kind.key)} to {_value(kind.value)}"
        case Block():
            return "mapping"
