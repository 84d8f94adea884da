# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation by the kernels that make the gradients."""

from __future__ import annotations

from torch import nn

from pyfast.errors import NoGradientError
from pyfast.methods.lora import LoraLinear
from pyfast.ops import _accumulate


def accumulate_in_kernels(model: nn.Module, enabled: bool = True) -> int:
    """Let the CUDA kernels of LoRA linears add to the factors' `.grad` themselves; off unless asked for.

    `backward()` then costs a launch and a read less for each factor from the second micro-batch on, less host
    time in all, and in half types mostly rounds once where torch's accumulation rounds twice. torch
    accumulates as ever for a factor with hooks, beside other processes (DDP, FSDP), under `torch.compile` and
    `torch.autograd.grad`, on other devices, and for DoRA's magnitudes.

    Args:
        model: a model with LoRA; adapters that are added later are not included.
        enabled: False lets torch accumulate again.

    Returns:
        The number of factors concerned.

    Raises:
        NoGradientError: the model has no LoRA linear.
    """
    factors = [
        parameter
        for layer in model.modules()
        if isinstance(layer, LoraLinear)
        for held in (layer.lora_A, layer.lora_B)
        for parameter in held.parameters()
    ]
    if not factors:
        raise NoGradientError(
            f"accumulate_in_kernels: {type(model).__name__} has no LoRA linear. Fix: pyfast.apply(model, "
            "pyfast.LoraConfig(...)) first"
        )
    for factor in factors:
        _accumulate.mark(factor, enabled)
    return len(factors)
