"""Plan folders and small random checkpoints, made without the planner."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moeplan.codegen.emit.schedule_py import schedule_text
from moeplan.planner.ir.schedule import OffloadConstants, Schedule, StreamConstants
from moeplan.runtime_min.limits import check_numbers
from moeplan.runtime_min.plan_file import (
    FORMAT,
    NO_OFFLOAD,
    NOT_SCALED,
    SCHEDULE_FORMAT,
    BatchPlan,
    MemoryPlan,
    ModelPlan,
    PagePlan,
    Predicted,
    Range,
    RuntimePlan,
    SchedulePlan,
    kv_bytes,
    most_places,
    slot_bytes,
    to_json,
    weights_bytes,
    workspace_bytes,
)
from moeplan.runtime_min.sampling import Sampling

ANY_SPEED = Range(value=100.0, low=10.0, high=1000.0)
VOCAB = 300
GREEDY = Sampling(temperature=0.0, top_p=1.0, seed=0)


@dataclass(frozen=True)
class Shape:
    """A small model, its odd sizes chosen to break assumptions; `config` are more keys of config.json."""

    kind: str = "mixtral"
    config: tuple[tuple[str, Any], ...] = ()
    layers: int = 2
    hidden: int = 24
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 10
    experts: int = 4
    top: int = 2
    inner: int = 36
    vocab: int = VOCAB
    tied: bool = False
    stored: torch.dtype = torch.float32
    shard: str = "5GB"


CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}


def save_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> PreTrainedModel:
    """Write a random checkpoint with a byte tokenizer; return the model in float32."""
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[shape.kind]
    config = config_class(**_config(shape))
    model = model_class(config).eval()
    for name, weight in model.named_parameters():  # norms of ones would hide where they are applied
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.to(shape.stored).save_pretrained(folder, max_shard_size=shape.shard)
    save_tokenizer(folder)
    # Loaded anew: `model.float()` would keep rotary frequencies rounded to the stored dtype.
    reference = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    if shape.kind != "llama":
        reference.set_experts_implementation("eager")  # the grouped kernel refuses odd sizes
    return reference


def _config(shape: Shape) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 256,
        "tie_word_embeddings": shape.tied,
        "initializer_range": 0.3,  # far from uniform scores, so that the best token is clear
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": None,
        **dict(shape.config),
    }
    if shape.kind != "olmoe":
        keys["head_dim"] = shape.head_dim
    if shape.kind == "mixtral":
        keys |= {"num_local_experts": shape.experts, "sliding_window": None}
    elif shape.kind != "llama":
        keys["num_experts"] = shape.experts
    if shape.kind != "llama":
        keys["num_experts_per_tok"] = shape.top
    if shape.kind == "qwen3_moe":
        keys |= {"moe_intermediate_size": shape.inner, "intermediate_size": 5}
    return keys


def save_tokenizer(folder: Path) -> None:
    """One token per byte, then three special ones; prompts begin with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**{letter: number for number, letter in enumerate(alphabet)}, "<unk>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "</s>"}
    config = {"bos_token": "<s>", "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_plan(shape: Shape, **changes: Any) -> RuntimePlan:
    """A plan that fits `shape`; `changes` are fields of the batch, the pages or the plan itself.

    `routed`: with places for the pages that routing hits. `model`: of another model than the shape's.
    """
    given: ModelPlan | None = changes.pop("model", None)
    model = given or _model_of(shape, changes.pop("compute_dtype", "float32"))
    batch = _fields(
        BatchPlan(
            sequences=4,
            micro_batch=2,
            prefill_tokens=16,
            prompt_tokens=48,
            context_tokens=64,
            pass_tokens=changes.get("sequences", 4) * 48,
            kv_tokens=changes.get("sequences", 4) * 64,
            kv_cache="same",
        ),
        changes,
    )
    pages = _fields(
        PagePlan(
            pages_per_layer=1 + -(-model.experts // changes.get("experts_per_page", 1)),
            experts_per_page=1,
            resident_pages=0,
            slots=3,
            slot_bytes=0,
            readers=2,
            block_bytes=4096,
            places=0,
            guesses=0,
        ),
        changes,
    )
    pages = replace(pages, slot_bytes=slot_bytes(model, pages, shape.stored.itemsize))
    if changes.get("routed"):
        pages = replace(pages, places=most_places(model, batch, pages))
    memory = MemoryPlan(
        budget_bytes=8 << 30,
        weights_bytes=weights_bytes(model, pages),
        slots_bytes=pages.slots * pages.slot_bytes,
        kv_bytes=kv_bytes(model, batch),
        workspace_bytes=workspace_bytes(model, batch, pages),
        process_bytes=500 << 20,
    )
    plan = RuntimePlan(
        format=FORMAT,
        name="small",
        device="cpu",
        threads=1,
        model=model,
        batch=batch,
        pages=pages,
        offload=NO_OFFLOAD,
        memory=memory,
        schedule=SchedulePlan(kind="stream", format=SCHEDULE_FORMAT, sha256=""),
        predicted=Predicted(
            prefill_tokens_per_s=ANY_SPEED, decode_tokens_per_s=ANY_SPEED, generated_tokens_per_s=ANY_SPEED
        ),
    )
    check_numbers(Path("plan"), plan)
    return plan


def _model_of(shape: Shape, dtype: Any) -> ModelPlan:
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    router = shape.experts * (shape.kind != "llama")
    layer = 2 * shape.hidden * (query + key) + shape.hidden * (3 * shape.experts * shape.inner + router)
    norms = {"qwen3_moe": 2 * shape.head_dim, "olmoe": query + key}
    layer += 2 * shape.hidden + norms.get(shape.kind, 0)
    embeddings = shape.vocab * shape.hidden * (1 if shape.tied else 2)
    return ModelPlan(
        architecture=shape.kind,
        checkpoint="checkpoint",
        compute_dtype=dtype,
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab=shape.vocab,
        experts=shape.experts,
        experts_per_token=shape.top,
        expert_intermediate=shape.inner,
        moe_layers=shape.layers,
        dense_intermediate=0,
        shared_intermediate=0,
        latent_dim=0,
        attention_parameters=2 * shape.hidden * (query + key),
        expert_parameters=3 * shape.hidden * shape.inner,
        router_corrections=0,
        parameters=shape.layers * layer + embeddings + shape.hidden,
        packing="none",
        scaled=NOT_SCALED,
    )


def in_memory(shape: Shape) -> dict[str, int]:
    """The changes for a plan whose pages never move."""
    return {"resident_pages": 1 + shape.experts, "slots": 0}


def stream_schedule(plan: RuntimePlan, **changes: int) -> Schedule:
    """The schedule of a stream plan: all slots but one ahead, and on into the next pass."""
    constants = StreamConstants(
        layers=plan.model.layers,
        pages=plan.pages.pages_per_layer,
        resident=plan.pages.resident_pages,
        slots=plan.pages.slots,
        places=plan.pages.places,
        guesses=plan.pages.guesses,
        lead=max(0, plan.pages.slots - 1),
        across=1,
        barrier=0,
        lean=1,
    )
    return Schedule(kind="stream", name="paged", constants=constants._replace(**changes))


def offload_schedule(
    plan: RuntimePlan, attend: tuple[int, int] = (0, 0), pages_from_disk: int = 0, **changes: int
) -> Schedule:
    """The schedule of an offload plan, CGOPipe's if no `changes` say otherwise. Of `attend` micro-batches the
    first attend on the CPU, the next with a cache copied up."""
    count = -(-plan.batch.sequences // plan.batch.micro_batch)
    pages, slots = plan.pages.pages_per_layer, plan.pages.slots
    cpu_experts = int(plan.offload.cpu_experts > 0)
    constants = OffloadConstants(
        layers=plan.model.layers,
        micro_batches=count,
        pieces=2,
        pages=pages,
        slots=slots,
        lead=min(slots, 2),
        disk_pages=pages_from_disk,
        cpu_attended=attend[0],
        copied_up=attend[1],
        decode_cpu_experts=cpu_experts,
        prefill_cpu_experts=int(cpu_experts and not pages),
        lookahead=min(2, count - 1),
        wrap=1,
        interleave=1,
        across=1,
        barrier=0,
        lean=1,
    )
    return Schedule(kind="offload", name="test", constants=constants._replace(**changes))


def make_offload_plan(shape: Shape, **changes: Any) -> RuntimePlan:
    """An offload plan for `shape`: 7 sequences in micro-batches of 2, all experts streamed in four pages out
    of pinned memory; `changes` are fields of the batch, the pages, the offload part or the plan itself."""
    batch = {"sequences": 7, "micro_batch": 2, "prefill_tokens": 48, **changes}
    plan = make_plan(shape, **{k: v for k, v in batch.items() if k not in ("pages_per_layer", "slots")})
    pages = replace(
        plan.pages,
        pages_per_layer=changes.get("pages_per_layer", 4),
        slots=changes.get("slots", 0),
        experts_per_page=0,
    )
    offload = _fields(replace(NO_OFFLOAD, gpus=1, budget_bytes=1 << 30), changes)
    held = replace(plan.memory, weights_bytes=1 << 30, slots_bytes=1 << 20, kv_bytes=1 << 30)
    return replace(plan, device="accelerator", pages=pages, offload=offload, memory=held)


def write_plan(folder: Path, plan: RuntimePlan, schedule: Schedule | None = None) -> Path:
    """Write the runtime folder `folder`/small.plan/runtime/replica; return it."""
    schedule = schedule or stream_schedule(plan)
    text = schedule_text(schedule)
    runtime_dir = folder / "small.plan" / "runtime" / "replica"
    runtime_dir.mkdir(parents=True)
    (runtime_dir / "schedule.py").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    plan = replace(plan, schedule=replace(plan.schedule, kind=schedule.kind, sha256=digest))
    (runtime_dir / "runtime.json").write_text(to_json(plan))
    return runtime_dir


def _fields(record: Any, changes: dict[str, Any]) -> Any:
    """`record` with those of `changes` that are its fields."""
    names = record.__dataclass_fields__
    return replace(record, **{name: value for name, value in changes.items() if name in names})
