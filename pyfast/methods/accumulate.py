# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation by the kernels that make the gradients."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from pyfast.errors import NoGradientError
from pyfast.nn.group import GroupMember
from pyfast.ops import _accumulate


def accumulate_in_kernels(model: nn.Module, enabled: bool = True) -> int:
    """Let the CUDA kernels of LoRA linears add to the factors' `.grad` themselves; off unless asked for.

    `backward()` then costs a launch and a read less for each factor from the second micro-batch on, less host
    time in all, and in half types mostly rounds once where torch's accumulation rounds twice. torch
    accumulates as ever for a factor with hooks, beside other processes (DDP, FSDP), under `torch.compile` and
    `torch.autograd.grad`, on other devices (a warning says so), and for DoRA's magnitudes. Hooks
    are a parameter's own (`register_hook`, `register_post_accumulate_grad_hook`). One on its AccumulateGrad
    node is not seen: it runs, is given None, and finds in `.grad` what this backward has added.

    Args:
        model: a model with LoRA, pyfast's or PEFT's after `accelerate`; adapters that are added later are not
            included.
        enabled: False lets torch accumulate again.

    Returns:
        The number of factors concerned.

    Raises:
        NoGradientError: the model has no LoRA linear.
    """
    # Of both kinds: LoraLinear, and PEFT's layers where `accelerate` serves them.
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GroupMember)]
    factors = [
        parameter
        for layer in layers
        for held in (layer.lora_A, layer.lora_B)
        for parameter in held.parameters()
    ]
    if not factors:
        raise NoGradientError(
            f"accumulate_in_kernels: {type(model).__name__} has no LoRA linear that pyfast serves. Fix: "
            "pyfast.apply(model, pyfast.LoraConfig(...)) first, or pyfast.accelerate(model) where PEFT's is "
            "there"
        )
    if enabled and not any(factor.is_cuda for factor in factors):
        warnings.warn(
            f"accumulate_in_kernels: the {len(factors)} factors of {type(model).__name__} are on "
            f"{factors[0].device}, where torch accumulates as ever; move the model to a GPU for it to have "
            "an effect",
            stacklevel=2,
        )
    for factor in factors:
        _accumulate.mark(factor, enabled)
    return len(factors)
