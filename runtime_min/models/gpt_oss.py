"""gpt-oss: biases everywhere, a sink per head, every other layer windowed, a clamped SwiGLU whose gates and
ups alternate in one tensor for all experts. arXiv 2508.10925."""

from moeplan.runtime_min.models.architecture import Architecture

GPT_OSS = Architecture(
    class_name="GptOssForCausalLM",
    matrices=("gate_up_proj", "down_proj"),
    experts="pairs",
    biases="all",
    has_biases=True,
    sinks=True,
    windows="listed",
    gate="router",
    gate_bias=True,
    experts_keys=("num_local_experts", "num_experts"),
    top_keys=("num_experts_per_tok", "experts_per_token"),
    rope_theta=150000.0,
)
