"""OLMoE: all query heads of a token normalised together, and all key heads; both and values clipped where
config.json has `clip_qkv`. arXiv 2409.02060."""

from moeplan.runtime_min.models.architecture import Architecture

OLMOE = Architecture(
    class_name="OlmoeForCausalLM",
    mlp="mlp",
    matrices=("gate_proj", "down_proj", "up_proj"),
    routed=True,
    query_norm="token",
    experts_keys=("num_experts", "num_local_experts"),
    width_key="intermediate_size",
    renormalise=None,
    norm_eps=1e-5,
    rope_theta=1e4,
)
