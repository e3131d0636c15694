"""Qwen3, dense: heads wider than hidden / heads, each query and key head normalised. arXiv 2505.09388."""

from moeplan.runtime_min.models.architecture import Architecture

QWEN3 = Architecture(
    class_name="Qwen3ForCausalLM",
    routed=False,
    query_norm="head",
    biases="all",
    windows="above",
    norm_eps=1e-6,
)
