# SPDX-License-Identifier: Apache-2.0
"""StarCoder (GPT-BigCode: multi-query or full heads, fused) and StarCoder 2, for which PEFT has no default
targets."""

from dataclasses import replace
from typing import Any

from pyfast.families.base import Family, FusedLayout, Role
from pyfast.families.gpt2 import GPT2
from pyfast.families.gpt_neox import per_head
from pyfast.families.llama import ATTENTION


def _fused(config: Any) -> FusedLayout:
    if not config.multi_query:
        return per_head(config)
    size = config.hidden_size // config.num_attention_heads
    return FusedLayout({Role.Q: config.hidden_size, Role.K: size, Role.V: size})


STARCODER = replace(GPT2, name="StarCoder", model_types=("gpt_bigcode",), fused={Role.QKV: _fused})
STARCODER2 = Family(
    name="StarCoder 2",
    model_types=("starcoder2",),
    layers=("model.layers",),
    roles={**ATTENTION, "mlp.c_fc": Role.UP, "mlp.c_proj": Role.DOWN},
    lora_targets=("q_proj", "v_proj"),
)
