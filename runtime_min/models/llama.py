"""Llama and Mistral: dense. The MLP is planned and held as one expert that every token takes.
arXiv 2407.21783, 2310.06825."""

from moeplan.runtime_min.models.architecture import Architecture

LLAMA = Architecture(
    class_name="LlamaForCausalLM",
    routed=False,
    biases="all",
    norm_eps=1e-6,
)
MISTRAL = Architecture(
    class_name="MistralForCausalLM",
    routed=False,
    windows="all",
    norm_eps=1e-6,
)
