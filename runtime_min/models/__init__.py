"""The architectures that this runtime executes: a record each, and the tensors that follow from it."""

from moeplan.runtime_min.models.architecture import Architecture
from moeplan.runtime_min.models.dbrx import DBRX
from moeplan.runtime_min.models.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moeplan.runtime_min.models.glm4_moe import GLM4_MOE
from moeplan.runtime_min.models.gpt_oss import GPT_OSS
from moeplan.runtime_min.models.llama import LLAMA, MISTRAL
from moeplan.runtime_min.models.llama4 import LLAMA4, LLAMA4_TEXT
from moeplan.runtime_min.models.mixtral import MIXTRAL
from moeplan.runtime_min.models.olmoe import OLMOE
from moeplan.runtime_min.models.phimoe import PHIMOE
from moeplan.runtime_min.models.qwen2_moe import QWEN2_MOE
from moeplan.runtime_min.models.qwen3 import QWEN3
from moeplan.runtime_min.models.qwen3_moe import QWEN3_MOE

BY_MODEL_TYPE: dict[str, Architecture] = {
    "dbrx": DBRX,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "glm4_moe": GLM4_MOE,
    "gpt_oss": GPT_OSS,
    "kimi_k2": DEEPSEEK_V3,
    "llama": LLAMA,
    "llama4": LLAMA4,
    "llama4_text": LLAMA4_TEXT,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "phimoe": PHIMOE,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
}
