# SPDX-License-Identifier: Apache-2.0
"""Falcon: 7B (multi-query), 40B and later (grouped queries) and RW (full heads), each fused in its own way.

The linears are transformers' `FalconLinear`. Attention and MLP run in parallel, except in RW.
"""

from typing import Any

from pyfast.families.base import Family, FusedLayout, Role
from pyfast.families.gpt_neox import per_head


def _fused(config: Any) -> FusedLayout:
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    if config.new_decoder_architecture:
        groups = config.num_kv_heads
        return FusedLayout({Role.Q: heads // groups * size, Role.K: size, Role.V: size}, groups)
    if config.multi_query:
        return FusedLayout({Role.Q: heads * size, Role.K: size, Role.V: size})
    return per_head(config)


FALCON = Family(
    name="Falcon",
    model_types=("falcon",),
    layers=("transformer.h",),
    roles={
        "self_attention.query_key_value": Role.QKV,
        "self_attention.dense": Role.ATTENTION_OUT,
        "mlp.dense_h_to_4h": Role.UP,
        "mlp.dense_4h_to_h": Role.DOWN,
    },
    lora_targets=("query_key_value",),
    mixers=("self_attention",),
    fused={Role.QKV: _fused},
)
