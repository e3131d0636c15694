"""Llama: dense. Its MLP is planned and held as one expert that every token takes. arXiv 2407.21783."""

from moeplan.runtime_min.models.architecture import Architecture

LLAMA = Architecture(
    class_name="LlamaForCausalLM",
    mlp="mlp",
    matrices=("gate_proj", "down_proj", "up_proj"),
    routed=False,
    query_norm="none",
    experts_keys=(),
    width_key="intermediate_size",
    renormalise=True,
    norm_eps=1e-6,
    rope_theta=1e4,
)
