# SPDX-License-Identifier: Apache-2.0
"""The optimiser of a run: torch's AdamW, or one of bitsandbytes whose state is in 8 bits or paged."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

import pyfast
from pyfast.errors import ConfigError
from pyfast.train.config import FinetuneConfig

_CLASSES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}
# bitsandbytes' tables of 8-bit numbers, which are the same for all parameters.
_TABLES = ("qmap1", "qmap2")


def check_optimizer(config: FinetuneConfig, device: torch.device) -> None:
    """Refuse an optimiser that cannot run here, before anything is loaded.

    Raises:
        ConfigError: bitsandbytes is not installed, or cannot page on this device.
    """
    name = config.optimizer.name
    if name not in _CLASSES:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer.name is {name!r}, which is one of bitsandbytes, and that is not installed. "
            "Fix: pip install bitsandbytes, or --optimizer.name adamw"
        )
    if name.startswith("paged_") and device.type != "cuda":
        fix = "adamw_8bit" if name.endswith("8bit") else "adamw"
        raise ConfigError(
            f"optimizer.name is {name!r}, which moves its state between the memory of a GPU and the host's, "
            f"but the run is on {device.type}. Fix: --optimizer.name {fix}"
        )


def make_optimizer(
    config: FinetuneConfig, model: nn.Module, parameters: dict[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimiser; each of its groups has its rate, as a multiple of the run's, in "ratio"."""
    options, peak = config.optimizer, config.peak_lr
    groups = _groups(config, model, parameters)
    for group in groups:
        group["ratio"] = group.get("lr", peak) / peak
    settings: dict[str, Any] = {"lr": peak, "betas": options.betas, "eps": options.eps}
    if options.name not in _CLASSES:
        return torch.optim.AdamW(groups, **settings)
    import bitsandbytes

    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, _CLASSES[options.name])(
        groups, **settings
    )
    trained = set(parameters.values())
    for module in model.modules():
        # As transformers' Trainer does: the rare rows of embeddings need more than 8 bits.
        if isinstance(module, nn.Embedding) and module.weight in trained:
            made.mng.register_module_override(module, "weight", {"optim_bits": 32})  # type: ignore[attr-defined]
    return made


def _groups(
    config: FinetuneConfig, model: nn.Module, parameters: dict[str, nn.Parameter]
) -> list[dict[str, Any]]:
    options = config.optimizer
    if options.loraplus_lr_ratio is not None:
        return pyfast.loraplus_groups(
            model,
            lr=config.peak_lr,
            loraplus_lr_ratio=options.loraplus_lr_ratio,
            weight_decay=options.weight_decay,
        )
    named = parameters.items()
    # IA3's vectors have a second dimension of one; they start at one and must not shrink.
    vectors = [p for name, p in named if p.ndim < 2 or ".ia3_l." in name]
    matrices = [p for name, p in named if p.ndim >= 2 and ".ia3_l." not in name]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def state_tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What a checkpoint keeps of a parameter's state."""
    state = optimizer.state[parameter].items()
    return {key: torch.as_tensor(value) for key, value in state if key not in _TABLES}


def state_shapes(
    optimizer: torch.optim.Optimizer,
) -> dict[nn.Parameter, dict[str, torch.Size]]:
    """Keys and shapes of `state_tensors` after a step."""
    if isinstance(optimizer, torch.optim.AdamW):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        scalar = torch.Size()
        return {p: {"step": scalar, "exp_avg": p.shape, "exp_avg_sq": p.shape} for p in parameters}
    made: Any = optimizer  # of bitsandbytes, which makes states of zeros
    made.check_overrides()
    shapes = {}
    for index, group in enumerate(made.param_groups):
        for place, parameter in enumerate(group["params"]):
            made.init_state(group, parameter, index, place)
            found = state_tensors(made, parameter).items()
            shapes[parameter] = {key: tensor.shape for key, tensor in found}
    return shapes


def set_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, tensors: dict[str, Tensor]
) -> None:
    """Put back what `state_tensors` gave."""
    state = optimizer.state[parameter]
    for key, tensor in tensors.items():
        if isinstance(optimizer, torch.optim.AdamW):
            # It counts its steps on the CPU.
            state[key] = tensor if key == "step" else tensor.to(parameter.device)
        elif isinstance(state[key], Tensor):
            state[key].copy_(tensor)  # where paged memory is, it stays
        else:
            state[key] = int(tensor)
