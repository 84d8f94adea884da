# SPDX-License-Identifier: Apache-2.0
"""Which attention packed records are trained with: kernels that know where each begins, if there are any."""

from __future__ import annotations

from typing import Any

import torch

from pyfast.integrations import varlen_attention
from pyfast.train.model import Place

_IN_WORDS = {
    "flash_attention_2": "flash-attn",
    varlen_attention.NAME: "torch's varlen attention",
    "flex_attention": "torch's flex attention",
}


def choose_attention(model: Any, place: Place) -> str:
    """The attention implementation for packed records, by transformers' name.

    On a GPU in half precision, the first of these that the model can have: flash-attn where it is installed,
    torch's varlen kernels, torch's flex attention (for softcaps). Else, and where somebody chose another than
    the model's class has by itself, the present one.
    """
    present = str(model.config._attn_implementation)
    if (
        place.device.type != "cuda"
        or place.dtype not in (torch.float16, torch.bfloat16)
        or not model._can_set_attn_implementation()
        or present != model.get_correct_attn_implementation(None)
    ):
        return present
    if model._supports_flash_attn and _has_flash_attn():
        return "flash_attention_2"
    config = model.config.get_text_config()
    if _dropout(config):  # neither of torch's two has any
        return present
    if _suits_varlen(model, config) and varlen_attention.has_kernels(place.device):
        varlen_attention.register()
        return varlen_attention.NAME
    return "flex_attention" if model._supports_flex_attn else present


def attention_in_words(model: Any) -> str:
    """What a model's attention is called in messages."""
    name = str(model.config._attn_implementation)
    return _IN_WORDS.get(name, f"the mask of {name} attention")


def _has_flash_attn() -> bool:
    from transformers.utils.import_utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def _dropout(config: Any) -> bool:
    """Whether attention weights are dropped in training (attention_dropout, attn_pdrop, ...)."""
    rates = (rate for name, rate in vars(config).items() if "att" in name and "drop" in name)
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)


def _suits_varlen(model: Any, config: Any) -> bool:
    """Whether what SDPA does in a model is what the varlen kernels do."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        model._supports_attention_backend
        and model._supports_sdpa
        and getattr(config, "attn_logit_softcapping", None) is None
        and size <= varlen_attention.LARGEST_HEAD
        and size % 8 == 0
    )
