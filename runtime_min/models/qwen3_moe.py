"""Qwen3-MoE: heads wider than hidden / heads, each query and key head normalised. arXiv 2505.09388."""

from moeplan.runtime_min.models.architecture import Architecture

QWEN3_MOE = Architecture(
    class_name="Qwen3MoeForCausalLM",
    dense="stepped",
    query_norm="head",
    biases="all",
    windows="used",
    width_key="moe_intermediate_size",
    renormalise=False,
    renormalise_key="norm_topk_prob",
    norm_eps=1e-6,
)
