# SPDX-License-Identifier: Apache-2.0
"""Modules trained whole beside an adapter (`modules_to_save`)."""

from __future__ import annotations

from torch import nn

from pyfast.methods.base import Plan, replace_modules
from pyfast.nn import SavedModule


def plan_saved(model: nn.Module, paths: list[str], adapter_name: str) -> Plan:
    """Prepare trainable copies of the modules at these paths."""
    originals: dict[str, nn.Module] = {}
    for path in paths:
        module = model.get_submodule(path)
        originals[path] = module.original_module if isinstance(module, SavedModule) else module
    shapes = {
        f"{path}.{name}": tuple(parameter.shape)
        for path, module in originals.items()
        for name, parameter in module.named_parameters()
    }

    def commit() -> None:
        wrapped: dict[nn.Module, nn.Module] = {}
        for path in paths:
            module = model.get_submodule(path)
            if not isinstance(module, SavedModule):
                original = module
                module = wrapped[original] = SavedModule(original)
                module.train(original.training)
            module.add(adapter_name)
        replace_modules(model, wrapped.get)

    return Plan(shapes, commit, _broken_ties(model, originals))


def _broken_ties(model: nn.Module, originals: dict[str, nn.Module]) -> tuple[str, ...]:
    """A sentence for every module whose weight is shared with one that is not trained whole."""
    inside = {inner for original in originals.values() for inner in original.modules()}
    texts = []
    for path, original in originals.items():
        shared = set(original.parameters())
        others = [
            repr(other.removesuffix(".base_layer"))
            for other, module in model.named_modules()
            if module not in inside and not shared.isdisjoint(module.parameters(recurse=False))
        ]
        if others:
            names = " and ".join(others)
            texts.append(
                f"modules_to_save: {path!r} shares its weight with {names}, but the copy that is trained is "
                f"no longer tied: {names} will keep the frozen weight. Fix: add {names} to modules_to_save "
                "too, which trains a copy of its own"
            )
    return tuple(texts)
