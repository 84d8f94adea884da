# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter files: `adapter_config.json` and `adapter_model.safetensors`, read and written.

Nothing here imports PEFT. A file is untrusted: its size, JSON, keys, shapes, dtypes and values are
checked before the model changes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyfast.errors import (
    AdapterMismatchError,
    ConfigError,
    EmbeddingNotSavedError,
    NonFiniteError,
    UnsafeFileError,
)
from pyfast.methods.apply import (
    adapter_parameters,
    check_adapter_name,
    commit_plan,
    config_from_fields,
    known_adapter,
    prepare,
)
from pyfast.methods.base import METHODS, adapted_modules
from pyfast.methods.targets import match_targets
from pyfast.nn import AdapterLayer, DenseWeight, SavedModule

PREFIX = "base_model.model."
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_TENSORS = 1_000_000


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
    """
    config = known_adapter(model, adapter_name)
    method = METHODS[type(config)]
    if method.peft_type is None:
        raise ConfigError(
            f"{method.name} has no adapter to save; use model.save_pretrained for the whole model"
        )
    check_adapter_name(adapter_name)
    _check_vocabulary(model, adapter_name)
    tensors = {k: v.contiguous().cpu() for k, v in adapter_state_dict(model, adapter_name).items()}
    for key, tensor in tensors.items():
        _check_finite(f"adapter {adapter_name!r}", key, tensor)
    fields = _config_fields(model, config, method.peft_type, adapter_name)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights, settings = directory / WEIGHTS_NAME, directory / CONFIG_NAME
    save_file(tensors, weights.with_suffix(".tmp"), metadata={"format": "pt"})
    settings.with_suffix(".tmp").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    weights.with_suffix(".tmp").replace(weights)
    settings.with_suffix(".tmp").replace(settings)


def _config_fields(
    model: nn.Module, config: Any, peft_type: str, adapter_name: str
) -> dict[str, Any]:
    fields: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    layers = {
        path: module
        for path, module in adapted_modules(model).items()
        if isinstance(module, AdapterLayer) and adapter_name in module.adapter_names()
    }
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


def _target_names(model: nn.Module, paths: list[str]) -> list[str]:
    """Shortest names that select exactly these modules: last parts if unambiguous, else full paths."""
    short = sorted({path.rpartition(".")[2] for path in paths})
    if set(match_targets(model, short)) == set(paths):
        return short
    return sorted(paths)


def _check_vocabulary(model: nn.Module, adapter_name: str) -> None:
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    source = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""))
    config_file = source / "config.json"
    if embedding is None or not source.name or not config_file.is_file():
        return
    before = json.loads(config_file.read_text()).get("vocab_size")
    rows = embedding.weight.shape[0]
    if not isinstance(before, int) or before == rows:
        return
    if isinstance(embedding, SavedModule) and adapter_name in embedding.adapter_names():
        return
    raise EmbeddingNotSavedError(
        f"the vocabulary was resized {before} -> {rows}, but the embeddings are not part of adapter "
        f"{adapter_name!r}; reloading would give random rows. Nothing was written. Fix: "
        "modules_to_save with the embedding's (and output layer's) name before training"
    )


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    adapter_name: str = "default",
    trainable: bool = False,
) -> nn.Module:
    """Add an adapter from PEFT's format to a model, in place, and make it the active one.

    Args:
        model: the base model, or one with other adapters.
        directory: holds `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: name in this model.
        trainable: whether its parameters require gradients.

    Returns:
        The same model.

    Raises:
        AdapterMismatchError: tensors are missing, unexpected, of the wrong shape or dtype.
        NonFiniteError: a value is NaN or infinite.
        UnsafeFileError: only a pickle is there, or the file is oversized.
        UnsupportedError: the config sets something that is not served.
        FileNotFoundError: a file is missing.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors = _read_tensors(directory)
    plan, ours = prepare(model, config, adapter_name, False, True)
    _check_fit(tensors, dict(plan.shapes), directory, type(model).__name__)
    for key, tensor in tensors.items():
        _check_finite(f"adapter {str(directory)!r}", key, tensor)
    commit_plan(model, ours, adapter_name, plan, ours)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, adapter_name).items():
            parameter.copy_(tensors[PREFIX + key])
            parameter.requires_grad_(trainable)
    from pyfast.integrations.transformers import adopt

    adopt(model)
    return model


def read_config(directory: Path) -> Any:
    """Our config from an `adapter_config.json`.

    Raises:
        ConfigError: not a JSON object, or a field has the wrong type.
        UnsupportedError: a method or setting that is not served.
    """
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; a PEFT adapter directory holds it")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise UnsafeFileError(
            f"{path} is larger than {_MAX_CONFIG_BYTES} bytes; not an adapter config"
        )
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({type(error).__name__}: {error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a JSON object")
    kind = values.get("peft_type")
    for method in METHODS.values():
        if method.peft_type is not None and method.peft_type == kind:
            _check_types(path, method.config_type, values)
            return config_from_fields(method, values)
    served = sorted(m.peft_type for m in METHODS.values() if m.peft_type)
    raise ConfigError(f"{path}: peft_type {kind!r} is not served; use one of {served}")


def _check_types(path: Path, config_type: type[Any], values: dict[str, Any]) -> None:
    """Compare JSON values with the types of the dataclass's default and a few known forms."""
    names = ("target_modules", "exclude_modules", "layers_pattern")
    for field in dataclasses.fields(config_type):
        value = values.get(field.name)
        if value is None:
            values.pop(field.name, None)
            continue
        kind = str(field.type)
        ok = True
        if field.name in (*names, "modules_to_save"):
            ok = isinstance(value, list) and all(isinstance(item, str) for item in value)
            ok = ok or (field.name in names and isinstance(value, str))
        elif kind.startswith("dict"):
            ok = isinstance(value, dict) and all(
                isinstance(number, (int, float)) for number in value.values()
            )
        elif kind == "int":
            ok = type(value) is int
        elif kind == "float":
            ok = type(value) in (int, float)
        elif kind == "bool":
            ok = type(value) is bool
        elif kind.startswith("list[int]"):
            ok = isinstance(value, int) or (
                isinstance(value, list) and all(type(item) is int for item in value)
            )
        elif kind.startswith("str"):
            ok = isinstance(value, str)
        if not ok:
            raise ConfigError(f"{path}: {field.name}={value!r} is not of type {kind}")


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        if (directory / "adapter_model.bin").is_file():
            raise UnsafeFileError(
                f"'{directory / 'adapter_model.bin'}' is a Python pickle and can run code when read; "
                "pyfast does not open it. Fix, on a machine you trust: pyfast convert"
            )
        raise FileNotFoundError(f"{path} is missing; a PEFT adapter directory holds it")
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > _MAX_TENSORS:
                raise UnsafeFileError(f"{path} holds {len(keys)} tensors; not an adapter")
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise AdapterMismatchError(f"{path} is damaged: {error}. Nothing was changed") from None


def _check_fit(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], directory: Path, model: str
) -> None:
    expected = {PREFIX + key: shape for key, shape in shapes.items()}
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    where = f"adapter {str(directory)!r} does not fit {model}"
    if missing or extra:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]!r})"
            for what, keys in (("tensors missing", missing), ("unexpected", extra))
            if keys
        ]
        raise AdapterMismatchError(
            f"{where}: of {len(expected)} tensors expected, {', '.join(parts)}. "
            "The adapter was NOT applied. Fix: load it into the model it was trained on"
        )
    for key, tensor in tensors.items():
        if tuple(tensor.shape) != expected[key]:
            raise AdapterMismatchError(
                f"{where}: {key} has shape {list(tensor.shape)}, {list(expected[key])} is needed. "
                "The adapter was NOT applied"
            )
        if not tensor.is_floating_point():
            raise AdapterMismatchError(
                f"{where}: {key} is {tensor.dtype}, not a floating-point type. "
                "The adapter was NOT applied"
            )


def _check_finite(what: str, key: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise NonFiniteError(
            f"{what} has {bad} NaN or infinite values in {key}. Nothing was changed"
        )
