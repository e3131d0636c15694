"""A model's architecture as the planner needs it: shape, parameter counts, bytes per parameter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

AttentionKind = Literal["gqa", "mla"]


Packed = Literal["bf12", "int8", "int4"]
Packing = Literal["none", "bf12", "int8", "int4", "fp8", "mxfp4"]
# Bytes of a packed value, scales included: as runtime_min.plan_file.STORED_BYTES has it.
PACKED_BYTES: dict[Packing, float] = {"bf12": (97 / 64) * (1 + 1 / 256), "int8": 66 / 64, "int4": 40 / 64}
PACKINGS: tuple[Packed, ...] = ("bf12", "int8", "int4")  # the most exact first
SCALED: tuple[Packing, ...] = ("fp8", "mxfp4")  # their scales lie apart
_BLOCK_VALUES, _MOST_VALUES = 64, 1 << 16  # of a packed row: as runtime_min.formats has them
EXPERTS_TOGETHER = ("dbrx", "gpt_oss", "llama4", "llama4_text")  # in one tensor, which is not packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of one layer. MHA is GQA with as many KV heads as heads.

    `head_dim` is the width of one query/key head and need not be hidden/heads. For MLA the cache holds
    `kv_lora_dim + rope_dim` values a token instead of keys and values (DeepSeek-V2, section 2.1);
    `head_dim` is then nope + rope and `value_dim` the width of one value head.
    `window_tokens` bounds the context that `windowed_layers` of the layers look at; 0 means no window.
    """

    kind: AttentionKind
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    kv_lora_dim: int = 0
    rope_dim: int = 0
    window_tokens: int = 0
    windowed_layers: int = 0

    def kv_values_per_token(self) -> int:
        """Numbers cached per token and layer."""
        if self.kind == "mla":
            return self.kv_lora_dim + self.rope_dim
        return self.kv_heads * (self.head_dim + self.value_dim)

    def attended_values(self) -> int:
        """Numbers of a token's queries in decode, and of what they attend to: in MLA they meet latents."""
        return self.heads * (self.kv_lora_dim + self.rope_dim if self.kind == "mla" else self.head_dim)

    def score_flops_per_pair(self) -> int:
        """FLOPs of QK^T and PV for one query token against one cached token, all heads.

        Absorbed MLA attends in the latent space: kv_lora + rope wide keys, kv_lora wide values.
        """
        if self.kind == "mla":
            return 2 * self.heads * (2 * self.kv_lora_dim + self.rope_dim)
        return 2 * self.heads * (self.head_dim + self.value_dim)

    def prefill_flops_per_pair(self) -> int:
        """The same in prefill, where MLA expands its latents to heads instead of absorbing."""
        return 2 * self.heads * (self.head_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Parameter counts of the whole model, by what they do. Biases are with their matrices."""

    embedding: int
    lm_head: int  # 0 where tied to the embedding
    attention: int
    router: int
    routed_experts: int
    shared_experts: int
    dense_mlp: int
    norms: int

    def total(self) -> int:
        """Every parameter once."""
        return (
            self.embedding
            + self.lm_head
            + self.attention
            + self.router
            + self.routed_experts
            + self.shared_experts
            + self.dense_mlp
            + self.norms
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Matrices in fewer bits whose scales lie apart (fp8, MXFP4): how many values, and how many bytes they
    take in memory with their scales, in fp8 float32. Of a layer's attention, of an expert, and of all shared
    experts and dense MLPs."""

    attention_values: int = 0
    attention_bytes: int = 0
    expert_values: int = 0
    expert_bytes: int = 0
    mlp_values: int = 0
    mlp_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One decoder-only transformer.

    Layers are `dense_layers` with an MLP of `dense_intermediate` and `moe_layers` with `experts` experts of
    `expert_intermediate`, of which each token uses `experts_per_token`, beside shared experts whose widths
    sum to `shared_intermediate`. A dense model has moe_layers = experts = 0.
    `stored_bytes_per_*` are bytes per parameter in the checkpoint (2.0 bf16, 0.53 MXFP4 with its scales).
    Beside parameters there are `router_corrections` numbers, one per expert where the choice is corrected.
    `packing` says in how many bits fewer runtime_min reads and holds matrices: its own formats, those of
    experts; fp8 and MXFP4 as published, with the exact sizes in `scaled`.
    `not_executed` says what of the model the bundled runtime does not compute; empty where it runs it all,
    for contexts up to `executed_context_tokens`.
    """

    name: str
    model_type: str
    source: str
    hidden: int
    vocab: int
    attention: Attention
    dense_layers: int
    dense_intermediate: int
    moe_layers: int
    experts: int
    experts_per_token: int
    expert_intermediate: int
    shared_intermediate: int
    parameters: Parameters
    stored_bytes_per_expert_parameter: float
    stored_bytes_per_other_parameter: float
    max_context_tokens: int
    executed_context_tokens: int
    router_corrections: int = 0
    not_executed: tuple[str, ...] = ()
    packing: Packing = "none"
    scaled: Scaled = Scaled()

    @property
    def layers(self) -> int:
        return self.dense_layers + self.moe_layers

    def active_parameters(self) -> int:
        """Parameters one token uses, input embedding included."""
        p = self.parameters
        if not self.experts:
            return p.total()
        return p.total() - p.routed_experts + p.routed_experts * self.experts_per_token // self.experts

    def expert_parameters(self) -> int:
        """Parameters of one routed expert of one layer (0 for a dense model)."""
        if not self.experts:
            return 0
        return self.parameters.routed_experts // (self.moe_layers * self.experts)

    def weight_bytes(self) -> int:
        """Bytes of all weights as stored in the checkpoint."""
        p = self.parameters
        routed = p.routed_experts * self.stored_bytes_per_expert_parameter
        return round(routed + (p.total() - p.routed_experts) * self.stored_bytes_per_other_parameter)

    def packable(self) -> bool:
        """Whether `runtime_min quantize` takes it: values of at least 16 bits, each expert's matrices apart,
        in rows of whole blocks."""
        rows = (self.hidden, self.expert_intermediate if self.experts else self.dense_intermediate)
        stored = min(self.stored_bytes_per_expert_parameter, self.stored_bytes_per_other_parameter)
        return (
            self.packing == "none"
            and stored >= 2.0
            and self.model_type not in EXPERTS_TOGETHER
            and all(row % _BLOCK_VALUES == 0 and row <= _MOST_VALUES for row in rows)
        )

    def packed(self, packing: Packing) -> Model:
        """The model as `runtime_min quantize` writes it: routed experts, or MLPs of a dense model, packed."""
        return replace(self, packing=packing, stored_bytes_per_expert_parameter=PACKED_BYTES[packing])

    def attention_page_bytes(self, value_bytes: float) -> float:
        """A layer's projections, biases and sinks, plain ones in `value_bytes` each."""
        plain = self.parameters.attention // self.layers - self.scaled.attention_values
        return plain * value_bytes + self.scaled.attention_bytes

    def expert_page_bytes(self, experts: int, value_bytes: float) -> float:
        """So many experts of a layer, plain values in `value_bytes` each."""
        parameters = experts * self.expert_parameters()
        if not self.scaled.expert_values:
            return parameters * PACKED_BYTES.get(self.packing, value_bytes)
        plain = parameters - experts * self.scaled.expert_values
        return plain * value_bytes + experts * self.scaled.expert_bytes

    def as_one_expert(self) -> Model:
        """The model as runtime_min runs it: the MLP of a dense one is an expert that every token takes."""
        if self.moe_layers:
            return self
        p = self.parameters
        return replace(
            self,
            dense_layers=0,
            dense_intermediate=0,
            moe_layers=self.dense_layers,
            experts=1,
            experts_per_token=1,
            expert_intermediate=self.dense_intermediate,
            parameters=replace(p, routed_experts=p.dense_mlp, dense_mlp=0),
            scaled=replace(
                self.scaled,
                expert_values=self.scaled.mlp_values // self.layers,
                expert_bytes=self.scaled.mlp_bytes // self.layers,
                mlp_values=0,
                mlp_bytes=0,
            ),
            stored_bytes_per_expert_parameter=PACKED_BYTES.get(
                self.packing, self.stored_bytes_per_other_parameter
            ),
        )
