"""The schema of a Terraform provider, read out of the CDK bindings that PyPI has of it.

A `cdktn-provider-*` wheel holds a tar archive with one index.js per resource. For every attribute that file
says whether it is computed, optional or required, the getter tells its type, and a table for HCL tells
which nested values are blocks. What comes out has the form of `terraform providers schema -json`.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CLASS = re.compile(r"^class (\w+) extends cdktn\.(\w+) \{$(.*?)^\}$", re.MULTILINE | re.DOTALL)
ATTRIBUTE = re.compile(
    r"^    // (\w+) - computed: (true|false), optional: (true|false), required: (true|false)$", re.MULTILINE
)
HCL_BLOCK = re.compile(
    r"listMapperHcl\(\w+, true\)\(.*\n\s+isBlock: true,.*\n.*\n\s+storageClassType: \"(\w+)\""
)
NESTED = re.compile(r'= new (\w+)\(this, "\w+"(?:, (true|false))?\)')
MAP = re.compile(r'= new cdktn\.(\w+?)(?:Map|List)\(this, "\w+"')
GETTER = re.compile(r"this\.get(\w+)Attribute\(")
RESOURCE_TYPE = re.compile(r'static tfResourceType = "(\w+)"')
PROVIDER_ATTRIBUTE = re.compile(
    r"^            (\w+): \{\n.*\n\s+isBlock: false,.*\n.*\n\s+storageClassType: \"(\w+)\"", re.M
)
TYPES: dict[str, Any] = {
    "String": "string",
    "Number": "number",
    "Boolean": "bool",
    "List": ["list", "string"],
    "NumberList": ["list", "number"],
    "StringMap": ["map", "string"],
    "BooleanMap": ["map", "bool"],
    "NumberMap": ["map", "number"],
    "string": "string",
    "number": "number",
    "boolean": "bool",
    "stringList": ["list", "string"],
    "stringMap": ["map", "string"],
}


def provider_schema(wheel: Path, provider: str, names: set[str]) -> dict[str, Any]:
    """Schemas of the resources (and data sources, `data-...`) called `names` as the wheel's folders are.

    Raises KeyError where the wheel lacks one.
    """
    resources: dict[str, Any] = {}
    data: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, text in _sources(wheel, {*names, "provider"}):
        if name == "provider":
            found = {
                key: {"type": TYPES[kind], "optional": True} for key, kind in PROVIDER_ATTRIBUTE.findall(text)
            }
            own = {"attributes": found}
            continue
        kind, block = _resource(text)
        (data if name.startswith("data-") else resources)[kind] = {"version": 0, "block": block}
    if missing := len(names) - len(resources) - len(data):
        raise KeyError(f"{missing} of {sorted(names)} are not in {wheel.name}")
    schemas = {
        "provider": {"version": 0, "block": own},
        "resource_schemas": resources,
        "data_source_schemas": data,
    }
    return {"format_version": "1.0", "provider_schemas": {f"registry.terraform.io/{provider}": schemas}}


def _sources(wheel: Path, names: set[str]) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as files:
        packed = files.read(next(name for name in files.namelist() if name.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        for member in archive:
            match = re.fullmatch(r"package/lib/([^/]+)/index\.js", member.name)
            if match and match[1] in names:
                file = archive.extractfile(member)
                assert file is not None
                yield match[1], file.read().decode()


def _resource(text: str) -> tuple[str, dict[str, Any]]:
    """The type of the resource that an index.js defines, and its block."""
    classes = {name: (base, body) for name, base, body in CLASS.findall(text)}
    blocks = set(HCL_BLOCK.findall(text))
    top = next(name for name, (base, _) in classes.items() if base.startswith("Terraform"))
    block = _block(top, classes, blocks)
    block["attributes"].setdefault("id", {"type": "string", "optional": True, "computed": True})
    kind = RESOURCE_TYPE.search(classes[top][1])
    assert kind is not None
    return kind[1], block


def _block(name: str, classes: dict[str, tuple[str, str]], hcl_blocks: set[str]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    pieces = ATTRIBUTE.split(classes[name][1])[1:]
    for key, computed, optional, required, code in zip(*[iter(pieces)] * 5, strict=True):
        flags = {
            "computed": computed == "true",
            "optional": optional == "true",
            "required": required == "true",
        }
        nested = NESTED.search(code)
        if nested is None or nested[1] not in classes:
            attributes[key] = {"type": _type(code), **flags}
            continue
        item = re.sub(r"(List|Map)$", "OutputReference", nested[1])
        many = nested[1].endswith("List")
        mode = "set" if nested[2] == "true" else "list"
        inner = _block(item, classes, hcl_blocks)
        if key == "timeouts":
            blocks[key] = {"nesting_mode": "single", "block": inner}
        elif (many and nested[1] not in hcl_blocks) or not (flags["optional"] or flags["required"]):
            attributes[key] = {"type": [mode, _object(inner)], **flags}
        else:
            limits = {"min_items": int(flags["required"]), "max_items": 0 if many else 1}
            blocks[key] = {"nesting_mode": mode, "block": inner, **limits}
    return {"attributes": attributes, "block_types": blocks}


def _type(code: str) -> Any:
    """Of a plain attribute: by its getter, or by the map class that a computed one is read through."""
    getter, mapped = GETTER.search(code), MAP.search(code)
    found = TYPES.get(getter[1] if getter else f"{mapped[1]}Map" if mapped else "", "dynamic")
    is_set = "Fn.tolist" in code
    return ["set", found[1]] if is_set and isinstance(found, list) else found


def _object(block: dict[str, Any]) -> list[Any]:
    """A block's type where it is the value of an attribute."""
    fields = {key: attribute["type"] for key, attribute in block["attributes"].items()}
    for key, nested in block["block_types"].items():
        fields[key] = [nested["nesting_mode"], _object(nested["block"])]
    return ["object", fields]


def write_schema(wheel: Path, provider: str, names: set[str], path: Path) -> None:
    """Write the schema as sorted JSON."""
    path.write_text(
        json.dumps(provider_schema(wheel, provider, names), indent=1, sort_keys=True), encoding="utf-8"
    )
