# SPDX-License-Identifier: Apache-2.0
"""Model families as tables: which module plays which role.

Adding a family is one file with one `Family` and its line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from pyfast.errors import TargetModuleError
from pyfast.families.automatic import automatic
from pyfast.families.base import Family, FusedLayout, Layer, Role
from pyfast.families.falcon import FALCON
from pyfast.families.gemma import GEMMA, GEMMA2, GEMMA3
from pyfast.families.glm import GLM, GLM4
from pyfast.families.gpt2 import GPT2
from pyfast.families.gpt_neox import GPT_NEOX, GPTJ
from pyfast.families.llama import LLAMA
from pyfast.families.mistral import MISTRAL, MIXTRAL
from pyfast.families.nemotron import NEMOTRON
from pyfast.families.olmo2 import OLMO2
from pyfast.families.phi3 import PHI3
from pyfast.families.qwen import QWEN2, QWEN3
from pyfast.families.recurrent_gemma import RECURRENT_GEMMA
from pyfast.families.starcoder import STARCODER, STARCODER2
from pyfast.families.t5 import T5

FAMILIES: tuple[Family, ...] = (
    GPT2,
    GPT_NEOX,
    GPTJ,
    NEMOTRON,
    LLAMA,
    GLM,
    FALCON,
    STARCODER,
    STARCODER2,
    MISTRAL,
    MIXTRAL,
    GEMMA,
    GEMMA2,
    RECURRENT_GEMMA,
    T5,
    QWEN2,
    QWEN3,
    GEMMA3,
    GLM4,
    PHI3,
    OLMO2,
)


def family_of(model_type: str | None) -> Family | None:
    """The family of a transformers `config.model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """Every transformer layer of every part of a model that is of a known family; where there is none, those
    that `automatic` makes a table for."""
    known = False
    for path, part in model.named_modules():
        config = getattr(part, "config", None)
        family = family_of(getattr(config, "model_type", None))
        if family is None:
            continue
        for name in dict.fromkeys(layers.rpartition(".")[2] for layers in family.layers):
            for index, layer in getattr(part._modules.get(name), "_modules", {}).items():
                known = True
                yield Layer(f"{path}.{name}.{index}".lstrip("."), layer, family, config)
    if known:
        return
    try:
        family = automatic(model)
    except TargetModuleError:
        return
    for path in family.layers:
        for index, layer in model.get_submodule(path).named_children():
            yield Layer(f"{path}.{index}", layer, family, getattr(model, "config", None))


def shared_inputs(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Name to module of the modules that read one input, set by set, in every layer of a model."""
    for layer in layers_of(model):
        modules = dict(layer.module.named_modules(remove_duplicate=False))
        for paths in layer.family.shared_inputs():
            yield {p.rpartition(".")[2]: modules[p] for p in paths if p in modules}


__all__ = [
    "FAMILIES",
    "Family",
    "FusedLayout",
    "Layer",
    "Role",
    "automatic",
    "family_of",
    "layers_of",
    "shared_inputs",
]
