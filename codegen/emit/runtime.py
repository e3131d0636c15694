"""Plan -> runtime/<replica>/: runtime.json and schedule.py of every replica that runtime_min executes."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace

from moeplan.codegen.data import rounded
from moeplan.codegen.emit.schedule_py import schedule_text
from moeplan.codegen.packing import as_packed, packed_path
from moeplan.planner.ir.estimate import Estimate
from moeplan.planner.ir.model import Model
from moeplan.planner.ir.plan import Plan, Replica
from moeplan.planner.ir.policy import NO_PAGES, Policy
from moeplan.planner.ir.schedule import Constants, OffloadConstants, Schedule
from moeplan.planner.ir.spec import Dtype
from moeplan.planner.ir.workload import RequestClass
from moeplan.runtime_min import plan_file


def emit(plan: Plan) -> dict[str, str]:
    """Return the two files of each of our replicas."""
    files = {}
    for replica in plan.replicas:
        if replica.pipeline is None:
            continue
        schedule = schedule_text(replica.pipeline.schedule)
        folder = f"runtime/{replica.name}"
        files[f"{folder}/schedule.py"] = schedule
        files[f"{folder}/runtime.json"] = plan_file.to_json(
            _runtime_plan(plan, replica, replica.pipeline.schedule, schedule)
        )
    return files


def _runtime_plan(plan: Plan, replica: Replica, schedule: Schedule, text: str) -> plan_file.RuntimePlan:
    policy = replica.policy
    requests = plan.workload.request_class(policy.serves)
    return plan_file.RuntimePlan(
        format=plan_file.FORMAT,
        name=f"{plan.spec.name}/{replica.name}",
        device="accelerator" if policy.gpus else "cpu",
        threads=policy.threads,
        model=model_plan(
            as_packed(plan.workload.model, policy), packed_path(plan.spec.model.path, policy), policy.dtype
        ),
        batch=_batch_plan(policy, requests),
        pages=_page_plan(policy, schedule.constants),
        offload=_offload_plan(plan, policy) if policy.gpus else plan_file.NO_OFFLOAD,
        memory=_memory_plan(policy),
        schedule=plan_file.SchedulePlan(
            kind=schedule.kind,
            format=plan_file.SCHEDULE_FORMAT,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        ),
        predicted=plan_file.Predicted(
            prefill_tokens_per_s=_range(policy.prefill_tokens_per_s),
            decode_tokens_per_s=_range(policy.decode_tokens_per_s),
            generated_tokens_per_s=_range(policy.generated_tokens_per_s),
        ),
    )


def model_plan(model: Model, checkpoint: str, dtype: Dtype) -> plan_file.ModelPlan:
    """The shape that the runtime is to find in `checkpoint`, computed in `dtype`."""
    model = model.as_one_expert()
    a = model.attention
    return plan_file.ModelPlan(
        architecture=model.model_type,
        checkpoint=checkpoint,
        compute_dtype=dtype,
        layers=model.layers,
        hidden=model.hidden,
        heads=a.heads,
        kv_heads=a.kv_heads,
        head_dim=a.head_dim,
        vocab=model.vocab,
        experts=model.experts,
        experts_per_token=model.experts_per_token,
        expert_intermediate=model.expert_intermediate,
        moe_layers=model.moe_layers,
        dense_intermediate=model.dense_intermediate,
        shared_intermediate=model.shared_intermediate,
        latent_dim=a.kv_lora_dim + a.rope_dim,
        attention_parameters=model.parameters.attention // model.layers,
        expert_parameters=model.expert_parameters(),
        router_corrections=model.router_corrections,
        parameters=model.parameters.total(),
        packing=model.packing,
        scaled=plan_file.ScaledPlan(**asdict(model.scaled)),
    )


def _batch_plan(policy: Policy, requests: RequestClass) -> plan_file.BatchPlan:
    n, prompt, context = policy.sequences, requests.prompt_tokens_max, requests.context_tokens_max
    stream = not policy.gpus
    blocks = plan_file.kv_blocks(context) * plan_file.KV_BLOCK_TOKENS
    return plan_file.BatchPlan(
        sequences=n,
        micro_batch=policy.micro_batch,
        prefill_tokens=policy.prefill_tokens,
        prompt_tokens=prompt,
        context_tokens=context,
        pass_tokens=plan_file.pass_tokens(n, prompt) if stream else n * prompt,
        kv_tokens=n * (blocks if stream else context),
        kv_cache=policy.kv_dtype,
    )


def _page_plan(policy: Policy, constants: Constants) -> plan_file.PagePlan:
    """A schedule may merge the pages of an offload plan, so it has their number."""
    pages = policy.pages
    if isinstance(constants, OffloadConstants):
        pages = replace(NO_PAGES, pages_per_layer=constants.pages, slots=constants.slots)
    return plan_file.PagePlan(
        pages_per_layer=pages.pages_per_layer,
        experts_per_page=pages.experts_per_page,
        resident_pages=pages.resident_pages,
        slots=pages.slots,
        slot_bytes=pages.slot_bytes,
        readers=pages.readers,
        block_bytes=pages.block_bytes,
        places=pages.places,
        guesses=pages.guesses,
    )


def _offload_plan(plan: Plan, policy: Policy) -> plan_file.OffloadPlan:
    model = plan.workload.model.as_one_expert()

    def experts(share: float) -> int:
        return round(share * model.experts)

    ranked = {layer.layer: layer.ranked for layer in plan.workload.popularity}
    anyhow = tuple(range(model.experts))
    return plan_file.OffloadPlan(
        gpus=policy.gpus,
        expert_shares=policy.expert_shares,
        resident_experts=experts(policy.resident_share),
        cpu_experts=experts(policy.experts_cpu_share),
        disk_experts=experts(policy.experts_disk_share),
        ranking=tuple(ranked.get(layer, anyhow) for layer in range(model.layers if ranked else 0)),
        budget_bytes=next(limit.bytes for limit in policy.limits if limit.level == "gpu"),
    )


def _memory_plan(policy: Policy) -> plan_file.MemoryPlan:
    """Host memory. Items that only one strategy has are added to the item they resemble."""
    held = {use.item: use.bytes for use in policy.memory if use.level == "dram"}
    return plan_file.MemoryPlan(
        budget_bytes=next(limit.bytes for limit in policy.limits if limit.level == "dram"),
        weights_bytes=sum(
            held.get(item, 0) for item in ("weights", "expert weights", "pinned expert weights")
        ),
        slots_bytes=held.get("page slots", 0) + held.get("pinned pages", 0),
        kv_bytes=held.get("KV cache", 0),
        workspace_bytes=held.get("workspace", 0) + held.get("pinned buffers", 0),
        process_bytes=held["process"],
    )


def _range(estimate: Estimate) -> plan_file.Range:
    return plan_file.Range(
        value=rounded(estimate.value) or 0.0,
        low=rounded(estimate.low) or 0.0,
        high=rounded(estimate.high) or 0.0,
    )
