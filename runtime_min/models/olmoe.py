"""OLMoE: all query heads of a token normalised together, and all key heads; both and values clipped where
config.json has `clip_qkv`. arXiv 2409.02060."""

from moeplan.runtime_min.models.architecture import Architecture

OLMOE = Architecture(
    class_name="OlmoeForCausalLM",
    query_norm="token",
    biases="all",
    renormalise=False,
    renormalise_key="norm_topk_prob",
)
