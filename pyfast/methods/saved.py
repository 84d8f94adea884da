# SPDX-License-Identifier: Apache-2.0
"""Modules trained whole beside an adapter (`modules_to_save`)."""

from __future__ import annotations

from torch import nn

from pyfast.methods.base import Plan, replace_module
from pyfast.nn import SavedModule


def plan_saved(model: nn.Module, paths: list[str], adapter_name: str) -> Plan:
    """Prepare trainable copies of the modules at these paths."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        module = model.get_submodule(path)
        original = module.original_module if isinstance(module, SavedModule) else module
        for name, parameter in original.named_parameters():
            shapes[f"{path}.{name}"] = tuple(parameter.shape)

    def commit() -> None:
        for path in paths:
            module = model.get_submodule(path)
            if not isinstance(module, SavedModule):
                training = module.training
                module = SavedModule(module)
                module.train(training)
                replace_module(model, path, module)
            module.add(adapter_name)

    return Plan(shapes, commit)
