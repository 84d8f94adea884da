# SPDX-License-Identifier: Apache-2.0
"""Mistral, and Mixtral, whose MLP is a mixture of experts.

Mixtral's checkpoints name each expert's w1, w2 and w3; in memory they are 3-D tensors, w1 (gate) above w3
(up). The router is no linear module. PEFT's default, q and v, makes PEFT itself fail on today's Mixtral.
"""

from dataclasses import replace
from typing import Any

from pyfast.families.base import Family, FusedLayout, Role
from pyfast.families.llama import ATTENTION, LLAMA

MISTRAL = replace(LLAMA, name="Mistral", model_types=("mistral",))


def gate_up(config: Any) -> FusedLayout:
    """Gate above up, as GLM too has it."""
    size = config.intermediate_size
    return FusedLayout({Role.GATE: size, Role.UP: size})


MIXTRAL = Family(
    name="Mixtral",
    model_types=("mixtral",),
    layers=("model.layers",),
    roles=ATTENTION,
    lora_targets=("q_proj", "v_proj"),
    experts={"mlp.experts.gate_up_proj": Role.GATE_UP, "mlp.experts.down_proj": Role.DOWN},
    fused={Role.GATE_UP: gate_up},
)
