# SPDX-License-Identifier: Apache-2.0
"""ChatGLM 2 and 3, which map exactly onto transformers' GLM, and GLM-4: gate and up are one linear.

PEFT has no default targets for them.
"""

from pyfast.families.base import Family, Role
from pyfast.families.llama import ATTENTION
from pyfast.families.mistral import gate_up

_ROLES = {**ATTENTION, "mlp.gate_up_proj": Role.GATE_UP, "mlp.down_proj": Role.DOWN}

GLM = Family(
    name="ChatGLM 2/3 (GLM)",
    model_types=("glm",),
    layers=("model.layers",),
    roles=_ROLES,
    lora_targets=("q_proj", "v_proj"),
    fused={Role.GATE_UP: gate_up},
)
GLM4 = Family(
    name="GLM-4",
    model_types=("glm4",),
    layers=("model.layers",),
    roles=_ROLES,
    lora_targets=("q_proj", "v_proj"),
    fused={Role.GATE_UP: gate_up},
)
