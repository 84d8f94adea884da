# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (and GPT-3, whose dense architecture it is); linears are transformers' `Conv1D` [in, out].

The models of GPT-3's paper alternate with sparse attention, which transformers does not have.
"""

from typing import Any

from pyfast.families.base import Family, FusedLayout, Role


def _thirds(config: Any) -> FusedLayout:
    size = config.hidden_size
    return FusedLayout({Role.Q: size, Role.K: size, Role.V: size})


GPT2 = Family(
    name="GPT-3 (GPT-2 architecture)",
    model_types=("gpt2",),
    layers=("transformer.h",),
    roles={
        "attn.c_attn": Role.QKV,
        "attn.c_proj": Role.ATTENTION_OUT,
        "mlp.c_fc": Role.UP,
        "mlp.c_proj": Role.DOWN,
    },
    lora_targets=("c_attn",),
    mixers=("attn",),
    fused={Role.QKV: _thirds},
)
