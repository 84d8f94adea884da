# SPDX-License-Identifier: Apache-2.0
"""Where methods go in each architecture, by what transformers calls its modules: the references' own table.

A new family has a line in `PLACES` unless its modules are called as Llama's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Places:
    """Ends of paths.

    Attributes:
        keys, values: the linears that make them.
        fused: the one that makes queries, keys and values; then there are no others.
        down: the last linear of an MLP; empty for experts, which are no linears.
        blocks: what mixes positions, and MLPs.
    """

    keys: str = "k_proj"
    values: str = "v_proj"
    fused: str = ""
    down: str = "down_proj"
    blocks: tuple[str, ...] = ("self_attn", "mlp")


_GPT = Places(fused="c_attn", down="mlp.c_proj", blocks=("attn", "mlp"))
_LARGE = {"fused": "query_key_value", "down": "dense_4h_to_h"}
PLACES = {
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": Places(**_LARGE, blocks=("attention", "mlp")),
    "falcon": Places(**_LARGE, blocks=("self_attention", "mlp")),
    "gptj": Places(down="fc_out", blocks=("attn", "mlp")),
    "starcoder2": Places(down="mlp.c_proj"),
    "mixtral": Places(down=""),
    "phi3": Places(fused="qkv_proj"),
    "recurrent_gemma": Places(blocks=("temporal_block", "mlp_block")),
    "t5": Places(
        "k", "v", down="wo", blocks=("SelfAttention", "EncDecAttention", "DenseReluDense")
    ),
}
"""By transformers' `model_type`."""


def places_of(model: Any) -> Places:
    """Those of the model's architecture."""
    return PLACES.get(model.config.model_type, Places())


def modules_at(model: nn.Module, *ends: str) -> dict[str, Any]:
    """Path to module of those whose paths end in whole names with one of these."""
    ways = tuple(f".{end}" for end in ends if end)
    return {path: m for path, m in model.named_modules() if f".{path}".endswith(ways)}


def matrix_of(linear: Any) -> Tensor:
    """A linear's weight as [out, in]."""
    weight: Tensor = linear.weight
    return weight.T if isinstance(linear, Conv1D) else weight


def key_value_rows(config: Any, width: int) -> Tensor:
    """Which outputs of a fused linear are keys and values: it makes runs of queries, a key and a value."""
    size, runs = config.hidden_size // config.num_attention_heads, config.num_attention_heads
    if config.model_type == "gpt2":
        runs, size = 1, config.hidden_size
    elif config.model_type == "phi3":
        runs, size = 1, size * config.num_key_value_heads
    elif getattr(config, "new_decoder_architecture", False):
        runs = config.num_kv_heads
    elif getattr(config, "multi_query", False):
        runs = 1
    return torch.arange(width).view(runs, -1, size)[:, -2:].flatten()
