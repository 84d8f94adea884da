# SPDX-License-Identifier: Apache-2.0
"""Model families as tables: which module plays which role.

Adding a family is one file with one `Family` and its line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pyfast.families.base import Family, Role
from pyfast.families.gpt2 import GPT2
from pyfast.families.llama import LLAMA

FAMILIES: tuple[Family, ...] = (LLAMA, GPT2)


def family_of(model_type: str | None) -> Family | None:
    """The family of a transformers `config.model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def shared_inputs(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Name to module of the modules that read one input, set by set, in every part of a model that is of a
    known family."""
    for part in model.modules():
        family = family_of(getattr(getattr(part, "config", None), "model_type", None))
        layers = part._modules.get(family.layers.rpartition(".")[2]) if family else None
        if family is None or layers is None:
            continue
        for layer in layers.children():
            modules = dict(layer.named_modules(remove_duplicate=False))
            for paths in family.shared_inputs():
                yield {p.rpartition(".")[2]: modules[p] for p in paths if p in modules}


__all__ = ["FAMILIES", "Family", "Role", "family_of", "shared_inputs"]
