# SPDX-License-Identifier: Apache-2.0
"""Llama 1, 2 and 3, CodeLlama, and models that reuse the architecture (SmolLM, TinyLlama)."""

from pyfast.families.base import Family, Role

ATTENTION = {
    "self_attn.q_proj": Role.Q,
    "self_attn.k_proj": Role.K,
    "self_attn.v_proj": Role.V,
    "self_attn.o_proj": Role.ATTENTION_OUT,
}
ROLES = {
    **ATTENTION,
    "mlp.gate_proj": Role.GATE,
    "mlp.up_proj": Role.UP,
    "mlp.down_proj": Role.DOWN,
}

LLAMA = Family(
    name="Llama 1/2/3, CodeLlama",
    model_types=("llama",),
    layers=("model.layers",),
    roles=ROLES,
    lora_targets=("q_proj", "v_proj"),
)
