"""DeepSeek-V2 (arXiv 2405.04434), V3 (2412.19437) and Kimi-K2, which has V3's form: latent attention, dense
first layers, shared experts, and experts chosen within groups."""

from dataclasses import replace

from moeplan.runtime_min.models.architecture import Architecture

DEEPSEEK_V2 = Architecture(
    class_name="DeepseekV2ForCausalLM",
    dense="first",
    shared="shared_experts",
    attention="latent",
    biases="all",
    neighbours=True,
    router="grouped softmax",
    renormalise=False,
    experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
    width_key="moe_intermediate_size",
    norm_eps=1e-6,
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    class_name="DeepseekV3ForCausalLM",
    router="sigmoid",
    renormalise=True,
    renormalise_key="norm_topk_prob",
)
