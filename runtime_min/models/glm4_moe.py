"""GLM-4.5: half of each head rotated, biases on queries, keys and values, dense first layers, a shared expert
and V3's way to choose experts. arXiv 2508.06471."""

from moeplan.runtime_min.models.architecture import Architecture

GLM4_MOE = Architecture(
    class_name="Glm4MoeForCausalLM",
    dense="first",
    shared="shared_experts",
    query_norm="head",
    query_norm_key="use_qk_norm",
    biases="inputs",
    partial=0.5,
    router="sigmoid",
    experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
    width_key="moe_intermediate_size",
    renormalise_key="norm_topk_prob",
)
