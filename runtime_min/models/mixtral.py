"""Mixtral: every layer a mixture, the chosen experts' weights always sum to 1. arXiv 2401.04088."""

from moeplan.runtime_min.models.architecture import Architecture

MIXTRAL = Architecture(
    class_name="MixtralForCausalLM",
    mlp="block_sparse_moe",
    matrices=("w1", "w2", "w3"),
    windows="all",
    experts_keys=("num_local_experts", "num_experts"),
    rope_theta=1e6,
)
