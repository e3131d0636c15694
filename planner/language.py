"""The spec language as one table: every key, its kind, its range, what it means.

The parser (spec.py), the JSON Schema and the reference (schema.py) all read this table, and so cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moeplan.planner import units


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """A single value.

    `number` says whether a bare number is accepted. Text matches `pattern`; where `units` are given it is a
    number and a unit, converted to base units. `low` and `high` bound the base value, both included.
    `what` and `examples` go into messages.
    """

    what: str
    examples: tuple[str, ...]
    number: str = ""  # "integer", "number", or none
    pattern: str = ""
    units: units.Units | None = None
    low: float = 0.0
    high: float = float("inf")
    limits: str = ""
    choices: tuple[str, ...] = ()
    integral: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One key of a mapping."""

    kind: Kind
    doc: str
    required: bool = False
    default: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One of several ways to fill a mapping: the key that marks it and the keys it needs."""

    key: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A mapping with known keys. Exactly one of `options` is present; at least one of `any_of`; not both of
    an `exclusive` pair. A lone scalar stands for {`short`: scalar}."""

    fields: Mapping[str, Field]
    options: tuple[Option, ...] = ()
    any_of: tuple[str, ...] = ()
    exclusive: tuple[str, str] | None = None
    short: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A list of at least one item. `once` refuses a repeated one; the items' `sums_to_one` are parts of one
    whole, and a single item may leave it out."""

    item: Kind
    once: bool = False
    sums_to_one: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A mapping with keys of the user's own."""

    key: Scalar
    value: Scalar


Kind = Scalar | Block | Listing | Table

NAME = Scalar(
    what="a name of lower-case letters, digits and hyphens",
    examples=("mixtral-t4",),
    pattern="^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$",
)
WORD = Scalar(what="a name", examples=("mixtral-8x7b",), pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+/ -]{0,99}$")
REGION = Scalar(
    what="cloud/region", examples=("aws/us-east-1",), pattern=r"^(aws|gcp|azure)/[a-z0-9][a-z0-9-]{0,60}$"
)
PATH = Scalar(
    what="a path, relative to the spec file",
    examples=("./checkpoint",),
    pattern=r"^[^\x00-\x1f\x7f]{1,1000}$",
)
MACHINE_NAME = replace(WORD, examples=("g4dn.16xlarge",))
GPU_NAME = replace(WORD, examples=("T4", "A100-80GB"))
PROMPTS_PATH = replace(PATH, examples=("requests.jsonl",))
TRACE_PATH = replace(PATH, examples=("trace.csv",))
POPULARITY_PATH = replace(PATH, examples=("popularity.csv",))
PROFILE_PATH = replace(PATH, examples=("profile.csv",))
SPOT_TRACE_PATH = replace(PATH, examples=("spot.csv.gz", "./pings"))
INTERRUPTIONS_PATH = replace(PATH, examples=("interruptions.csv",))
MACHINE_PATH = replace(PATH, examples=("machine.yaml",))
FOLDER = replace(PATH, examples=("./catalog",))
IMAGE = Scalar(
    what="a container image with a tag or a digest",
    examples=("vllm/vllm-openai:v0.33.0",),
    pattern=r"^[a-z0-9]([a-z0-9._/-]|:[0-9]+/){0,200}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}|@sha256:[0-9a-f]{64})$",
)
COUNT = Scalar(
    what="a whole number",
    examples=("1000",),
    number="integer",
    low=1,
    high=10**12,
    limits="1 to 1,000,000,000,000",
    integral=True,
)
GPUS = Scalar(
    what="a number of GPUs",
    examples=("8",),
    number="integer",
    low=0,
    high=10**6,
    limits="0 to 1,000,000",
    integral=True,
)
TOKENS = Scalar(
    what="a number of tokens",
    examples=("512", "512 tokens"),
    number="integer",
    pattern="^[0-9]{1,8} ?tokens?$",
    units=units.TOKENS,
    low=1,
    high=10**7,
    limits="1 to 10,000,000",
    integral=True,
)
DURATION = Scalar(
    what="a duration",
    examples=("120ms", "2s", "8h"),
    pattern=units.pattern(units.SECONDS),
    units=units.SECONDS,
    low=1e-5,
    high=365 * 86400.0,
    limits="10 µs to 365 d",
)
RATE = Scalar(
    what="a rate",
    examples=("8/s", "500/min", "3600/h"),
    pattern=units.pattern(units.PER_SECOND),
    units=units.PER_SECOND,
    low=1e-9,
    high=1e6,
    limits="above 0, at most 1,000,000/s",
)
MONEY = Scalar(
    what="a price per hour",
    examples=("$20/h", "20 USD/h"),
    pattern=units.pattern(units.USD_PER_HOUR),
    units=units.USD_PER_HOUR,
    low=0.01,
    high=1e9,
    limits="$0.01/h to $1,000,000,000/h",
)
MEMORY = Scalar(
    what="an amount of memory",
    examples=("24 GiB", "500 MB"),
    number="integer",
    pattern=units.pattern(units.BYTES),
    units=units.BYTES,
    low=2**20,
    high=2**50,
    limits="1 MiB to 1 PiB",
    integral=True,
)
SHARE = Scalar(
    what="a share",
    examples=("70%", "0.7"),
    number="number",
    pattern=units.pattern(units.SHARE),
    units=units.SHARE,
    low=1e-6,
    high=1.0,
    limits="above 0, at most 100%",
)
PROMISE = Scalar(
    what="a share",
    examples=("99%", "0.99"),
    number="number",
    pattern=units.pattern(units.SHARE),
    units=units.SHARE,
    low=0.5,
    high=0.99999,
    limits="50% to 99.999%",
)


def choice(*values: str) -> Scalar:
    return Scalar(what=f"one of {', '.join(values)}", examples=values, choices=values)


MODEL = Block(
    short="name",
    options=(Option(key="name"), Option(key="path")),
    fields={
        "name": Field(kind=WORD, doc="a model of the catalog (`moeplan catalog models`)"),
        "path": Field(kind=PATH, doc="a Hugging Face checkpoint folder, or its config.json"),
        "dtype": Field(
            kind=choice("bf16", "fp16", "float32"), default="bf16", doc="what the arithmetic runs in"
        ),
        "popularity": Field(
            kind=POPULARITY_PATH,
            doc="a CSV of layer,expert,tokens: offloading keeps the most popular experts on the GPU",
        ),
        "quantize": Field(
            kind=choice("never", "fp8", "bf12", "int8", "int4", "allow"),
            default="never",
            doc="what 16-bit weights may be held in where that serves more. fp8: vLLM rounds them as it "
            "loads; int8, int4 and bf12 (lossless): the experts, packed before by `runtime_min quantize`, on "
            "machines without a GPU; allow: any of these",
        ),
        "kv_cache": Field(
            kind=choice("same", "int8", "allow"),
            default="same",
            doc="what the bundled runtime keeps keys and values in on machines without a GPU. same: the "
            "dtype of the arithmetic; int8: with a scale for each token and head; allow: where faster",
        ),
    },
)
BATCH = Block(
    options=(Option(key="requests", needs=("prompt", "output")), Option(key="prompts")),
    fields={
        "requests": Field(kind=COUNT, doc="how many requests there are"),
        "prompt": Field(
            kind=TOKENS,
            doc="tokens of a prompt, at most. With `prompts`: the mean, instead of an estimate",
        ),
        "output": Field(
            kind=TOKENS, doc="tokens to generate, at most. With `prompts`: the mean, instead of the file's"
        ),
        "prompts": Field(kind=PROMPTS_PATH, doc="the requests themselves, in OpenAI's batch format (JSONL)"),
        "deadline": Field(kind=DURATION, doc="when all must be done; none: as cheap as possible"),
    },
)
SLO = Block(
    fields={
        "ttft": Field(kind=DURATION, required=True, doc="time to first token"),
        "itl": Field(kind=DURATION, required=True, doc="inter-token latency"),
        "attainment": Field(
            kind=PROMISE,
            default="99%",
            doc="share of requests that must keep both, in a queueing simulation",
        ),
    }
)
SIZE = Block(
    fields={
        "prompt": Field(kind=TOKENS, required=True, doc="tokens of a prompt"),
        "output": Field(kind=TOKENS, required=True, doc="tokens generated"),
        "share": Field(kind=SHARE, default="100%", doc="share of the requests; all shares sum to 100%"),
    }
)
ONLINE = Block(
    options=(Option(key="sizes", needs=("rate",)), Option(key="trace")),
    fields={
        "rate": Field(kind=RATE, doc="requests over time; with `trace`, replaces the trace's own rate"),
        "sizes": Field(kind=Listing(item=SIZE, sums_to_one="share"), doc="request sizes and their shares"),
        "trace": Field(
            kind=TRACE_PATH,
            doc="requests as CSV or JSON lines, also gzipped, named arrival_s,input_tokens,output_tokens, "
            "TIMESTAMP,ContextTokens,GeneratedTokens (Azure), or timestamp,input_length,output_length "
            "(Mooncake, in ms)",
        ),
        "slo": Field(kind=SLO, required=True, doc="the latency that is promised"),
    },
)
MACHINE = Block(
    short="name",
    options=(Option(key="name"), Option(key="file")),
    fields={
        "name": Field(kind=MACHINE_NAME, doc="a machine of the catalog (`moeplan catalog machines`)"),
        "file": Field(kind=MACHINE_PATH, doc="a machine file, as `moeplan calibrate` writes it"),
        "memory": Field(kind=MEMORY, doc="how much host memory a plan may use; default 80 % of it"),
    },
)
SPREAD = Block(
    short="over",
    fields={
        "over": Field(kind=choice("zone", "region", "cloud"), required=True, doc="what may fail as a whole"),
        "floor": Field(
            kind=SHARE, default="50%", doc="share of the replicas that must be left after the loss of any one"
        ),
    },
)
MARKET = Block(
    fields={
        "clouds": Field(
            kind=Listing(item=choice("aws", "gcp", "azure"), once=True),
            doc="clouds to rent from; default all",
        ),
        "regions": Field(kind=Listing(item=REGION, once=True), doc="regions to rent in; default all"),
        "gpus": Field(kind=Listing(item=GPU_NAME, once=True), doc="GPU types to consider; default all"),
        "machines": Field(
            kind=Listing(item=MACHINE_NAME, once=True), doc="machine types to consider; default all"
        ),
        "purchase": Field(
            kind=choice("any", "spot", "on-demand"), default="any", doc="spot machines, on-demand, or either"
        ),
        "budget": Field(kind=MONEY, doc="what everything together may cost per hour"),
        "quota": Field(kind=Table(key=GPU_NAME, value=GPUS), doc="most GPUs of a type that may be rented"),
        "on_demand_floor": Field(
            kind=SHARE,
            doc="share of every size of online requests planned onto on-demand machines; default none",
        ),
        "survive": Field(
            kind=SHARE,
            doc="share of every size of online requests that can still be served when any one region "
            "is lost; default none",
        ),
        "offload": Field(
            kind=choice("last-resort", "allow"),
            default="last-resort",
            doc="allow: batch work may be planned onto GPUs that do not hold the model, which no engine "
            "has run yet, wherever that is predicted to be cheaper; last-resort: only where nothing else can",
        ),
        "availability": Field(
            kind=PROMISE,
            default="99%",
            doc="wanted share of time with enough replicas; promised only with evidence",
        ),
        "spot_trace": Field(
            kind=SPOT_TRACE_PATH,
            doc="what zones could launch over time (CSV, NPZ, or a folder of ping traces): spot replicas are "
            "placed by replaying it",
        ),
        "interruptions": Field(
            kind=INTERRUPTIONS_PATH,
            doc="a CSV of cloud,region,instance,interruption (`<5%`, `5-10%`, `>20%` in a month), where "
            "there is no trace",
        ),
        "spread": Field(
            kind=SPREAD,
            doc="online spot replicas survive the loss of a zone, region or cloud; short: `region`",
        ),
    }
)
SPEC = Block(
    exclusive=("machine", "market"),
    fields={
        "name": Field(kind=NAME, required=True, doc="names the plan folder and cloud resources"),
        "model": Field(kind=MODEL, required=True, doc="the model; a string is short for {name: ...}"),
        "workload": Field(
            kind=Block(
                any_of=("batch", "online"),
                fields={
                    "batch": Field(kind=BATCH, doc="a fixed number of requests"),
                    "online": Field(kind=ONLINE, doc="an open stream of requests"),
                },
            ),
            required=True,
            doc="what must be computed",
        ),
        "machine": Field(
            kind=MACHINE, doc="pins one machine, taken as yours; a string is short for {name: ...}"
        ),
        "market": Field(kind=MARKET, doc="where machines may be rented"),
        "catalog": Field(kind=FOLDER, doc="a folder with own or replacing catalog entries"),
        "image": Field(
            kind=IMAGE,
            doc="the container image that vLLM runs from; default: installed with pip under SkyPilot, "
            "vllm/vllm-openai of the pinned version elsewhere",
        ),
        "profile": Field(
            kind=PROFILE_PATH,
            doc="a CSV of your own measurements, which correct the predictions: columns machine, model, "
            "engine, gpus, prompt_tokens, output_tokens, batch and any of prefill_tokens_per_s, "
            "decode_tokens_per_s, requests_per_s, ttft_s, itl_s, each of one copy of the model",
        ),
    },
)
