"""Phi-3.5-MoE: LayerNorms, biases, and two experts by sparsemixer. arXiv 2404.14219, 2409.12136."""

from moeplan.runtime_min.models.architecture import Architecture

PHIMOE = Architecture(
    class_name="PhimoeForCausalLM",
    mlp="block_sparse_moe",
    matrices=("w1", "w2", "w3"),
    norm="biased layer",
    biases="all",
    windows="all",
    router="sparsemixer",
    renormalise=False,
    experts_keys=("num_local_experts", "num_experts"),
    rope_theta=1e6,
)
