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


def choose_attention(model: Any, place: Place) -> list[str]:
    """The attention implementations to try for packed records, the best first, by transformers' names.

    On a GPU in half precision, those of these that the model's class allows: flash-attn where it is
    installed, torch's varlen kernels, torch's flex attention (for softcaps). Elsewhere, and where somebody
    chose another than the class has by itself, none: the present one stays.
    """
    if not model._can_set_attn_implementation() or not _open_to_others(model, place):
        return []
    found = []
    if model._supports_flash_attn and _has_flash_attn():
        found.append("flash_attention_2")
    if _dropout(model):  # neither of torch's two has any
        return found
    if _suits_varlen(model) and varlen_attention.has_kernels(place.device):
        varlen_attention.register()
        found.append(varlen_attention.NAME)
    if model._supports_flex_attn:
        found.append("flex_attention")
    return found


def attention_in_words(model: Any, place: Place) -> str:
    """What a model's attention is called in messages, and why it is no better one."""
    name = str(model.config._attn_implementation)
    if name in _IN_WORDS:
        return _IN_WORDS[name]
    said = f"the mask of {name} attention"
    if not _open_to_others(model, place):
        return said
    why = "there is attention dropout" if _dropout(model) else "no other serves this model"
    return f"{said}, as {why}"


def _open_to_others(model: Any, place: Place) -> bool:
    """Whether there is better attention, and nobody chose the present one."""
    return (
        place.device.type == "cuda"
        and place.dtype in (torch.float16, torch.bfloat16)
        and _text_implementations(model) <= {None, model.get_correct_attn_implementation(None)}
    )


def _text_implementations(model: Any) -> set[str | None]:
    """Those of a model and of its part that reads text."""
    configs = (model.config, model.config.get_text_config())
    return {config._attn_implementation for config in configs}


def _has_flash_attn() -> bool:
    from transformers.utils.import_utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def _dropout(model: Any) -> bool:
    """Whether attention weights are dropped in training (attention_dropout, attn_pdrop, ...)."""
    options = vars(model.config.get_text_config())
    rates = (rate for name, rate in options.items() if "att" in name and "drop" in name)
    return any(isinstance(rate, float | int) and rate > 0 for rate in rates)


def _suits_varlen(model: Any) -> bool:
    """Whether what SDPA does in a model may be what the varlen kernels do; heads' sizes show in a trial."""
    return (
        model._supports_attention_backend
        and model._supports_sdpa
        and vars(model.config.get_text_config()).get("attn_logit_softcapping") is None
    )
