# SPDX-License-Identifier: Apache-2.0
"""Nemotron: no gate, the MLP is up, squared ReLU, down. PEFT has no default targets for it."""

from pyfast.families.base import Family, Role
from pyfast.families.llama import ATTENTION

NEMOTRON = Family(
    name="Nemotron",
    model_types=("nemotron",),
    layers=("model.layers",),
    roles={**ATTENTION, "mlp.up_proj": Role.UP, "mlp.down_proj": Role.DOWN},
    lora_targets=("q_proj", "v_proj"),
)
