# SPDX-License-Identifier: Apache-2.0
"""RecurrentGemma (Griffin): two layers of three have a recurrent block in attention's place.

Of that block the linears are adapted and quantised; its convolution and the recurrence's own block-diagonal
gates stay as they are. PEFT has no default targets; ours are q and v, and what corresponds to them beside
and into the recurrence. The model scales embeddings itself, so that virtual tokens are scaled too.
"""

from pyfast.families.base import Family, Role

RECURRENT_GEMMA = Family(
    name="RecurrentGemma (Griffin)",
    model_types=("recurrent_gemma",),
    layers=("model.layers",),
    roles={
        "temporal_block.q_proj": Role.Q,
        "temporal_block.k_proj": Role.K,
        "temporal_block.v_proj": Role.V,
        "temporal_block.o_proj": Role.ATTENTION_OUT,
        "temporal_block.linear_x": Role.RECURRENT_IN,
        "temporal_block.linear_y": Role.RECURRENT_GATE,
        "temporal_block.linear_out": Role.RECURRENT_OUT,
        "mlp_block.gate_proj": Role.GATE,
        "mlp_block.up_proj": Role.UP,
        "mlp_block.down_proj": Role.DOWN,
    },
    lora_targets=("q_proj", "v_proj", "linear_x", "linear_y"),
    mixers=("temporal_block",),
    mlps=("mlp_block",),
)
