"""oneDNN is kept from AMX tiles of size zero, and only from those."""

import os
import subprocess
import sys

import pytest

from moeplan.runtime_min.cpu import AMX_TILE, ISA, amx_is_hollow, is_hollow

PALETTE = (8192 | 1024 << 16, 64 | 8 << 16, 16, 0)


def cpuid(leaves):
    return lambda leaf, subleaf: leaves.get((leaf, subleaf), (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("leaves", "hollow"),
    [
        ({(0, 0): (0x20, 0, 0, 0), (7, 0): (0, 0, 0, 0)}, False),  # no AMX
        ({(0, 0): (0x20, 0, 0, 0), (7, 0): (0, 0, 0, AMX_TILE)}, True),  # leaf 0x1D empty
        ({(0, 0): (0x16, 0, 0, 0), (7, 0): (0, 0, 0, AMX_TILE)}, True),  # no leaf 0x1D
        ({(0, 0): (0x20, 0, 0, 0), (7, 0): (0, 0, 0, AMX_TILE), (0x1D, 0): (1, 0, 0, 0)}, True),
        (
            {
                (0, 0): (0x20, 0, 0, 0),
                (7, 0): (0, 0, 0, AMX_TILE),
                (0x1D, 0): (1, 0, 0, 0),
                (0x1D, 1): PALETTE,
            },
            False,
        ),
        ({(0, 0): (4, 0, 0, 0)}, False),  # older than leaf 7
    ],
)
def test_rule(leaves, hollow):
    assert is_hollow(cpuid(leaves)) is hollow


def test_this_processor_can_be_asked():
    assert amx_is_hollow() in (True, False)


def run(code: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if key != ISA}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_bf16_product_survives():
    """In a process of its own: an illegal instruction ends it."""
    code = (
        "from moeplan.runtime_min.engine import torch\n"
        "x = torch.ones(64, 64, dtype=torch.bfloat16)\n"
        "print(float((x @ x)[0, 0]))"
    )
    assert run(code) == "64.0"


def test_the_users_choice_stands():
    code = f"import os, moeplan.runtime_min; print(os.environ.get({ISA!r}))"
    assert run(code, **{ISA: "AVX2"}) == "AVX2"


def test_contract_and_help_import_no_torch():
    code = (
        "import sys, moeplan.runtime_min.plan_file, moeplan.runtime_min.__main__ as command\n"
        "try: command.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numba', 'tokenizers', 'jinja2', 'numpy'} & set(sys.modules)))"
    )
    assert run(code).splitlines()[-1] == "[]"
