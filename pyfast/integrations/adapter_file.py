# SPDX-License-Identifier: Apache-2.0
"""An adapter directory in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A directory is untrusted: sizes, JSON, types, keys, shapes and dtypes are checked before tensors are read,
and their values before anything else sees them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyfast.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    ConfigError,
    NonFiniteError,
    UnsafeFileError,
)
from pyfast.methods.apply import config_from_fields
from pyfast.methods.base import METHODS

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
TRAINING_NAME = "adapter_training.safetensors"
"""Ours: what some methods need for training to go on, and PEFT's file has no place for."""
# Our files carry these metadata entries, which PEFT ignores (it warns of unknown fields in the config);
# files without a digest are read unchecked.
_DIGEST = "pyfast_sha256"
_CONFIG_DIGEST = "pyfast_config_sha256"
# Fields that may be edited: they do not bear on the computation, or the tensors' keys show the same.
_FREE = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
)
_BASE = "pyfast_base_weights"
_PARTNER = "pyfast_adapter_sha256"
_FIELDS = "pyfast_config"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_TENSORS = 1_000_000
_FLOATS = ("F64", "F32", "F16", "BF16")


def write_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    fields: dict[str, Any],
    own: dict[str, Any],
    base_weights: str | None,
    training: Mapping[str, Tensor],
) -> None:
    """Write all files beside their final names and rename them: an interrupted save leaves the old ones,
    or some whose digests say that they do not belong together.

    Args:
        directory: created if missing.
        tensors: file keys to tensors.
        fields: the config, without `own`: what PEFT does not know of it.
        base_weights: on which weights the adapter was trained, see `base_weights`; None if not known.
        training: keys to tensors of the file of what only training needs; empty for no such file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    weights, settings = directory / WEIGHTS_NAME, directory / CONFIG_NAME
    extra = directory / TRAINING_NAME
    # Names that no other save has and nobody can foresee, to put a link there that is written through.
    unique = f".{uuid.uuid4().hex}.tmp"
    new_weights, new_settings, new_extra = (
        path.with_suffix(unique) for path in (weights, settings, extra)
    )
    text = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    metadata = {
        "format": "pt",
        _DIGEST: _digest(tensors),
        _CONFIG_DIGEST: _config_digest(json.loads(text) | own),
    }
    metadata |= {} if base_weights is None else {_BASE: base_weights}
    metadata |= {_FIELDS: json.dumps(own)} if own else {}
    try:
        with new_settings.open("x") as file:
            file.write(text)
        _save(tensors, new_weights, metadata)
        # safetensors makes files that only their owner can read.
        new_weights.chmod(new_settings.stat().st_mode)
        if training:
            partner = {"format": "pt", _DIGEST: _digest(training), _PARTNER: _digest(tensors)}
            _save(training, new_extra, partner)
            new_extra.chmod(new_settings.stat().st_mode)
            new_extra.replace(extra)
        new_weights.replace(weights)
        new_settings.replace(settings)
        if not training:
            extra.unlink(missing_ok=True)
    finally:
        for path in (new_weights, new_settings, new_extra):
            path.unlink(missing_ok=True)


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, the same bytes for the same contents: the library has the metadata in an
    order that it draws each time."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))} | header
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # never over the tensors behind it
            file.seek(8)
            file.write(text.ljust(size))


def _config_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 over the config's fields without those that may be edited, and without unset ones."""
    kept = {k: value for k, value in values.items() if k not in _FREE and value}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes in the order of names."""
    total = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        total.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode("utf-8", "replace"))
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_config(directory: Path, model: nn.Module) -> Any:
    """Our config from an `adapter_config.json` for a model.

    Raises:
        ConfigError: not a JSON object, or a field has the wrong type.
        UnsupportedError: a setting that is not served.
        AdapterNotFoundError: there is none.
    """
    path = directory / CONFIG_NAME
    values = read_fields(path)
    kind = values.get("peft_type")
    for method in METHODS.values():
        if method.peft_type is not None and method.peft_type == kind:
            own = _own_fields(directory)
            values = {name: own[name] for name in method.own_fields if name in own} | values
            _check_types(path, method.config_type, values)
            return config_from_fields(method, values, model)
    served = sorted(m.peft_type for m in METHODS.values() if m.peft_type)
    raise ConfigError(f"{path}: peft_type {kind!r} is not served; use one of {served}")


def _own_fields(directory: Path) -> dict[str, Any]:
    """The config's fields in the metadata of the tensors' file; none where it cannot be read, which reading
    the tensors will say."""
    try:
        with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get(_FIELDS, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a config file; errors as `read_config`'s."""
    _require(path)
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
    return values


def _require(path: Path) -> None:
    """Raise AdapterNotFoundError unless the file is there."""
    if not path.parent.is_dir():
        raise AdapterNotFoundError(
            f"there is no adapter directory {str(path.parent)!r}; pass the folder that save_adapter or PEFT "
            "wrote, or fetch one first with huggingface_hub.snapshot_download. Nothing was changed"
        )
    if not path.is_file():
        raise AdapterNotFoundError(
            f"{path} is missing; pass a folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}, as "
            "save_adapter and PEFT write them. Nothing was changed"
        )


def _check_types(path: Path, config_type: type[Any], values: dict[str, Any]) -> None:
    """Check JSON values against the annotations of the config's fields; null means the default."""
    for field in dataclasses.fields(config_type):
        value = values.get(field.name)
        if value is None:
            values.pop(field.name, None)
        elif not any(_fits(value, kind.strip()) for kind in str(field.type).split("|")):
            raise ConfigError(f"{path}: {field.name}={value!r} is not of type {field.type}")


def _fits(value: Any, kind: str) -> bool:
    """Whether a JSON value is of one of the few annotations that configs use."""
    inner = kind[kind.find("[") + 1 : -1]
    if kind.startswith("list["):
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if kind.startswith("dict["):
        _, _, inner = inner.partition(", ")
        return isinstance(value, dict) and all(_fits(item, inner) for item in value.values())
    if kind == "float":
        return type(value) in (int, float)
    return type(value).__name__ == kind


def read_tensors(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    base: Mapping[str, Tensor],
    model: str,
    prefix: str,
    unserved: Callable[[str], str] = lambda key: "",
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of an adapter file, keys without the prefix, and on which weights it was trained where the
    file says so.

    Args:
        directory: holds the file.
        shapes: the keys and shapes that the model needs.
        base: the model's own tensors; copies of them in the file are accepted and left out.
        model: its name for messages.
        prefix: what the keys in the file start with.
        unserved: which of the model's modules a key without the prefix is of, if none of our adapters serves
            it; else empty.

    Raises:
        AdapterMismatchError: damaged, or keys, shapes or dtypes are not those needed.
        NonFiniteError: NaN or infinity.
        UnsafeFileError: only a pickle is there, or there are too many tensors.
        AdapterNotFoundError: there is no file.
    """
    path = directory / WEIGHTS_NAME
    if not path.is_file() and (directory / "adapter_model.bin").is_file():
        raise UnsafeFileError(
            f"'{directory / 'adapter_model.bin'}' is a Python pickle and can run code when read; "
            "pyfast does not open it. Fix, on a machine you trust: pyfast convert"
        )
    _require(path)
    where = f"adapter {str(directory)!r} does not fit {model}"
    expected = {prefix + key: shape for key, shape in shapes.items()}
    copies = {prefix + key: tuple(tensor.shape) for key, tensor in base.items()}

    def foreign(key: str) -> str:
        return unserved(key.removeprefix(prefix))

    tensors, metadata = _read_file(path, expected, copies, where, foreign)
    digest = metadata.get(_CONFIG_DIGEST)
    fields = read_fields(directory / CONFIG_NAME) if digest is not None else {}
    if digest is not None and digest != _config_digest(_own_fields(directory) | fields):
        raise AdapterMismatchError(
            f"{path} was not saved with the {CONFIG_NAME} beside it: a save was interrupted, or the config "
            "was edited. The adapter was NOT applied. Fix: fetch or save it again"
        )
    needed = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    for key, tensor in needed.items():
        if key not in shapes and not torch.equal(tensor.to(base[key].dtype), base[key].cpu()):
            raise AdapterMismatchError(
                f"{where}: it carries {key}, a weight of the base model with other values. "
                "The adapter was NOT applied. Fix: load it into the model it was trained on"
            )
        check_finite(f"adapter {str(directory)!r}", key, tensor)
    return {key: needed[key] for key in shapes}, metadata.get(_BASE)


def read_training(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], model: str
) -> dict[str, Tensor] | None:
    """The tensors of the file of what only training needs; None where there is none.

    Raises:
        AdapterMismatchError, NonFiniteError, UnsafeFileError: as `read_tensors`; or the file belongs to other
            tensors than those beside it.
    """
    path = directory / TRAINING_NAME
    if not path.is_file():
        return None
    where = f"{TRAINING_NAME} of adapter {str(directory)!r} does not fit {model}"
    tensors, metadata = _read_file(path, shapes, {}, where)
    with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
        partner = (file.metadata() or {}).get(_DIGEST)
    if metadata.get(_PARTNER) != partner:
        raise AdapterMismatchError(
            f"{path} was not saved with the {WEIGHTS_NAME} beside it: a save was interrupted, or one of them "
            "was replaced. The adapter was NOT applied. Fix: delete it, or fetch or save the adapter again"
        )
    for key, tensor in tensors.items():
        check_finite(f"adapter {str(directory)!r}", key, tensor)
    return tensors


def _read_file(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    copies: Mapping[str, tuple[int, ...]],
    where: str,
    foreign: Callable[[str], str] = lambda key: "",
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file, which has the expected keys and shapes and may have the copies', and its
    metadata; its checksum is right if it has one."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if len(keys) > _MAX_TENSORS:
                raise UnsafeFileError(f"{path} holds {len(keys)} tensors; not an adapter")
            _check_header(file, keys, expected, copies, where, foreign)
            tensors = {key: file.get_tensor(key) for key in keys}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise AdapterMismatchError(f"{path} is damaged: {error}. Nothing was changed") from None
    if _DIGEST in metadata and metadata[_DIGEST] != _digest(tensors):
        raise AdapterMismatchError(
            f"{path} is damaged: its tensors do not have the checksum in its header. "
            "The adapter was NOT applied. Fix: fetch or save it again"
        )
    return tensors, metadata


def _check_header(
    file: Any,
    keys: list[str],
    expected: Mapping[str, tuple[int, ...]],
    copies: Mapping[str, tuple[int, ...]],
    where: str,
    foreign: Callable[[str], str],
) -> None:
    """Compare keys, shapes and dtypes before a byte of data is read."""
    missing = sorted(expected.keys() - set(keys))
    extra = sorted(set(keys) - expected.keys() - copies.keys())
    modules = [] if missing else _all_foreign(extra, foreign)
    if modules:
        raise AdapterMismatchError(
            f"{where}: {len(extra)} of its {len(keys)} tensors are of {len(modules)} modules that pyfast has "
            f"no adapters for (first: {modules[0]}). The adapter was NOT applied. Fix: train it without "
            "them, with the layers named in target_modules and target_parameters in the place of 'all-linear'"
        )
    if missing or extra:
        parts = [
            f"{len(names)} {what} (first: {names[0]!r})"
            for what, names in (("tensors missing", missing), ("unexpected", extra))
            if names
        ]
        raise AdapterMismatchError(
            f"{where}: of {len(expected)} tensors expected, {', '.join(parts)}. "
            "The adapter was NOT applied. Fix: load it into the model it was trained on"
        )
    for key in keys:
        view = file.get_slice(key)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        wanted = expected.get(key) or copies[key]
        if shape != wanted:
            raise AdapterMismatchError(
                f"{where}: {key} has shape {list(shape)}, {list(wanted)} is needed. "
                "The adapter was NOT applied"
            )
        if dtype not in _FLOATS:
            raise AdapterMismatchError(
                f"{where}: {key} is {dtype}, not one of {', '.join(_FLOATS)}. "
                "The adapter was NOT applied"
            )


def _all_foreign(keys: list[str], foreign: Callable[[str], str]) -> list[str]:
    """The modules that keys are of, where `foreign` knows all of them; else none."""
    found = list(dict.fromkeys(foreign(key) for key in keys))
    return found if all(found) else []


def check_finite(what: str, key: str, tensor: Tensor) -> None:
    """Raise NonFiniteError for NaN, infinity, and float64 values that float32 cannot hold."""
    bad = int((~torch.isfinite(tensor.float())).sum())
    if bad:
        raise NonFiniteError(
            f"{what} has {bad} NaN or infinite values in {key}. Nothing was changed"
        )
