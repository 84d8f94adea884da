# SPDX-License-Identifier: Apache-2.0
"""What users of a family should know beyond what its table says; `docs/matrix.md` shows it."""

from __future__ import annotations

from collections.abc import Mapping

_POSITIONS = "Positions are a learned table: virtual tokens take some of its rows."
_EMBEDDINGS = (
    "The embedding module scales what it returns by the root of the hidden size, so that virtual "
    "tokens are not scaled."
)
_BEFORE_NORMS = "Bottleneck adapters go before the norms that follow attention and MLP."
_GATE_UP = "Gate and up are one linear."
_NO_PEFT_DEFAULT = "PEFT has no default targets of LoRA for it; ours are used."

NOTES: Mapping[str, tuple[str, ...]] = {
    "GPT-3 (GPT-2 architecture)": (
        "Linears are transformers' `Conv1D`, which stores [in, out]; files and merged weights keep "
        "that layout.",
        _POSITIONS,
        "The models of GPT-3's paper alternate with sparse attention, which transformers does not have.",
    ),
    "GPT-3 (GPT-NeoX)": ("The fused linear holds each head's query, key and value together.",),
    "Nemotron": (_NO_PEFT_DEFAULT, "The MLP has no gate."),
    "ChatGLM 2/3 (GLM)": (
        "Checkpoints in the original layout load without remote code; `pyfast convert` writes GLM's.",
        _GATE_UP,
        _NO_PEFT_DEFAULT,
    ),
    "Falcon": (
        "Linears are transformers' `FalconLinear`: `pyfast.quantize` takes them, bitsandbytes leaves "
        "them dense.",
        "The fused linear has one layout in 7B (all queries, one key, one value), one in 40B and later "
        "(group by group) and one in RW (head by head).",
    ),
    "StarCoder": (
        "Multi-query models fuse all queries, one key and one value; others have them head by head.",
        _POSITIONS,
    ),
    "StarCoder 2": (_NO_PEFT_DEFAULT,),
    "Mixtral": (
        "The experts are 3-D tensors: `quantize` takes them, LoRA adapts them where they are named, and "
        "IA3 scales the inputs of all experts of a layer by one vector. The router stays as it is.",
        "PEFT passes over IA3's vectors of experts without a word, so that its outputs differ; saving warns.",
        "Adapters of experts in NF4, LoRA's and IA3's, cannot be merged.",
        "PEFT's default targets of LoRA make PEFT itself fail on today's Mixtral.",
    ),
    "Gemma 1, CodeGemma": (_EMBEDDINGS,),
    "Gemma 2": (_EMBEDDINGS, _BEFORE_NORMS),
    "RecurrentGemma (Griffin)": (
        "Two layers of three have a recurrent block in attention's place; its linears are adapted and "
        "quantised, its convolution and block-diagonal gates are not.",
        "The model itself scales embeddings, so that virtual tokens are scaled too.",
        _NO_PEFT_DEFAULT,
    ),
    "T5": (
        "Virtual tokens go in front of the encoder's input; `decoder_prompt` has more in front of the "
        "decoder's.",
        "`quantize` leaves `wo` dense, as transformers does.",
        "Training learns the last answer from all that comes before it.",
    ),
    "Qwen 2/2.5": (
        "Queries, keys and values have biases; IA3 scales those of keys and values too.",
    ),
    "Gemma 3 (text)": (_EMBEDDINGS, _BEFORE_NORMS),
    "GLM-4": (_GATE_UP, _NO_PEFT_DEFAULT),
    "Phi-3/4": (
        "Queries, keys and values are one linear.",
        _GATE_UP,
        _NO_PEFT_DEFAULT,
    ),
    "OLMo 2": (_BEFORE_NORMS, _NO_PEFT_DEFAULT),
}
"""Family's name to sentences."""
