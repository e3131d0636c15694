"""Qwen3-MoE: heads wider than hidden / heads, each query and key head normalised. arXiv 2505.09388.

Layers without experts (`mlp_only_layers`, `decoder_sparse_step`) are refused; no published model has them.
"""

from moeplan.runtime_min.models.architecture import Architecture

QWEN3_MOE = Architecture(
    class_name="Qwen3MoeForCausalLM",
    mlp="mlp",
    matrices=("gate_proj", "down_proj", "up_proj"),
    routed=True,
    query_norm="head",
    experts_keys=("num_experts", "num_local_experts"),
    width_key="moe_intermediate_size",
    renormalise=None,
    norm_eps=1e-6,
    rope_theta=1e4,
)
