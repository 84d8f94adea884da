# SPDX-License-Identifier: Apache-2.0
"""How `adapter_config.json` describes an adapter of linear layers, so that PEFT and we find its places."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from pyfast.methods.base import adapted_modules, public_path
from pyfast.methods.targets import match_targets
from pyfast.nn import AdapterLayer, DenseWeight
from pyfast.nn.expert_lora import LoraExperts


def adapter_fields(
    model: nn.Module,
    config: Any,
    adapter_name: str,
    others: Mapping[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """A config's fields with targets that name exactly the layers that hold the adapter; `others` as in
    `match_targets`."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    found = layers_with(model, adapter_name).items()
    layers = {path: layer for path, layer in found if not isinstance(layer, LoraExperts)}
    fields["target_modules"] = target_names(model, list(layers), others) if layers else []
    fields["exclude_modules"] = None
    weights = ((layer.base_weight, layer.frozen) for layer in layers.values())
    fields["fan_in_fan_out"] = any(
        isinstance(weight, DenseWeight) and weight.tensor is not frozen.weight
        for weight, frozen in weights
    )
    return fields


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, AdapterLayer]:
    """Path to layer of the adapted linears that hold an adapter."""
    return {
        public_path(model, path): module
        for path, module in adapted_modules(model).items()
        if isinstance(module, AdapterLayer) and adapter_name in module.adapter_names()
    }


def target_names(
    model: nn.Module, paths: list[str], others: Mapping[str, nn.Module] | None = None
) -> list[str] | str:
    """Shortest form that selects exactly these modules: last parts, full paths, or a regular expression."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    for names in (short, sorted(paths)):
        if set(match_targets(model, names, others=others)) == set(paths):
            return names
    return pattern_of(paths)


def pattern_of(paths: Iterable[str]) -> str:
    """A regular expression for exactly these paths."""
    return "|".join(re.escape(path) for path in sorted(paths))
