"""The flags of engines, read out of their published packages without importing or building them.

    pip download --no-deps --only-binary :all: vllm==0.33.0
    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
    python tests/external/record_flags.py FOLDER_OF_BOTH

rewrites tests/codegen/flags/{vllm,llama_cpp}.json. tests/codegen/test_engines.py holds every flag that we
emit against them; test_flags.py compares them with the packages.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parents[1] / "codegen" / "flags"
PACKAGES = {"vllm": "vllm-*.whl", "llama_cpp": "llama_cpp_python-*.tar.gz"}
_ENGINE = "vllm/engine/arg_utils.py"
_SERVE = "vllm/entrypoints/common/cli_args.py"
_RUN_BATCH = "vllm/entrypoints/launchers/run_batch.py"
_QUANTIZATION = "vllm/model_executor/layers/quantization/__init__.py"
_LLAMA = "vendor/llama.cpp/common/arg.cpp"


def vllm_flags(wheel: Path) -> dict[str, Any]:
    """Version, flags of `vllm serve` and of `vllm run-batch`, and the values of --quantization."""
    with zipfile.ZipFile(wheel) as files:
        texts = {name: files.read(name).decode() for name in (_ENGINE, _SERVE, _RUN_BATCH, _QUANTIZATION)}
    engine = {text for text in _added_arguments(texts[_ENGINE]) if text.startswith("--")}
    base = _fields(texts[_SERVE], "BaseFrontendArgs")
    return {
        "version": wheel.name.split("-")[1],
        "source": f"{wheel.name}: {_ENGINE}, {_SERVE}, {_RUN_BATCH}, {_QUANTIZATION}",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "serve": sorted(engine | base | _fields(texts[_SERVE], "FrontendArgs")),
        "run-batch": sorted(engine | base | _fields(texts[_RUN_BATCH], "BatchFrontendArgs")),
        "quantization": sorted(_literal(texts[_QUANTIZATION], "QuantizationMethods")),
    }


def _added_arguments(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def _fields(text: str, record: str) -> set[str]:
    """Flags of a dataclass: each field is one, with hyphens."""
    classes = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef) and n.name == record)
    names = (n.target.id for c in classes for n in c.body if isinstance(n, ast.AnnAssign))  # type: ignore[union-attr]
    return {f"--{name.replace('_', '-')}" for name in names}


def _literal(text: str, name: str) -> list[str]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return [c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant)]
    raise ValueError(f"no {name}")


def llama_flags(sdist: Path) -> dict[str, Any]:
    """Version of the Python package that carries llama.cpp, and every flag of its common argument parser."""
    with tarfile.open(sdist) as files:
        member = next(m for m in files.getmembers() if m.name.endswith(_LLAMA))
        source = files.extractfile(member)
        assert source is not None
        text = source.read().decode()
    lists = re.findall(r"^\s*\{\s*((?:\"-[^\"]+\"(?:,\s*)?)+)\}", text, re.MULTILINE)
    return {
        "version": sdist.name.removesuffix(".tar.gz").rpartition("-")[2],
        "source": f"{sdist.name}: {_LLAMA}",
        "sha256": hashlib.sha256(sdist.read_bytes()).hexdigest(),
        "flags": sorted({flag for found in lists for flag in re.findall(r'"(-[^"]+)"', found)}),
    }


READERS = {"vllm": vllm_flags, "llama_cpp": llama_flags}


def main(folder: Path) -> None:
    for name, pattern in PACKAGES.items():
        record = READERS[name](next(folder.glob(pattern)))
        (RECORDS / f"{name}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
