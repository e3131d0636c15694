"""The Spec level: what the user wrote, typed, in base units, with a span on every value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from moeplan.planner.diagnostics import Span

Dtype = Literal["bf16", "fp16", "float32"]
Quantize = Literal["never", "fp8", "bf12", "int8", "int4", "allow"]
KvCache = Literal["same", "int8", "allow"]
Cloud = Literal["aws", "gcp", "azure"]
Domain = Literal["zone", "region", "cloud"]
Purchase = Literal["any", "spot", "on-demand"]
Offload = Literal["last-resort", "allow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef:
    """Which model: exactly one of a catalog name and a path (config.json or a checkpoint folder)."""

    name: str = ""
    path: str = ""
    dtype: Dtype = "bf16"
    quantize: Quantize = "never"
    kv_cache: KvCache = "same"
    popularity: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    """A fixed number of requests; either counted (`requests`, sizes) or listed in a prompts file."""

    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prompts_file: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeSpec:
    """One request size and its share of the traffic."""

    prompt_tokens: int
    output_tokens: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency promises: time to first token, inter-token latency, share of requests that keep both."""

    ttft_s: float
    itl_s: float
    attainment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineSpec:
    """An open stream of requests. Sizes come from `sizes` or from a trace, never both.

    `rate_per_s` of None takes the trace's own mean rate.
    """

    rate_per_s: float | None
    sizes: tuple[SizeSpec, ...] = ()
    trace_file: str = ""
    slo: Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """At least one of the two kinds of work."""

    batch: BatchSpec | None = None
    online: OnlineSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRef:
    """One pinned machine: a catalog name or a machine file, and an optional memory limit."""

    name: str = ""
    file: str = ""
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpreadSpec:
    """The share `floor` of replicas outlives the loss of any one zone, region or cloud."""

    over: Domain
    floor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketSpec:
    """Where machines may be taken from. Empty tuples mean no restriction.

    Of every size of online requests, the share `on_demand_floor` goes to machines that are not spot, and the
    share `survive` can still be served after the loss of any one region.
    """

    clouds: tuple[Cloud, ...] = ()
    regions: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    purchase: Purchase = "any"
    budget_usd_per_hour: float | None = None
    quota: Mapping[str, int] = field(default_factory=dict)
    on_demand_floor: float = 0.0
    survive: float = 0.0
    offload: Offload = "last-resort"
    availability: float = 0.99
    spot_trace: str = ""
    interruptions: str = ""
    spread: SpreadSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One parsed spec file. `spans` maps dotted keys (`workload.online.rate`) to places in the text."""

    path: str
    name: str
    model: ModelRef
    workload: WorkloadSpec
    machine: MachineRef | None
    market: MarketSpec
    catalog: str = ""
    image: str = ""
    profile_file: str = ""
    spans: Mapping[str, Span] = field(default_factory=dict, compare=False)

    def span(self, key: str) -> Span:
        """The place of `key`, or of its nearest enclosing key that the text has."""
        while key and key not in self.spans:
            key = key.rpartition(".")[0]
        return self.spans.get(key, Span(self.path))
