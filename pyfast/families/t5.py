# SPDX-License-Identifier: Apache-2.0
"""T5 with an MLP of two linears, and 1.1 and Flan-T5 with a gated one."""

from pyfast.families.base import Family, Role

_ATTENTION = {"q": Role.Q, "k": Role.K, "v": Role.V, "o": Role.ATTENTION_OUT}
_MLP = {"wi": Role.UP, "wi_0": Role.GATE, "wi_1": Role.UP, "wo": Role.DOWN}
_SELF, _CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
_MLPS = ("layer.1.DenseReluDense", "layer.2.DenseReluDense")
"""Of the encoder, of the decoder."""

T5 = Family(
    name="T5",
    model_types=("t5",),
    layers=("encoder.block", "decoder.block"),
    roles={
        f"{block}.{name}": role
        for names, blocks in ((_ATTENTION, (_SELF, _CROSS)), (_MLP, _MLPS))
        for block in blocks
        for name, role in names.items()
    },
    lora_targets=("q", "v"),
    mixers=(_SELF, _CROSS),
    mlps=_MLPS,
    cross_attention=(_CROSS,),
    uncalled=("shared",),
    own_loss=True,
)
