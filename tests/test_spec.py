"""Spec files: what is read, from where in the text, and every way in which it can be wrong."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

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
from moeplan.planner.spec import parse_spec

FULL = """\
name: mixtral-t4
model:
  name: mixtral-8x7b
  dtype: fp16
workload:
  batch:
    requests: 1000
    prompt: 77
    output: 128 tokens
    deadline: 8h
  online:
    rate: 8/s
    sizes:
      - {prompt: 512, output: 128, share: 70%}
      - {prompt: 2048, output: 256, share: 0.3}
    slo: {ttft: 2s, itl: 100ms, attainment: 99.5 %}
market:
  clouds: [aws, gcp, azure]
  regions: [aws/us-east-1, gcp/us-central1]
  gpus: [T4, L4, A100-80GB]
  purchase: on-demand
  budget: $20/h
  quota: {T4: 8, L4: 4}
  availability: 99.9%
catalog: ./catalog
"""
BATCH = "name: a\nmodel: m\nworkload: {batch: {requests: 1, prompt: 2, output: 3}}\n"
ONLINE = "name: a\nmodel: m\nworkload: {online: {trace: t.csv, slo: {ttft: 2s, itl: 100ms}}}\n"


def parse(text: str | bytes) -> Spec:
    return parse_spec(text, "spec.yaml")


def problems(text: str | bytes) -> tuple[Diagnostic, ...]:
    with pytest.raises(CompileError) as error:
        parse(text)
    return error.value.diagnostics


def codes(text: str | bytes) -> list[str]:
    return [problem.code for problem in problems(text)]


# What is read


def test_every_key() -> None:
    assert parse(FULL) == Spec(
        path="spec.yaml",
        name="mixtral-t4",
        model=ModelRef(name="mixtral-8x7b", dtype="fp16"),
        workload=WorkloadSpec(
            batch=BatchSpec(requests=1000, prompt_tokens=77, output_tokens=128, deadline_s=28800.0),
            online=OnlineSpec(
                rate_per_s=8.0,
                sizes=(
                    SizeSpec(prompt_tokens=512, output_tokens=128, share=0.7),
                    SizeSpec(prompt_tokens=2048, output_tokens=256, share=0.3),
                ),
                slo=Slo(ttft_s=2.0, itl_s=0.1, attainment=0.995),
            ),
        ),
        machine=None,
        market=MarketSpec(
            clouds=("aws", "gcp", "azure"),
            regions=("aws/us-east-1", "gcp/us-central1"),
            gpus=("T4", "L4", "A100-80GB"),
            purchase="on-demand",
            budget_usd_per_hour=20.0,
            quota={"T4": 8, "L4": 4},
            availability=0.999,
        ),
        catalog="./catalog",
    )


def test_defaults() -> None:
    """What is left out is what the records say by themselves."""
    spec = parse(ONLINE)
    assert spec.model == ModelRef(name="m")
    assert spec.market == MarketSpec()
    assert spec.machine is None
    assert spec.workload.online == OnlineSpec(
        rate_per_s=None, trace_file="t.csv", slo=Slo(ttft_s=2, itl_s=0.1, attainment=0.99)
    )
    assert parse(BATCH + "market: {gpus: [T4]}").market == MarketSpec(gpus=("T4",))
    assert parse(BATCH + "market: {}").market == MarketSpec()


def test_alternatives() -> None:
    spec = parse(
        "name: a\nmodel: {path: ../checkpoint}\n"
        "workload: {batch: {prompts: p.jsonl, prompt: 9}}\n"
        "machine: {file: machine.yaml, memory: 24 GiB}\n"
    )
    assert spec.model == ModelRef(path="../checkpoint")
    assert spec.workload.batch == BatchSpec(prompts_file="p.jsonl", prompt_tokens=9)
    assert spec.machine == MachineRef(file="machine.yaml", memory_bytes=24 * 2**30)
    assert parse(BATCH + "machine: g4dn.8xlarge").machine == MachineRef(name="g4dn.8xlarge")
    assert parse(BATCH + "machine: {name: x, memory: 1073741824}").machine == MachineRef(
        name="x", memory_bytes=2**30
    )


def test_shares_are_made_to_add_up_exactly() -> None:
    sizes = ", ".join("{prompt: 1, output: 1, share: 33.3333%}" for _ in range(3))
    text = ONLINE.replace("trace: t.csv", f"rate: 1/s, sizes: [{sizes}]")
    online = parse(text).workload.online
    assert online
    assert sum(size.share for size in online.sizes) == pytest.approx(1, abs=1e-15)
    one = parse(ONLINE.replace("trace: t.csv", "rate: 1/s, sizes: [{prompt: 1, output: 1}]")).workload.online
    assert one
    assert one.sizes == (SizeSpec(prompt_tokens=1, output_tokens=1, share=1.0),)


def test_spans() -> None:
    """Every key present has a place: a value's own, or that of the key above a group or list."""
    spec = parse(FULL)
    assert spec.span("") == Span("spec.yaml", 1, 1)
    assert spec.span("name") == Span("spec.yaml", 1, 7)
    assert spec.span("model") == Span("spec.yaml", 2, 1)
    assert spec.span("workload.online.slo.ttft") == Span("spec.yaml", 16, 17)
    assert spec.span("workload.online.sizes.1.prompt") == Span("spec.yaml", 15, 18)
    assert spec.span("market.quota.L4") == Span("spec.yaml", 23, 22)
    assert spec.span("market.gpus.2") == Span("spec.yaml", 20, 18)
    assert spec.span("market.gpus.3") == spec.span("market.gpus") == Span("spec.yaml", 20, 3)
    short = parse(BATCH)
    assert short.span("model.name") == short.span("model") == Span("spec.yaml", 2, 8)


def test_spans_hold_the_values() -> None:
    """Where a span points, the text is the value that the key has."""
    lines = FULL.splitlines()
    for key, span in parse(FULL).spans.items():
        here = lines[span.line - 1][span.column - 1 :]
        expected: object = yaml.safe_load(FULL)
        for part in filter(None, key.split(".")):
            expected = expected[int(part)] if isinstance(expected, list) else expected[part]  # type: ignore[index]
        if isinstance(expected, dict | list):
            assert here.startswith((key.rpartition(".")[2], "{")), key
        else:
            assert here.startswith(str(expected)), key


def test_text_and_bytes_are_the_same() -> None:
    assert parse(FULL.encode()) == parse(FULL) == parse(FULL.replace("\n", "\r\n"))
    assert parse(yaml.safe_dump(yaml.safe_load(FULL))) == parse(FULL)


# Scalars that YAML readers disagree on: 1.1 or 1.2 take them for something else than was meant


@pytest.mark.parametrize(
    ("written", "requests"),
    [
        ("1000", 1000),
        ("+5", 5),
        ("1e3", 1000),  # text in YAML 1.1
        ("2e9", 2_000_000_000),
        ("2.0e9", 2_000_000_000),
        ("2.5E+3", 2500),
        ("5.0", 5),
        ("1000000000000", 10**12),
    ],
)
def test_numbers_mean_the_obvious(written: str, requests: int) -> None:
    batch = parse(BATCH.replace("requests: 1", f"requests: {written}")).workload.batch
    assert batch
    assert batch.requests == requests
    assert isinstance(batch.requests, int)


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("010", "ambiguous-value"),  # 8 or 10
        ("0o10", "ambiguous-value"),  # text or 8
        ("0x10", "ambiguous-value"),
        ("0b11", "ambiguous-value"),
        ("1_000", "ambiguous-value"),  # 1000 or text
        ("12:30:00", "ambiguous-value"),  # 45000 or text
        ("2026-01-31", "ambiguous-value"),  # a date or text
        ("on", "ambiguous-value"),  # true or text
        ("true", "wrong-type"),
        ("'1000'", "wrong-type"),
        ("1000 requests", "wrong-type"),
        ("1.5", "wrong-type"),
        ("nan", "wrong-type"),
        ("", "wrong-type"),
        ("~", "wrong-type"),
        ("null", "wrong-type"),
        ("[1]", "wrong-type"),
        ("{a: 1}", "wrong-type"),
        (".nan", "out-of-range"),
        (".inf", "out-of-range"),
        ("-.INF", "out-of-range"),
        ("1e999", "out-of-range"),
        ("1e999999999999999999999", "out-of-range"),
        ("9" * 5000, "out-of-range"),
        ("0", "out-of-range"),
        ("-1", "out-of-range"),
        ("1000000000001", "out-of-range"),
    ],
)
def test_numbers_that_are_none(written: str, code: str) -> None:
    assert codes(BATCH.replace("requests: 1", f"requests: {written}")) == [code]


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("123", "wrong-type"),
        ("65e12", "wrong-type"),  # text in YAML 1.1, a number in 1.2: a commit can look like this
        ("true", "wrong-type"),
        ("~", "wrong-type"),
        ("on", "ambiguous-value"),
        ("No", "ambiguous-value"),
        ("010", "ambiguous-value"),
        ("1_000", "ambiguous-value"),
        ("12:30:00", "ambiguous-value"),
        ("2026-01-31", "ambiguous-value"),
    ],
)
def test_names_that_look_like_something_else(written: str, code: str) -> None:
    """Unquoted they are refused with the way out; in quotes they are names."""
    (problem,) = problems(BATCH.replace("model: m", f"model: {written}"))
    assert problem.code == code
    if written != "~":
        assert problem.hint == f"put it in quotes: '{written}'"
    assert parse(BATCH.replace("model: m", f"model: '{written}'")).model.name == written


@pytest.mark.parametrize("name", ["y", "n", "=", "1.2.3", "a: b", "8x7b", "e5", "-", "nan", "x\u00fc"])
def test_names_that_are_just_text(name: str) -> None:
    text = f"'{name}'" if ":" in name or name in "-=" else name
    assert parse(BATCH.replace("model: m", f"model: {text}")).model.name == name


def test_keys_are_always_text() -> None:
    """A GPU may be called 4090, and a key `on` is not `true`."""
    market = parse(BATCH + "market: {quota: {4090: 1, on: 2, 010: 3}}").market
    assert market.quota == {"4090": 1, "on": 2, "010": 3}


@pytest.mark.parametrize("share", ["100%", "100 %", "1", "1.0", "'100%'", "1e0", "99.99995%"])
def test_shares(share: str) -> None:
    sizes = f"rate: 1/s, sizes: [{{prompt: 1, output: 1, share: {share}}}]"
    assert parse(ONLINE.replace("trace: t.csv", sizes))


# What is wrong, word for word

SLO = "slo: {ttft: 2s, itl: 100ms}"
WRONG: dict[str, tuple[str | bytes, str]] = {
    "empty": (
        "",
        """\
spec.yaml: the file is empty [empty-file]
  hint: a spec has at least the keys name, model and workload""",
    ),
    "only a comment": (
        "# nothing\n---\n",
        """\
spec.yaml: the file is empty [empty-file]
  hint: a spec has at least the keys name, model and workload""",
    ),
    "not UTF-8": (
        BATCH.encode() + b"# caf\xe9\n",
        """\
spec.yaml:4:6: byte 0xe9 is not UTF-8 text [not-utf-8]
  hint: save the file as UTF-8""",
    ),
    "UTF-8 with BOM": (
        BATCH.encode("utf-8-sig"),
        """\
spec.yaml:1:1: the file starts with a byte order mark [byte-order-mark]
  hint: save it as UTF-8 without BOM""",
    ),
    "UTF-16": (
        BATCH.encode("utf-16"),
        """\
spec.yaml:1:1: the file starts with a byte order mark [byte-order-mark]
  hint: save it as UTF-8 without BOM""",
    ),
    "NUL": (
        BATCH + "\0",
        """\
spec.yaml:4:1: character U+0000 is not allowed [bad-character]
  hint: remove it""",
    ),
    "half a character": (
        BATCH.replace("model: m", r'model: "\ud800"'),
        """\
spec.yaml:2:8: \\ud800 is half a character [bad-character]
  hint: write the character itself""",
    ),
    "NUL in a path": (
        BATCH + r'catalog: "a\0b"',
        r"""spec.yaml:4:10: catalog is 'a\x00b'; expected a path [wrong-text]
  hint: 1 to 4096 characters, absolute or relative to the folder of the spec""",
    ),
    "tab": (
        "name: a\nmodel:\n\tname: m\n",
        """\
spec.yaml:3:1: a tab where YAML allows only spaces [tab]
  hint: indent with spaces""",
    ),
    "two documents": (
        f"{BATCH}---\n{BATCH}",
        """\
spec.yaml:4:1: a second document starts here [several-documents]
  hint: keep what is above this line and move the rest to a file of its own""",
    ),
    "duplicate key": (
        BATCH + "name: b\n",
        """\
spec.yaml:4:1: key 'name' appears twice, first on line 1 [duplicate-key]
  hint: keep one of them""",
    ),
    "anchor and alias": (
        "name: &n a\nmodel: *n\nworkload: {batch: {prompts: p}}\n",
        """\
spec.yaml:1:7: anchors (&n) are not read here [anchor]
  hint: write the value out where it is used
spec.yaml:2:8: aliases (*n) are not read here [alias]
  hint: write the value out""",
    ),
    "alias to itself": (
        BATCH + "market: &m {quota: *m}\n",
        """\
spec.yaml:4:9: anchors (&m) are not read here [anchor]
  hint: write the value out where it is used
spec.yaml:4:20: aliases (*m) are not read here [alias]
  hint: write the value out""",
    ),
    "merge key": (
        BATCH + "market: {<<: {gpus: [T4]}}\n",
        """\
spec.yaml:4:10: merge keys (<<) are not read here [merge-key]
  hint: write the keys out""",
    ),
    "tag": (
        BATCH + "catalog: !!python/object/apply:os.system ['true']\n",
        """\
spec.yaml:4:10: tags (!!python/object/apply:os.system) are not read here [tag]
  hint: remove the tag
spec.yaml:4:10: catalog is a list; expected a path [wrong-type]""",
    ),
    "harmless tag": (
        BATCH + "catalog: !!str 5\n",
        """\
spec.yaml:4:10: tags (!!str) are not read here [tag]
  hint: remove the tag""",
    ),
    "key that is a list": (
        BATCH + "? [a]\n: 1\n",
        """\
spec.yaml:4:3: a key must be a plain word [key-not-text]""",
    ),
    "10,000 brackets": (
        "name: " + "[" * 10_000,
        """\
spec.yaml:1:26: nested deeper than 20 levels [nested-too-deep]""",
    ),
    "10,000 groups": (
        "{a: " * 10_000,
        """\
spec.yaml:1:78: nested deeper than 20 levels [nested-too-deep]""",
    ),
    "too large": (
        "#" * (2**20 + 1),
        """\
spec.yaml: the file is larger than 1 MiB [file-too-large]""",
    ),
    "too many values": (
        "name:\n" + "- a\n" * 30_000,
        """\
spec.yaml:19999:3: more than 20000 keys and values [too-many-values]""",
    ),
    "bracket not closed": (
        BATCH + "market:\n  gpus: [T4, L4\n",
        """\
spec.yaml:5:9: what starts here does not end [yaml-syntax]
  hint: close the quote or bracket""",
    ),
    "bracket not closed before the next key": (
        "name: a\nmodel: {name: m\nworkload: {}\n",
        """\
spec.yaml:3:9: not YAML: unexpected ':' [yaml-syntax]
  hint: look for a missing quote, bracket, colon or indentation here or just above""",
    ),
    "quote not closed": (
        "name: 'a\nmodel: m\n",
        """\
spec.yaml:1:7: what starts here does not end [yaml-syntax]
  hint: close the quote or bracket""",
    ),
    "two colons": (
        "name: a: b\n",
        """\
spec.yaml:1:8: a ':' that follows no key [yaml-syntax]
  hint: check the indentation and the blank after each colon; text that has ': ' in it needs quotes""",
    ),
    "character that needs quotes": (
        "name: a\nmodel: @m\n",
        """\
spec.yaml:2:8: a value cannot start with '@' [yaml-syntax]
  hint: put the value in quotes""",
    ),
    "escape of no character": (
        'name: "\\UFFFFFFFF"\n',
        """\
spec.yaml:1:10: this is not YAML [yaml-syntax]
  hint: look for a missing quote, bracket, colon or indentation here or just above""",
    ),
    "a list": (
        "- name: a\n",
        """\
spec.yaml:1:1: the file is a list; expected a group of keys [wrong-type]
  hint: known keys: name, model, workload, machine, market, catalog""",
    ),
    "a word": (
        "mixtral\n",
        """\
spec.yaml:1:1: the file is 'mixtral'; expected a group of keys [wrong-type]
  hint: known keys: name, model, workload, machine, market, catalog""",
    ),
    "no keys": (
        "{}\n",
        """\
spec.yaml:1:1: the spec needs the key 'model' [missing-key]
  hint: such as model: mixtral-8x7b
spec.yaml:1:1: the spec needs the key 'name' [missing-key]
  hint: such as name: mixtral-t4
spec.yaml:1:1: the spec needs the key 'workload' [missing-key]
  hint: such as workload: {batch: {requests: 1000, prompt: 77, output: 128}}""",
    ),
    "null groups": (
        "name:\nmodel: null\nworkload: ~\n",
        """\
spec.yaml:1:6: name is empty; expected a name [wrong-type]
spec.yaml:2:8: model is null; expected a name or a group of keys [wrong-type]
  hint: known keys: name, path, dtype
spec.yaml:3:11: workload is ~; expected a group of keys [wrong-type]
  hint: known keys: batch, online""",
    ),
    "misspelt key": (
        BATCH.replace("output", "ouput"),
        """\
spec.yaml:3:44: unknown key 'ouput' in workload.batch [unknown-key]
  hint: did you mean 'output'?""",
    ),
    "nothing like a key": (
        BATCH.replace("output: 3", "output: 3, zebra: 1"),
        """\
spec.yaml:3:55: unknown key 'zebra' in workload.batch [unknown-key]
  hint: known keys: requests, prompts, prompt, output, deadline""",
    ),
    "a name with capitals": (
        BATCH.replace("name: a", "name: Mixtral on T4"),
        """\
spec.yaml:1:7: name is 'Mixtral on T4'; expected a name [wrong-text]
  hint: 1 to 42 lower-case letters, digits and inner hyphens: it names files and cloud resources""",
    ),
    "neither of two": (
        "name: a\nmodel: {dtype: bf16}\nworkload: {batch: {prompt: 1, output: 1}}\n",
        """\
spec.yaml:2:1: model needs one of the keys 'name' or 'path' [missing-key]
spec.yaml:3:12: workload.batch needs one of the keys 'requests' or 'prompts' [missing-key]""",
    ),
    "both of two": (
        BATCH.replace("model: m", "model: {name: m, path: p}") + "machine: m\nmarket: {gpus: [T4]}\n",
        """\
spec.yaml:2:18: 'name' and 'path' cannot both be given in model [conflicting-keys]
  hint: remove one of them
spec.yaml:5:1: 'machine' and 'market' cannot both be given [conflicting-keys]
  hint: remove one of them""",
    ),
    "requests without sizes": (
        "name: a\nmodel: m\nworkload:\n  batch:\n    requests: 5\n",
        """\
spec.yaml:4:3: workload.batch.requests needs the key 'output' [missing-key]
spec.yaml:4:3: workload.batch.requests needs the key 'prompt' [missing-key]""",
    ),
    "sizes without a rate or an SLO": (
        "name: a\nmodel: m\nworkload: {online: {sizes: [{prompt: 1, output: 1}]}}\n",
        """\
spec.yaml:3:12: workload.online needs the key 'slo' [missing-key]
  hint: such as slo: {ttft: 2s, itl: 100ms}
spec.yaml:3:12: workload.online.sizes needs the key 'rate' [missing-key]""",
    ),
    "several sizes without shares": (
        ONLINE.replace("trace: t.csv", "rate: 1/s, sizes: [{prompt: 1, output: 1}, {prompt: 1, output: 1}]"),
        """\
spec.yaml:3:40: each of several workload.online.sizes needs the key 'share' [missing-key]
spec.yaml:3:64: each of several workload.online.sizes needs the key 'share' [missing-key]""",
    ),
    "shares that do not add up": (
        ONLINE.replace(
            "trace: t.csv",
            "rate: 1/s, sizes: [{prompt: 1, output: 1, share: 70%}, {prompt: 1, output: 1, share: 20%}]",
        ),
        """\
spec.yaml:3:32: the shares of workload.online.sizes add up to 90% [shares-sum]
  hint: make them add up to 100%""",
    ),
    "units": (
        "name: a\nmodel: m\nworkload:\n"
        "  batch: {requests: 1, prompt: 1, output: 1 word, deadline: 8 hours}\n"
        "  online: {rate: 8, trace: t, slo: {ttft: 2, itl: 0.1 sec, attainment: high}}\n"
        "market: {budget: $20, availability: '0.99'}\n",
        """\
spec.yaml:4:43: workload.batch.output is '1 word'; expected a number of tokens [wrong-unit]
  hint: write it as 512 or 512 tokens
spec.yaml:4:61: workload.batch.deadline is '8 hours'; expected a duration [wrong-unit]
  hint: write it as 120ms, 2s, 1.5 min, 8h or 2d
spec.yaml:5:18: workload.online.rate is 8, without a unit [wrong-unit]
  hint: write it as 8/s, 500/min or 3600/h
spec.yaml:5:43: workload.online.slo.ttft is 2, without a unit [wrong-unit]
  hint: write it as 120ms, 2s, 1.5 min, 8h or 2d
spec.yaml:5:51: workload.online.slo.itl is '0.1 sec'; expected a duration [wrong-unit]
  hint: write it as 120ms, 2s, 1.5 min, 8h or 2d
spec.yaml:5:72: workload.online.slo.attainment is 'high'; expected a share [wrong-unit]
  hint: write it as 99% or 0.99
spec.yaml:6:18: market.budget is '$20'; expected an hourly price [wrong-unit]
  hint: write it as $20/h or 20 USD/h
spec.yaml:6:37: market.availability is '0.99'; expected a share [wrong-unit]
  hint: write it as 99% or 0.99""",
    ),
    "ranges": (
        "name: a\nmodel: m\nworkload:\n"
        "  batch: {requests: 0, prompt: 10000001, output: 0 tokens, deadline: 0s}\n"
        "  online: {rate: 2000000/s, trace: t, slo: {ttft: 2d, itl: 0.01ms, attainment: 100%}}\n"
        "market: {budget: $0/h, availability: 1, quota: {T4: -1}}\n",
        """\
spec.yaml:4:21: workload.batch.requests is 0, out of range [out-of-range]
  hint: from 1 to 1000000000000
spec.yaml:4:32: workload.batch.prompt is 10000001, out of range [out-of-range]
  hint: from 1 token to 10000000 tokens
spec.yaml:4:50: workload.batch.output is 0 tokens, out of range [amount-out-of-range]
  hint: from 1 token to 10000000 tokens
spec.yaml:4:70: workload.batch.deadline is 0s, out of range [amount-out-of-range]
  hint: from 1s to 365d
spec.yaml:5:18: workload.online.rate is 2000000/s, out of range [amount-out-of-range]
  hint: from 1/d to 1000000/s
spec.yaml:5:51: workload.online.slo.ttft is 2d, out of range [amount-out-of-range]
  hint: from 1ms to 1d
spec.yaml:5:60: workload.online.slo.itl is 0.01ms, out of range [amount-out-of-range]
  hint: from 0.1ms to 1h
spec.yaml:5:80: workload.online.slo.attainment is 100%, out of range [amount-out-of-range]
  hint: from 50% to 99.999%
spec.yaml:6:18: market.budget is $0/h, out of range [amount-out-of-range]
  hint: from $0.01/h to $1000000/h
spec.yaml:6:38: market.availability is 1, out of range [out-of-range]
  hint: from 50% to 99.999%
spec.yaml:6:53: market.quota.T4 is -1, out of range [out-of-range]
  hint: from 0 to 1000000""",
    ),
    "words and lists": (
        BATCH.replace("model: m", "model: {name: m, dtype: float16}")
        + "market:\n  clouds: [aws, ibm, aws]\n  regions: []\n  gpus: T4\n"
        + "  purchase: ondemand\n  quota: [T4]\n",
        """\
spec.yaml:2:25: model.dtype cannot be 'float16' [unknown-word]
  hint: did you mean 'float32'?
spec.yaml:5:17: market.clouds.1 cannot be 'ibm' [unknown-word]
  hint: one of: aws, gcp, azure
spec.yaml:5:22: market.clouds has 'aws' twice [repeated-value]
  hint: remove one
spec.yaml:6:12: market.regions is empty [nothing-given]
  hint: name one or more, or leave the key out
spec.yaml:7:9: market.gpus is 'T4'; expected a list [wrong-type]
  hint: write it in brackets: [T4]
spec.yaml:8:13: market.purchase cannot be 'ondemand' [unknown-word]
  hint: did you mean 'on-demand'?
spec.yaml:9:10: market.quota is a list; expected a group of keys [wrong-type]""",
    ),
    "region of another cloud": (
        BATCH + "market: {clouds: [aws], regions: [aws/us-east-1, gcp/us-central1, us-west-2]}\n",
        """\
spec.yaml:4:50: market.regions has 'gcp/us-central1', but market.clouds leaves gcp out [region-outside-clouds]
  hint: add gcp to clouds or remove the region
spec.yaml:4:67: market.regions.2 is 'us-west-2'; expected a region [wrong-text]
  hint: cloud/region, such as aws/us-east-1, gcp/us-central1 or azure/eastus""",
    ),
    "too many sizes": (
        ONLINE.replace(
            "trace: t.csv",
            f"rate: 1/s, sizes: [{', '.join(['{prompt: 1, output: 1, share: 0.0999001%}'] * 1001)}]",
        ),
        """\
spec.yaml:3:39: workload.online.sizes has 1001 entries [too-many]
  hint: 1000 at most""",
    ),
    "value too long to show": (
        BATCH.replace("model: m", "model: [m]").replace("name: a", f"name: {'a' * 90}"),
        """\
spec.yaml:1:7: name is 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'; expected a name [wrong-text]
  hint: 1 to 42 lower-case letters, digits and inner hyphens: it names files and cloud resources
spec.yaml:2:8: model is a list; expected a name or a group of keys [wrong-type]
  hint: known keys: name, path, dtype""",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong(case: str) -> None:
    text, expected = WRONG[case]
    assert "\n".join(map(str, problems(text))) == expected


def test_refused_yaml_and_wrong_values_are_reported_together() -> None:
    text = BATCH.replace("requests: 1", "requests: 0") + "x: &a 1\nname: b\ncatalog: {}\n"
    assert codes(text) == ["out-of-range", "unknown-key", "anchor", "duplicate-key", "wrong-type"]


# Anything at all ends in a Spec or in problems with a place

TOKENS = (
    *("\t", "&a ", "*a", "!!str ", "!", "<<: ", "- ", "? ", ": ", "{", "}", "[", "]", "'", '"', "\n", "  "),
    *("\n---\n", "...\n", "#", "|", ">", "%YAML 1.1\n", "%YAML 99999999999\n", "%TAG ! x\n", "\\x", ",", "@"),
    *('"\\UFFFFFFFF"', '"\\ud800"', '"\\0"', "!<", "!<%ff>", "\r", "\u2028", "\u0085", "\ufeff", "\0", "%"),
    *("1e999", ".nan", "010", "on", "null", "~", "9" * 5000, "2024-01-01", "batch", "name", "8/s", "é", "="),
)
ADDED = st.sampled_from(TOKENS).map(str.encode) | st.binary(max_size=3)
EDITS = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 12), ADDED), min_size=1, max_size=5)


def edited(text: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """`text` with a few bytes replaced here and there."""
    for place, removed, added in edits:
        start = place % (len(text) + 1)
        text = text[:start] + added + text[start + removed :]
    return text


def outcome(text: str | bytes) -> tuple[Diagnostic, ...]:
    """The problems of `text`, none if it is a Spec."""
    try:
        parse(text)
    except CompileError as error:
        return error.diagnostics or pytest.fail("an error without a problem")
    return ()


def check(text: bytes) -> None:
    """The text ends in a Spec or in problems whose places are in the text."""
    lines = re.split("\r\n|\r|\n", text.decode("utf-8", "replace"))
    for problem in outcome(text):
        str(problem).encode()
        if problem.span.line:
            assert 1 <= problem.span.column <= len(lines[problem.span.line - 1]) + 1, problem


@given(st.sampled_from([FULL, BATCH, ONLINE]), EDITS)
@settings(max_examples=2000, deadline=None)
@example(BATCH, [(0, 2000, b"")])
def test_edited_specs_never_crash(text: str, edits: list[tuple[int, int, bytes]]) -> None:
    check(edited(text.encode(), edits))


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@settings(max_examples=500, deadline=None)
def test_any_bytes_never_crash(text: bytes) -> None:
    check(text)


@given(st.text(st.characters(), max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_text_never_crashes(text: str) -> None:
    """Text may hold what bytes cannot: halves of characters."""
    for problem in outcome(text):
        str(problem).encode()


def test_reading_a_spec_is_light() -> None:
    code = "import sys, moeplan.planner.spec; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"jsonschema", "numpy", "torch", "numba", "networkx", "pulp", "jinja2", "typer"}
