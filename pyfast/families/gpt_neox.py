# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX (Pythia) and GPT-J, open models of GPT-3's kind.

GPT-NeoX's fused linear holds each head's query, key and value together. Both run attention and MLP in
parallel (GPT-NeoX by default).
"""

from typing import Any

from pyfast.families.base import Family, FusedLayout, Role


def per_head(config: Any) -> FusedLayout:
    """Head by head query, key and value; other families have this layout too."""
    heads = config.num_attention_heads
    size = config.hidden_size // heads
    return FusedLayout({Role.Q: size, Role.K: size, Role.V: size}, heads)


GPT_NEOX = Family(
    name="GPT-3 (GPT-NeoX)",
    model_types=("gpt_neox",),
    layers=("gpt_neox.layers",),
    roles={
        "attention.query_key_value": Role.QKV,
        "attention.dense": Role.ATTENTION_OUT,
        "mlp.dense_h_to_4h": Role.UP,
        "mlp.dense_4h_to_h": Role.DOWN,
    },
    lora_targets=("query_key_value",),
    mixers=("attention",),
    fused={Role.QKV: per_head},
)
GPTJ = Family(
    name="GPT-3 (GPT-J)",
    model_types=("gptj",),
    layers=("transformer.h",),
    roles={
        "attn.q_proj": Role.Q,
        "attn.k_proj": Role.K,
        "attn.v_proj": Role.V,
        "attn.out_proj": Role.ATTENTION_OUT,
        "mlp.fc_in": Role.UP,
        "mlp.fc_out": Role.DOWN,
    },
    lora_targets=("q_proj", "v_proj"),
    mixers=("attn",),
)
