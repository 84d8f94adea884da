# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter format for models: read, written and copied over. Nothing here imports PEFT."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterMismatchError, AdapterStateError, EmbeddingNotSavedError
from pyfast.integrations.adapter_file import (
    PREFIX,
    check_finite,
    read_config,
    read_tensors,
    write_adapter,
)
from pyfast.methods.apply import check_adapter_name, commit_plan, prepare
from pyfast.methods.base import METHODS, adapted_modules, refuse_meta, unwrapped
from pyfast.methods.state import adapter_parameters, known_adapter
from pyfast.methods.targets import match_targets
from pyfast.nn import AdapterLayer, DenseWeight, NF4Weight, SavedModule, weight_of


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """PEFT's file keys to tensors (detached, not copied) of one adapter.

    Raises:
        AdapterStateError: there is no such adapter.
    """
    return {
        PREFIX + key: parameter.detach()
        for key, parameter in adapter_parameters(model, adapter_name).items()
    }


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Write one adapter in PEFT's format, which `peft` and `load_adapter` read.

    Files are written beside their final name and renamed, so an interrupted save leaves the old ones.

    Args:
        model: a model that carries the adapter.
        directory: created if missing.
        adapter_name: which adapter; the name is not part of the file.

    Raises:
        AdapterStateError: there is no such adapter.
        EmbeddingNotSavedError: the vocabulary was resized and the embeddings are not in the adapter.
        NonFiniteError: the adapter holds NaN or infinity.
        UnsupportedError: it lies on the meta device.
    """
    model = unwrapped(model)
    config = known_adapter(model, adapter_name)
    method = METHODS[type(config)]
    check_adapter_name(adapter_name)
    for path, module in adapted_modules(model).items():
        if module.configs.get(adapter_name, config) != config:
            raise AdapterStateError(
                f"adapter {adapter_name!r} has another config at {path!r} than elsewhere, and one file holds "
                "one config; save the parts that it was applied to one by one. Nothing was written"
            )
    _check_vocabulary(model, adapter_name)
    state = adapter_state_dict(model, adapter_name)
    refuse_meta("save_adapter", state.items())
    tensors = {key: tensor.contiguous().cpu() for key, tensor in state.items()}
    for key, tensor in tensors.items():
        check_finite(f"adapter {adapter_name!r}", key, tensor)
    layers = {
        path: module
        for path, module in adapted_modules(model).items()
        if isinstance(module, AdapterLayer) and adapter_name in module.adapter_names()
    }
    fields = _config_fields(model, config, method.peft_type, layers)
    quantized = any(layer.quantized for layer in layers.values())
    write_adapter(Path(directory), tensors, fields, "nf4" if quantized else "dense")


def _config_fields(
    model: nn.Module, config: Any, peft_type: str | None, layers: Mapping[str, AdapterLayer]
) -> dict[str, Any]:
    fields: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    fields["target_modules"] = _target_names(model, list(layers))
    fields["exclude_modules"] = fields["layers_to_transform"] = fields["layers_pattern"] = None
    weights = [m.base_weight for m in layers.values()]
    fields["fan_in_fan_out"] = any(
        isinstance(w, DenseWeight) and w.tensor is not m.base_layer.weight
        for w, m in zip(weights, layers.values(), strict=True)
    )
    alpha = fields["lora_alpha"]
    fields["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
    if fields["base_model_name_or_path"] is None:
        fields["base_model_name_or_path"] = getattr(
            getattr(model, "config", None), "_name_or_path", None
        )
    fields.update(peft_type=peft_type, auto_mapping=None, inference_mode=True)
    return fields


def _target_names(model: nn.Module, paths: list[str]) -> list[str] | str:
    """Shortest form that selects exactly these modules: last parts, full paths, or a regular expression."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    for names in (short, sorted(paths)):
        if set(match_targets(model, names)) == set(paths):
            return names
    return "|".join(re.escape(path) for path in sorted(paths))


def _check_vocabulary(model: nn.Module, adapter_name: str) -> None:
    """Refuse to save where the embeddings have other rows than the model's files and are not saved."""
    source = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""))
    config_file = source / "config.json"
    if not source.name or not config_file.is_file():
        return
    before = json.loads(config_file.read_text()).get("vocab_size")
    paths = {module: path for path, module in model.named_modules()}
    lost, seen = [], set()
    for side in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, side, None)
        module = get() if callable(get) else None
        if module is None or (rows := module.weight.shape[0]) == before:
            continue
        tied = id(module.weight) in seen
        seen.add(id(module.weight))
        saved = isinstance(module, SavedModule) and adapter_name in module.adapter_names()
        if not (saved or tied):
            lost.append((paths.get(module, side).rpartition(".")[2], rows))
    if isinstance(before, int) and lost:
        names = [name for name, _ in lost]
        raise EmbeddingNotSavedError(
            f"the vocabulary was resized {before} -> {lost[0][1]}, but {' and '.join(names)} "
            f"{'are' if len(names) > 1 else 'is'} not part of adapter {adapter_name!r}; reloading would "
            f"give random rows. Nothing was written. Fix: modules_to_save={names} before training"
        )


def read_adapter(model: nn.Module, directory: Path, adapter_name: str, trainable: bool) -> None:
    """Add an adapter from PEFT's format to a model and make it the active one; see `load_adapter`."""
    config = read_config(directory)
    # The file's tensors say exactly what is adapted, so a name that matches nothing does no harm.
    plan, ours = prepare(model, config, adapter_name, True, True)
    refuse_meta("load_adapter", model.named_parameters())
    name = type(model).__name__
    tensors, base_weights = read_tensors(directory, plan.shapes, _base_tensors(model), name)
    if base_weights == "nf4" and not any(
        isinstance(weight_of(module), NF4Weight) for module in model.modules()
    ):
        warnings.warn(
            f"adapter {str(directory)!r} was trained on an NF4 base, but this {name} is dense; call "
            "pyfast.quantize(model) before load_adapter for the weights it was trained on",
            stacklevel=3,
        )
    commit_plan(model, adapter_name, plan, ours, tensors)
    for parameter in adapter_parameters(model, adapter_name).values():
        parameter.requires_grad_(trainable)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Embedding weights, of which PEFT puts copies into its files, under the keys it gives them."""
    tensors: dict[str, Tensor] = {}
    for side in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, side, None)
        module = get() if callable(get) else None
        for path, candidate in model.named_modules():
            if module is not None and candidate is module:
                tensors[f"{path}.weight"] = tensors[f"{path}.base_layer.weight"] = module.weight
    return tensors


def copy_adapter(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors under PEFT's file keys over the parameters of an adapter that a model carries.

    Raises:
        AdapterMismatchError: keys or shapes differ.
        NonFiniteError: a value is NaN or infinite.
    """
    parameters = adapter_parameters(model, adapter_name)
    found = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    wrong = sorted(parameters.keys() ^ found.keys()) or [
        key for key, parameter in parameters.items() if parameter.shape != found[key].shape
    ]
    if wrong:
        raise AdapterMismatchError(
            f"the tensors do not fit adapter {adapter_name!r} of {type(model).__name__}: {len(wrong)} "
            f"keys or shapes differ (first: {wrong[0]!r}). Nothing was changed"
        )
    for key, tensor in found.items():
        check_finite(f"adapter {adapter_name!r}", key, tensor)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(found[key])
