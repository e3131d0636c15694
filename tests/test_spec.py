"""The spec parser: values in base units with their places, and every bad text told, none crashing."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.ir.spec import MarketSpec, Slo, SpreadSpec
from moeplan.planner.spec import parse_spec

FULL = """\
name: everything
model:
  path: ./checkpoint
  dtype: float32
workload:
  batch:
    requests: 1000
    prompt: 77 tokens
    output: 128
    deadline: 1.5h
  online:
    rate: 500/min
    sizes:
      - {prompt: 512, output: 128, share: 70%}
      - {prompt: 2048, output: 256, share: 0.3}
    slo: {ttft: 2s, itl: 120ms, attainment: 99.5%}
market:
  clouds: [aws, gcp]
  regions: [aws/us-east-1]
  gpus: [T4, A100-80GB]
  purchase: spot
  budget: $20/h
  quota: {T4: 8, L4: 0}
  availability: 0.995
  spot_trace: spot.csv
  interruptions: bands.csv
  spread: {over: region, floor: 40%}
catalog: ./own
"""
SHORT = """\
name: short
model: mixtral-8x7b
workload: {batch: {prompts: requests.jsonl}}
machine: {file: box.yaml, memory: 24 GiB}
"""


def problems(text: str | bytes) -> str:
    with pytest.raises(CompileError) as caught:
        parse_spec(text, "spec.yaml")
    return str(caught.value)


def test_spread_may_be_one_word() -> None:
    text = SHORT.replace("machine: {file: box.yaml, memory: 24 GiB}", "market: {spread: zone}")
    assert parse_spec(text, "spec.yaml").market.spread == SpreadSpec(over="zone", floor=0.5)


def test_everything_in_base_units() -> None:
    spec = parse_spec(FULL, "spec.yaml")
    batch, online = spec.workload.batch, spec.workload.online
    assert batch is not None
    assert online is not None
    assert (batch.requests, batch.prompt_tokens, batch.output_tokens, batch.deadline_s) == (
        1000,
        77,
        128,
        5400.0,
    )
    assert online.rate_per_s == pytest.approx(500 / 60)
    assert [size.share for size in online.sizes] == pytest.approx([0.7, 0.3])
    assert online.slo == Slo(ttft_s=2.0, itl_s=pytest.approx(0.12), attainment=pytest.approx(0.995))
    assert spec.market == MarketSpec(
        clouds=("aws", "gcp"),
        regions=("aws/us-east-1",),
        gpus=("T4", "A100-80GB"),
        purchase="spot",
        budget_usd_per_hour=20.0,
        quota={"T4": 8, "L4": 0},
        availability=0.995,
        spot_trace="spot.csv",
        interruptions="bands.csv",
        spread=SpreadSpec(over="region", floor=0.4),
    )
    assert (spec.model.path, spec.model.dtype, spec.catalog) == ("./checkpoint", "float32", "./own")


def test_shorthands_and_defaults() -> None:
    spec = parse_spec(SHORT, "spec.yaml")
    assert (spec.model.name, spec.model.dtype) == ("mixtral-8x7b", "bf16")
    assert spec.machine is not None
    assert (spec.machine.file, spec.machine.memory_bytes) == ("box.yaml", 24 * 2**30)
    assert spec.market == MarketSpec()
    pinned = SHORT.replace("{file: box.yaml, memory: 24 GiB}", "g4dn.16xlarge")
    assert parse_spec(pinned, "spec.yaml").machine == dataclasses.replace(
        spec.machine, name="g4dn.16xlarge", file="", memory_bytes=None
    )


def test_every_value_has_its_place() -> None:
    spec = parse_spec(FULL, "dir/spec.yaml")
    lines = FULL.splitlines()
    for key, text in {
        "workload.online.slo.itl": "120ms",
        "workload.online.sizes.1.share": "0.3",
        "market.gpus.1": "A100-80GB",
        "market.quota.L4": "0}",
        "model.path": "./checkpoint",
    }.items():
        span = spec.spans[key]
        assert span.path == "dir/spec.yaml"
        assert lines[span.line - 1][span.column - 1 :].startswith(text)
    assert spec.span("workload.batch.prompts.deeper") == spec.spans["workload.batch"]


BAD = {
    "": "spec.yaml: the file is empty [empty-file]",
    "# only a comment\n": "spec.yaml: the file is empty [empty-file]",
    "- a\n": "spec.yaml:1:1: the spec is a list, expected a mapping [wrong-type]",
    "name:\tx\n": "spec.yaml:1:6: found character '\\t' that cannot start any token [yaml]\n"
    "  hint: indent with spaces, not tabs",
    "name: &a x\n": "spec.yaml:1:7: anchors and aliases are not supported [anchor]",
    "name: *a\n": "spec.yaml:1:7: anchors and aliases are not supported [anchor]",
    'name: "\\UFFFFFFFF"\n': "spec.yaml: an escape or version number is out of range [yaml]",
    f"%YAML 1.{'9' * 5000}\n--- {{}}\n": "spec.yaml: an escape or version number is out of range [yaml]",
    "name: a\u2028b\n": "spec.yaml:1:8: character U+2028 is not allowed [yaml]",
    "a: 1\n" * 30_000: "more than 20,000 keys and values [too-many-values]",
    SHORT.replace(
        "batch: {prompts: requests.jsonl}",
        "online: {rate: 1/s, sizes: [{prompt: 1, output: 1}, "
        "{prompt: 2, output: 1}], slo: {ttft: 1s, itl: 1s}}",
    ): "each of 2 workload.online.sizes needs a share [shares]",
    "name: !!python/object:os.system x\n": "spec.yaml:1:7: the tag tag:yaml.org,2002:python/object:os.system",
    "name: x\n---\nname: y\n": "spec.yaml:2:1: a spec is one YAML document [second-document]",
    "[" * 10_000: "spec.yaml:1:21: nested more than 20 levels deep [too-deep]",
    "{a: " * 10_000: "nested more than 20 levels deep [too-deep]",
    "name: a: b\n": "spec.yaml:1:8: mapping values are not allowed here [yaml]\n"
    "  hint: quote a value that holds a colon",
    "name: \x01\n": "character 1 is not allowed in YAML",
    'name: "\\ud800"\n': "spec.yaml:1:7: name holds half a character [bad-value]",
    "name: &a x\nmodel: *a\n": "spec.yaml:2:8: anchors and aliases are not supported [anchor]",
    SHORT.replace(
        "machine: {file: box.yaml, memory: 24 GiB}", f"market: {{gpus: [{'T4, ' * 9_000}]}}"
    ): "comes twice",
    "? [a]\n: b\n": "spec.yaml:1:3: a key must be a word [bad-key]",
    "<<: {name: x}\n": "spec.yaml:1:1: unknown key '<<'",
    SHORT + "name: again\n": "spec.yaml:5:1: 'name' comes twice [duplicate-key]",
    SHORT.replace(
        "short", "Not Good"
    ): "'Not Good' is not a name of lower-case letters, digits and hyphens [bad-value]",
    SHORT.replace("name: short", "name: no"): "name: 'no' is true or false to YAML, expected a name",
    SHORT.replace("name: short", "name: 2024-01-01"): "name: '2024-01-01' is a timestamp to YAML",
    SHORT.replace("name: short", "name:"): "name: '' is empty, expected a name",
    SHORT.replace("24 GiB", "24 gigs"): "machine.memory: '24 gigs' is not an amount of memory [bad-value]\n"
    "  hint: for example 24 GiB, 500 MB",
    SHORT.replace("24 GiB", "2e9"): "machine.memory: '2e9' is not an amount of memory [bad-value]",
    SHORT.replace(
        "24 GiB", "0x400000"
    ): "machine.memory: '0x400000' is not a plain decimal number [misread-number]",
    SHORT.replace("24 GiB", "1:30"): "machine.memory: '1:30' is not a plain decimal number [misread-number]",
    SHORT.replace("24 GiB", "12345.5"): "machine.memory: 12345.5 is not an amount of memory [bad-value]",
    SHORT.replace("24 GiB", ".nan"): "machine.memory: '.nan' is not a plain decimal number [misread-number]",
    SHORT.replace("24 GiB", "1.0e+999"): "machine.memory: 1.0e+999 is not an amount of memory [bad-value]",
    SHORT.replace("24 GiB", "1 KiB"): "machine.memory: 1 KiB is out of range [amount-out-of-range]\n"
    "  hint: the range is 1 MiB to 1 PiB",
    SHORT.replace(
        "machine:", "machin:"
    ): "unknown key 'machin' [unknown-key]\n  hint: did you mean 'machine'?",
    SHORT.replace("{batch: {prompts: requests.jsonl}}", "{}"): "workload needs batch or online [missing-key]",
    SHORT + "market: {}\n": "'machine' and 'market' exclude each other [exclusive-keys]",
    FULL.replace(
        "share: 0.3", "share: 0.2"
    ): "the shares in workload.online.sizes sum to 0.9 [shares]\n  hint: they must sum to 1 (100%)",
    FULL.replace(
        "rate: 500/min\n", "trace: t.csv\n"
    ): "sizes and trace exclude each other in workload.online",
    FULL.replace(
        "    rate: 500/min\n", ""
    ): "workload.online needs 'rate' [missing-key]\n  hint: for example: rate: 8/s",
    FULL.replace("{T4: 8, L4: 0}", "{'*T4': 8}"): "'*T4' is not a name [bad-value]",
    FULL.replace("[aws, gcp]", "[]"): "market.clouds is empty [empty-list]",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_bad_spec(text: str, message: str) -> None:
    assert message in problems(text)


def test_a_misspelt_key_beside_its_alternative() -> None:
    """The unknown key is told; it neither counts as missing nor excludes what stands beside it."""
    text = FULL.replace("  path:", "  name: m\n  paht:").replace("market:\n", "machine: m\nmarkt:\n")
    lines = [line for line in problems(text).splitlines() if line.startswith("spec.yaml")]
    assert [line.rpartition("unknown key ")[2] for line in lines] == [
        "'paht' in model [unknown-key]",
        "'markt' [unknown-key]",
    ]


def test_bytes_that_are_not_utf8() -> None:
    assert "spec.yaml:2:8: this byte is not UTF-8 text [not-utf8]" in problems(b"name: x\nmodel: \xff\n")


def test_byte_order_mark_is_harmless() -> None:
    assert parse_spec(b"\xef\xbb\xbf" + SHORT.encode(), "spec.yaml").name == "short"


def test_huge_file_is_refused_unread() -> None:
    assert "at most 1,048,576 are read [too-large]" in problems(b"#" * (1 << 21))


def test_all_problems_at_once_in_file_order() -> None:
    text = (
        FULL.replace("requests: 1000", "requests: 0")
        .replace("1.5h", "soon")
        .replace("purchase: spot", "purchase: sport")
    )
    found = problems(text.replace("  path:", "  pth:"))
    codes = [
        line.rpartition("[")[2].rstrip("]") for line in found.splitlines() if line.startswith("spec.yaml")
    ]
    assert codes == ["unknown-key", "out-of-range", "bad-value", "bad-value"]


def accept_or_diagnose(text: str | bytes) -> None:
    """Either a Spec, or diagnostics that point into the text."""
    try:
        parse_spec(text, "spec.yaml")
    except CompileError as error:
        found = error.diagnostics
    else:
        return
    assert found
    for diagnostic in found:
        assert diagnostic.span.path == "spec.yaml"
        assert 0 <= diagnostic.span.line <= len(text.splitlines()) + 1
        assert diagnostic.message


TOKENS = [
    "{",
    "}",
    "[",
    "]",
    ":",
    "- ",
    "\n",
    "  ",
    "\t",
    "#",
    "&a",
    "*a",
    "!!",
    "'",
    '"',
    "|",
    ">",
    "%",
    "?",
    "@",
]
WORDS = [
    "null",
    "~",
    ".nan",
    "-.inf",
    "1e999",
    "99999999999999999999999",
    "0o7",
    "1_0",
    "1:30",
    "yes",
    "---",
    "...",
]


@given(st.integers(0, 2**32))
@settings(max_examples=2500)
def test_mutated_specs_end_in_diagnostics(seed: int) -> None:
    """One to four edits of a good spec: characters, tokens, words, lines moved, doubled or dropped."""
    draw = random.Random(seed)
    text = draw.choice([FULL, SHORT])
    for _ in range(draw.randint(1, 4)):
        text = _edited(text, draw)
    accept_or_diagnose(text)


def _edited(text: str, draw: random.Random) -> str:
    at = draw.randrange(len(text) + 1)
    lines = text.splitlines(keepends=True) or [""]
    line = draw.randrange(len(lines))
    match draw.randrange(7):
        case 0:
            return text[:at] + draw.choice(TOKENS) + text[at:]
        case 1:
            return text[:at] + text[at + draw.randint(1, 5) :]
        case 2:
            words = text.split(" ")
            words[draw.randrange(len(words))] = draw.choice(WORDS)
            return " ".join(words)
        case 3:
            return "".join([*lines[:line], lines[line], *lines[line:]])
        case 4:
            return "".join(lines[:line] + lines[line + 1 :])
        case 5:  # two letters swapped, as typing does
            return text[:at] + text[at + 1 : at + 2] + text[at : at + 1] + text[at + 2 :]
        case _:
            return (
                text[:at]
                + chr(draw.choice([0, 7, 0x85, 0x2028, 0xFEFF, 0x1F600, draw.randrange(256)]))
                + text[at:]
            )


@given(st.binary(max_size=200))
@example(b"\x00")
@example(b"\xff\xfe" + "name: x".encode("utf-16-le"))
@settings(max_examples=500)
def test_any_bytes_end_in_diagnostics(data: bytes) -> None:
    accept_or_diagnose(data)


def test_spans_do_not_make_specs_differ() -> None:
    """A comment moves every span; the spec stays the same."""
    assert parse_spec("# a comment\n" + FULL, "spec.yaml") == parse_spec(FULL, "spec.yaml")
    assert parse_spec("# a comment\n" + FULL, "spec.yaml").spans["name"] == Span("spec.yaml", 2, 7)
