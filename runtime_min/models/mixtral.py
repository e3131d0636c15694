"""Mixtral: every layer a mixture, the chosen experts' weights always sum to 1. arXiv 2401.04088."""

from moeplan.runtime_min.models.architecture import Architecture

MIXTRAL = Architecture(
    class_name="MixtralForCausalLM",
    mlp="block_sparse_moe",
    matrices=("w1", "w2", "w3"),
    windows="all",
    renormalise=True,
    experts_keys=("num_local_experts", "num_experts"),
    norm_eps=1e-5,
    rope_theta=1e6,
)
