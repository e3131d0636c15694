"""Spec text -> Spec: the table of every key, and the reading of a file by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moeplan.planner import units
from moeplan.planner.diagnostics import CompileError, Span
from moeplan.planner.fields import (
    AtLeastOne,
    Choice,
    ExactlyOne,
    Field,
    Group,
    ListOf,
    Measure,
    Needs,
    NotTogether,
    Reader,
    TableOf,
    Text,
    Whole,
)
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
from moeplan.planner.yaml_nodes import read_yaml, shown

SHARES_TOLERANCE = 1e-6
_MOST_SIZES, _MOST_NAMES = 1000, 1000

_NAME = Text(
    what="a name",
    pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$",
    rule="1 to 42 lower-case letters, digits and inner hyphens: it names files and cloud resources",
)
_CATALOG_NAME = Text(
    what="a name in the catalog",
    pattern=r"^[^\x00-\x20\x7f]([^\x00-\x1f\x7f]{0,126}[^\x00-\x20\x7f])?$",
    rule="1 to 128 characters on one line, without blanks around them",
)
_PATH = Text(
    what="a path",
    pattern=r"^[^\x00]{1,4096}$",
    rule="1 to 4096 characters, absolute or relative to the folder of the spec",
)
_CLOUDS = ("aws", "gcp", "azure")
_REGION = Text(
    what="a region",
    pattern=rf"^({'|'.join(_CLOUDS)})/[A-Za-z0-9][A-Za-z0-9-]{{0,62}}$",
    rule="cloud/region, such as aws/us-east-1, gcp/us-central1 or azure/eastus",
)
_TOKENS = Measure(quantity=units.TOKENS, low="1 token", high="10000000 tokens")
_PROMISE = Measure(quantity=units.FRACTION, low="50%", high="99.999%")

_MODEL = Group(
    short_for="name",
    rules=(ExactlyOne(keys=("name", "path")),),
    fields=(
        Field(
            key="name",
            kind=_CATALOG_NAME,
            doc="A model of the catalog; `moeplan catalog models` lists them.",
            examples=("mixtral-8x7b",),
        ),
        Field(
            key="path",
            kind=_PATH,
            doc="A checkpoint folder or a `config.json`.",
            examples=("./checkpoint",),
        ),
        Field(
            key="dtype",
            kind=Choice(options=("bf16", "fp16", "float32")),
            default="bf16",
            doc="What the arithmetic runs in.",
        ),
    ),
)
_BATCH = Group(
    rules=(ExactlyOne(keys=("requests", "prompts")), Needs(key="requests", others=("prompt", "output"))),
    fields=(
        Field(
            key="requests",
            kind=Whole(low=1, high=10**12),
            doc="How many requests there are, all of one size.",
            examples=("1000",),
        ),
        Field(
            key="prompts",
            kind=_PATH,
            doc="A file of the requests themselves, in OpenAI's batch format (JSONL).",
            examples=("prompts.jsonl",),
        ),
        Field(
            key="prompt",
            kind=_TOKENS,
            doc="Tokens of each prompt. Beside `prompts` it replaces the estimate from the file.",
            examples=("77", "77 tokens"),
        ),
        Field(
            key="output",
            kind=_TOKENS,
            doc="Tokens of each answer. Beside `prompts` it replaces the limits in the file.",
            examples=("128", "128 tokens"),
        ),
        Field(
            key="deadline",
            kind=Measure(quantity=units.DURATION, low="1s", high="365d"),
            doc="How long the whole batch may take; without it, as long as is cheapest.",
            examples=("8h",),
        ),
    ),
)
_SIZE = Group(
    fields=(
        Field(key="prompt", kind=_TOKENS, required=True, doc="Tokens of the prompt.", examples=("512",)),
        Field(key="output", kind=_TOKENS, required=True, doc="Tokens of the answer.", examples=("128",)),
        Field(
            key="share",
            kind=Measure(quantity=units.FRACTION, low="0.0001%", high="100%"),
            doc="The share of requests that have this size. Shares add up to 100%; a single size needs none.",
            examples=("70%", "0.7"),
        ),
    ),
)
_SLO = Group(
    fields=(
        Field(
            key="ttft",
            kind=Measure(quantity=units.DURATION, low="1ms", high="1d"),
            required=True,
            doc="Time to first token: from a request's arrival to its first token.",
            examples=("2s",),
        ),
        Field(
            key="itl",
            kind=Measure(quantity=units.DURATION, low="0.1ms", high="1h"),
            required=True,
            doc="Inter-token latency: the time between one token of an answer and the next.",
            examples=("100ms",),
        ),
        Field(
            key="attainment",
            kind=_PROMISE,
            default="99%",
            doc="The share of requests that keep both.",
            examples=("99%", "0.99"),
        ),
    ),
)
_ONLINE = Group(
    rules=(ExactlyOne(keys=("sizes", "trace")), Needs(key="sizes", others=("rate",))),
    fields=(
        Field(
            key="rate",
            kind=Measure(quantity=units.RATE, low="1/d", high="1000000/s"),
            doc="Mean arrivals. Needed with `sizes`; with `trace`, the trace's own if left out.",
            examples=("8/s", "500/min"),
        ),
        Field(
            key="sizes",
            kind=ListOf(item=_SIZE, most=_MOST_SIZES, several_need="share"),
            doc="The sizes of requests and how frequent each is.",
            examples=("[{prompt: 512, output: 128}]",),
        ),
        Field(
            key="trace",
            kind=_PATH,
            doc="A CSV file of requests with columns `arrival_s, input_tokens, output_tokens` or "
            "`TIMESTAMP, ContextTokens, GeneratedTokens`.",
            examples=("trace.csv",),
        ),
        Field(
            key="slo",
            kind=_SLO,
            required=True,
            doc="The latencies promised.",
            examples=("{ttft: 2s, itl: 100ms}",),
        ),
    ),
)
_WORKLOAD = Group(
    rules=(AtLeastOne(keys=("batch", "online")),),
    fields=(
        Field(
            key="batch",
            kind=_BATCH,
            doc="A fixed number of requests, to be done at the least cost.",
            examples=("{requests: 1000, prompt: 77, output: 128}", "{prompts: prompts.jsonl}"),
        ),
        Field(
            key="online",
            kind=_ONLINE,
            doc="An open stream of requests with a promise on latency.",
            examples=("{rate: 8/s, sizes: [{prompt: 512, output: 128}], slo: {ttft: 2s, itl: 100ms}}",),
        ),
    ),
)
_MACHINE = Group(
    short_for="name",
    rules=(ExactlyOne(keys=("name", "file")),),
    fields=(
        Field(
            key="name",
            kind=_CATALOG_NAME,
            doc="A machine of the catalog; `moeplan catalog machines` lists them.",
            examples=("g4dn.8xlarge",),
        ),
        Field(
            key="file",
            kind=_PATH,
            doc="A machine file as `moeplan calibrate` writes it.",
            examples=("machine.yaml",),
        ),
        Field(
            key="memory",
            kind=Measure(quantity=units.BYTES, low="1 MiB", high="1 PiB"),
            doc="How much of the host's memory may be used; without it, what the machine has.",
            examples=("24 GiB", "25769803776"),
        ),
    ),
)
_MARKET = Group(
    fields=(
        Field(
            key="clouds",
            kind=ListOf(item=Choice(options=_CLOUDS), most=len(_CLOUDS), unique=True),
            doc="Clouds to take machines from; all if left out.",
            examples=("[aws, gcp]",),
        ),
        Field(
            key="regions",
            kind=ListOf(item=_REGION, most=_MOST_NAMES, unique=True),
            doc="Regions to take machines from, each of one of the `clouds`; all if left out.",
            examples=("[aws/us-east-1, gcp/us-central1]",),
        ),
        Field(
            key="gpus",
            kind=ListOf(item=_CATALOG_NAME, most=_MOST_NAMES, unique=True),
            doc="GPU types to consider; `moeplan catalog gpus` lists them; all if left out.",
            examples=("[T4, L4, A100-80GB]",),
        ),
        Field(
            key="purchase",
            kind=Choice(options=("any", "spot", "on-demand")),
            default="any",
            doc="How machines may be bought.",
        ),
        Field(
            key="budget",
            kind=Measure(quantity=units.MONEY, low="$0.01/h", high="$1000000/h"),
            doc="The most that all machines together may cost.",
            examples=("$20/h", "20 USD/h"),
        ),
        Field(
            key="quota",
            kind=TableOf(key=_CATALOG_NAME, value=Whole(low=0, high=10**6), most=_MOST_NAMES),
            doc="GPUs of each type at most; types that are not named have no limit.",
            examples=("{T4: 8, L4: 4}",),
        ),
        Field(
            key="availability",
            kind=_PROMISE,
            default="99%",
            doc="The share of time that the whole service is to be up.",
            examples=("99%", "0.99"),
        ),
    ),
)
SPEC = Group(
    rules=(NotTogether(keys=("machine", "market")),),
    fields=(
        Field(
            key="name",
            kind=_NAME,
            required=True,
            doc="What the plan is called.",
            examples=("mixtral-t4",),
        ),
        Field(
            key="model",
            kind=_MODEL,
            required=True,
            doc="The model. A name alone is short for `{name: ...}`.",
            examples=("mixtral-8x7b", "{path: ./checkpoint, dtype: float32}"),
        ),
        Field(
            key="workload",
            kind=_WORKLOAD,
            required=True,
            doc="The work to plan for: a batch, an online service or both.",
            examples=("{batch: {requests: 1000, prompt: 77, output: 128}}",),
        ),
        Field(
            key="machine",
            kind=_MACHINE,
            doc="Plan for this machine. A name alone is short for `{name: ...}`.",
            examples=("g4dn.8xlarge", "{file: machine.yaml, memory: 24 GiB}"),
        ),
        Field(
            key="market",
            kind=_MARKET,
            doc="Choose among the machines of the catalog within these limits; no limits if left out.",
            examples=("{gpus: [T4, L4], budget: $20/h}",),
        ),
        Field(
            key="catalog",
            kind=_PATH,
            doc="A folder of your own catalog files, which add to the built-in ones and replace them.",
            examples=("./catalog",),
        ),
    ),
)

Values = Mapping[str, Any]


def parse_spec(text: str | bytes, path: str) -> Spec:
    """Read a spec file; raises CompileError with every problem of the file."""
    document, reader = read_yaml(text, path), Reader()
    if document.root is None:
        raise CompileError(*document.problems)
    reader.spans[""] = document.root.span
    values = reader.read(SPEC, document.root, "")
    _check_shares(reader, values)
    _check_regions(reader, values)
    if document.problems or reader.problems:
        raise CompileError(*document.problems, *reader.problems)
    return _spec(values, path, reader.spans)


def _check_shares(reader: Reader, values: Values) -> None:
    """Note shares that do not add up to one."""
    sizes = _at(values, "workload", "online", "sizes") or ()
    shares = [size.get("share", 1.0 if len(sizes) == 1 else None) for size in sizes if size is not None]
    if not shares or None in shares:
        return
    total = math.fsum(shares)
    if round(abs(total - 1), 9) > SHARES_TOLERANCE:
        message = f"the shares of workload.online.sizes add up to {units.format_fraction(total)}"
        reader.note("shares-sum", reader.spans["workload.online.sizes"], message, "make them add up to 100%")


def _check_regions(reader: Reader, values: Values) -> None:
    """Note regions of clouds that are left out."""
    clouds, regions = _at(values, "market", "clouds") or (), _at(values, "market", "regions") or ()
    for number, region in enumerate(regions):
        cloud = region.partition("/")[0] if region else None
        if clouds and None not in clouds and cloud and cloud not in clouds:
            place = reader.spans[f"market.regions.{number}"]
            message = f"market.regions has {shown(region)}, but market.clouds leaves {cloud} out"
            hint = f"add {cloud} to clouds or remove the region"
            reader.note("region-outside-clouds", place, message, hint)


def _at(values: Values | None, *keys: str) -> Any:
    """The value at nested keys, None where one is missing or wrong."""
    for key in keys:
        values = values.get(key) if values else None
    return values


def _spec(values: Values, path: str, spans: Mapping[str, Span]) -> Spec:
    return Spec(
        path=path,
        name=values["name"],
        model=_model(values["model"]),
        workload=_workload(values["workload"]),
        machine=_machine(values["machine"]) if "machine" in values else None,
        market=_market(values.get("market", {})),
        catalog=values.get("catalog", ""),
        spans=spans,
    )


def _model(values: Values) -> ModelRef:
    return ModelRef(name=values.get("name", ""), path=values.get("path", ""), dtype=values["dtype"])


def _workload(values: Values) -> WorkloadSpec:
    return WorkloadSpec(
        batch=_batch(values["batch"]) if "batch" in values else None,
        online=_online(values["online"]) if "online" in values else None,
    )


def _batch(values: Values) -> BatchSpec:
    return BatchSpec(
        requests=values.get("requests", 0),
        prompt_tokens=values.get("prompt", 0),
        output_tokens=values.get("output", 0),
        prompts_file=values.get("prompts", ""),
        deadline_s=values.get("deadline"),
    )


def _online(values: Values) -> OnlineSpec:
    slo = values["slo"]
    return OnlineSpec(
        rate_per_s=values.get("rate"),
        sizes=_sizes(values.get("sizes", ())),
        trace_file=values.get("trace", ""),
        slo=Slo(ttft_s=slo["ttft"], itl_s=slo["itl"], attainment=slo["attainment"]),
    )


def _sizes(sizes: tuple[Values, ...]) -> tuple[SizeSpec, ...]:
    """The sizes with shares that add up to one exactly, not just within the tolerance."""
    total = math.fsum(size.get("share", 1.0) for size in sizes)
    return tuple(
        SizeSpec(
            prompt_tokens=size["prompt"], output_tokens=size["output"], share=size.get("share", 1.0) / total
        )
        for size in sizes
    )


def _machine(values: Values) -> MachineRef:
    return MachineRef(
        name=values.get("name", ""), file=values.get("file", ""), memory_bytes=values.get("memory")
    )


def _market(values: Values) -> MarketSpec:
    limits = MarketSpec()
    return MarketSpec(
        clouds=values.get("clouds", limits.clouds),
        regions=values.get("regions", limits.regions),
        gpus=values.get("gpus", limits.gpus),
        purchase=values.get("purchase", limits.purchase),
        budget_usd_per_hour=values.get("budget"),
        quota=values.get("quota", {}),
        availability=values.get("availability", limits.availability),
    )
