# SPDX-License-Identifier: Apache-2.0
"""LoRA+ (Hayou et al., 2024): B learns faster than A, as groups of parameters for any optimiser."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from pyfast.errors import ConfigError, NoGradientError


def loraplus_groups(
    model: nn.Module,
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimiser, with the learning rates of PEFT's `create_loraplus_optimizer`.

    For transformers' Trainer: `optimizers=(torch.optim.AdamW(pyfast.loraplus_groups(model, ...)), None)`; its
    schedule scales each group's rate.

    Args:
        model: a model with LoRA.
        lr: rate of A, and of modules trained whole.
        loraplus_lr_ratio: B's rate is so many times that of A, and so is that of vectors (biases, norms).
        loraplus_lr_embedding: rate of both factors of an embedding's adapter.
        weight_decay: of matrices; vectors have none.

    Returns:
        Groups with "params", "lr" and "weight_decay"; those without parameters are left out.

    Raises:
        ConfigError: a rate or the ratio is no positive number.
        NoGradientError: no B is trained.
    """
    numbers = {
        "lr": lr,
        "loraplus_lr_ratio": loraplus_lr_ratio,
        "loraplus_lr_embedding": loraplus_lr_embedding,
    }
    for name, value in numbers.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ConfigError(f"loraplus_groups: {name}={value!r} must be a positive number")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not any(".lora_B." in name for name in named):
        raise NoGradientError(
            f"loraplus_groups: none of the {len(named)} trained tensors of {type(model).__name__} is a B of "
            "LoRA. Fix: pyfast.apply(model, pyfast.LoraConfig(...)) first"
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        rate = lr
        if ".lora_embedding_" in name:
            rate = loraplus_lr_embedding
        elif ".lora_B." in name or parameter.ndim == 1:
            rate = lr * loraplus_lr_ratio
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
