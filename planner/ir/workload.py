"""The Workload level: request classes in size buckets, and every operator of the model as a cost law."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moeplan.planner.ir.model import Model
from moeplan.planner.ir.spec import Dtype, KvCache, Quantize, Slo

ClassName = Literal["batch", "online"]
OperatorName = Literal[
    "attention_projections",
    "attention_core",
    "windowed_attention_core",
    "router",
    "routed_experts",
    "shared_experts",
    "dense_mlp",
    "lm_head",
]

BYTES_PER_VALUE: dict[Dtype, int] = {"bf16": 2, "fp16": 2, "float32": 4}


KvDtype = Literal["same", "int8"]  # int8: a float32 scale for each token and head


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Requests of about one size. `share` is the part of its class's requests; token counts are means."""

    prompt_tokens: float
    output_tokens: float
    share: float

    @property
    def context_tokens(self) -> float:
        """Tokens in a request's cache, on average over decoding."""
        return self.prompt_tokens + self.output_tokens / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestClass:
    """Requests with one kind of promise.

    A batch class has a number of requests and perhaps a deadline; an online class has a rate, the
    coefficient of variation of its arrival gaps, and an SLO. `prompt_tokens_max` and `output_tokens_max`
    bound every request, `prompt_tokens_min` is an estimate. `basis` says where the sizes come from.
    """

    name: ClassName
    buckets: tuple[Bucket, ...]
    prompt_tokens_min: int
    prompt_tokens_max: int
    output_tokens_max: int
    requests: int
    deadline_s: float | None
    rate_per_s: float
    arrival_cv: float
    slo: Slo | None
    basis: str

    @property
    def context_tokens_max(self) -> int:
        return self.prompt_tokens_max + self.output_tokens_max

    def mean_prompt_tokens(self) -> float:
        return sum(b.share * b.prompt_tokens for b in self.buckets)

    def mean_output_tokens(self) -> float:
        return sum(b.share * b.output_tokens for b in self.buckets)

    def mean_bucket(self) -> Bucket:
        """All requests as if they were of the mean size."""
        return Bucket(
            prompt_tokens=self.mean_prompt_tokens(), output_tokens=self.mean_output_tokens(), share=1.0
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """The cost law of one operator, summed over the `layers` in which it occurs.

    For T tokens whose mean context is C (tokens): FLOPs = T·(flops_per_token + C·flops_per_context_token),
    cache values read = T·C·kv_values_per_context_token, weight values read = parameters, or for routed
    experts the share that T tokens hit. `activation_values_per_token` are read and written.
    """

    name: OperatorName
    layers: int
    parameters: int
    flops_per_token: float
    flops_per_context_token: float
    prefill_flops_per_context_token: float
    kv_values_per_context_token: float
    context_limit_tokens: int
    activation_values_per_token: float
    stored_bytes_per_parameter: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPopularity:
    """The share of one layer's tokens that goes to each of its experts; the shares sum to k."""

    layer: int
    token_share: tuple[float, ...]

    @property
    def ranked(self) -> tuple[int, ...]:
        """The experts, most popular first, ties by number."""
        return tuple(sorted(range(len(self.token_share)), key=lambda e: (-self.token_share[e], e)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What must be computed: the model's operators and the request classes.

    `quantize` says whether an engine may store 16-bit weights in fewer bits, `kv_cache` whether it may keep
    the cache so, `kv_dtype` what it does keep it in. `popularity` is empty where all experts count as equally
    popular.
    """

    model: Model
    dtype: Dtype
    quantize: Quantize
    kv_cache: KvCache
    operators: tuple[Operator, ...]
    classes: tuple[RequestClass, ...]
    popularity: tuple[ExpertPopularity, ...] = ()
    kv_dtype: KvDtype = "same"

    def as_one_expert(self) -> Workload:
        """The workload as the bundled runtime computes it: the MLP of a dense model is an expert that every
        token takes."""
        if self.model.moe_layers:
            return self
        operators = (
            replace(op, name="routed_experts") if op.name == "dense_mlp" else op for op in self.operators
        )
        return replace(self, model=self.model.as_one_expert(), operators=tuple(operators))

    def operator(self, name: OperatorName) -> Operator:
        """The operator called `name`; raises KeyError where the model has none."""
        for operator in self.operators:
            if operator.name == name:
                return operator
        raise KeyError(name)

    def request_class(self, name: ClassName) -> RequestClass:
        """The class called `name`; raises KeyError where the workload has none."""
        for requests in self.classes:
            if requests.name == name:
                return requests
        raise KeyError(name)

    @property
    def kv_value_bytes(self) -> float:
        """Bytes of a cached value; in int8 with its part of a float32 scale for each head's values."""
        return 1.0 + 4.0 / self.model.attention.head_dim if self.kv_dtype == "int8" else self.value_bytes

    @property
    def value_bytes(self) -> int:
        """Bytes of one activation, cached or computed-with value."""
        return BYTES_PER_VALUE[self.dtype]
