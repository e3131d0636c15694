"""Llama 4's text model: layers with and without experts, a shared expert, and attention within chunks but in
every fourth layer, which knows no positions. Source: transformers 5.23.0, `modeling_llama4.py`."""

from dataclasses import replace

from moeplan.runtime_min.models.architecture import Architecture

LLAMA4_TEXT = Architecture(
    class_name="Llama4ForCausalLM",
    mlp="feed_forward",
    matrices=("gate_up_proj", "down_proj"),
    dense="interleaved",
    experts="halves",
    shared="shared_expert",
    query_norm="rotated",
    query_norm_key="use_qk_norm",
    biases="all",
    neighbours=True,
    chunks=True,
    router="input",
    gate="router",
    renormalise=False,
    experts_keys=("num_local_experts", "num_experts"),
    dense_width_key="intermediate_size_mlp",
    rope_theta=500000.0,
)
LLAMA4 = replace(
    LLAMA4_TEXT,
    class_name="Llama4ForConditionalGeneration",
    inner="text_config",
    names=(("model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    unused=("vision_model.", "multi_modal_projector."),
)
