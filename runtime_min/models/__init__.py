"""The architectures that this runtime executes: a record each, and the tensors that follow from it."""

from moeplan.runtime_min.models.architecture import Architecture
from moeplan.runtime_min.models.llama import LLAMA
from moeplan.runtime_min.models.mixtral import MIXTRAL
from moeplan.runtime_min.models.olmoe import OLMOE
from moeplan.runtime_min.models.qwen3_moe import QWEN3_MOE

BY_MODEL_TYPE: dict[str, Architecture] = {  # the names of plan_file.ARCHITECTURES
    "llama": LLAMA,
    "mixtral": MIXTRAL,
    "olmoe": OLMOE,
    "qwen3_moe": QWEN3_MOE,
}
