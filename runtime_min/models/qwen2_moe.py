"""Qwen2-MoE: biases on queries, keys and values, and a shared expert with a gate. arXiv 2407.10671."""

from moeplan.runtime_min.models.architecture import Architecture

QWEN2_MOE = Architecture(
    class_name="Qwen2MoeForCausalLM",
    dense="stepped",
    shared="shared_expert",
    shared_gate="shared_expert_gate",
    biases="inputs",
    bias_key="qkv_bias",
    has_biases=True,
    width_key="moe_intermediate_size",
    renormalise=False,
    renormalise_key="norm_topk_prob",
    norm_eps=1e-6,
)
