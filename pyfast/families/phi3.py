# SPDX-License-Identifier: Apache-2.0
"""Phi-3, Phi-3.5 and Phi-4: queries, keys and values are one linear, and gate and up another.

The fused linear holds all queries, then all keys, then all values. PEFT has no default targets for it.
"""

from typing import Any

from pyfast.families.base import Family, FusedLayout, Role
from pyfast.families.mistral import gate_up


def _qkv(config: Any) -> FusedLayout:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", config.hidden_size // heads)
    return FusedLayout({Role.Q: heads * size, Role.K: groups * size, Role.V: groups * size})


PHI3 = Family(
    name="Phi-3/4",
    model_types=("phi3",),
    layers=("model.layers",),
    roles={
        "self_attn.qkv_proj": Role.QKV,
        "self_attn.o_proj": Role.ATTENTION_OUT,
        "mlp.gate_up_proj": Role.GATE_UP,
        "mlp.down_proj": Role.DOWN,
    },
    lora_targets=("qkv_proj",),
    fused={Role.QKV: _qkv, Role.GATE_UP: gate_up},
)
