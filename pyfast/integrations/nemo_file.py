# SPDX-License-Identifier: Apache-2.0
"""Files of NeMo's LoRA adapters: the `.nemo` archives of release 1, read, and a directory of our own.

The directory has `nemo_lora.safetensors`, tensors under NeMo's keys for `load_state_dict`, and
`nemo_lora.json` with their `dim`, `alpha` and `dropout`.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyfast.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    ConfigError,
    UnsafeFileError,
    UnsupportedError,
)
from pyfast.integrations.nemo_lora import NemoLora

_TENSORS, _SETTINGS = "nemo_lora.safetensors", "nemo_lora.json"
_MAX_SETTINGS_BYTES = 1 << 20


def is_nemo(path: Path) -> bool:
    """Whether a path is that of a NeMo adapter."""
    return (path.suffix == ".nemo" and path.is_file()) or (path / _SETTINGS).is_file()


def write_nemo(directory: Path, adapter: NemoLora) -> None:
    """Write an adapter into a directory that is there."""
    settings = {"dim": adapter.dim, "alpha": adapter.alpha, "dropout": adapter.dropout}
    (directory / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(dict(adapter.tensors), directory / _TENSORS, metadata={"format": "pt"})


def read_nemo(path: Path) -> NemoLora:
    """The adapter in a directory of ours.

    Raises:
        ConfigError: settings are no numbers.
        AdapterNotFoundError: a file is missing.
        AdapterMismatchError: the tensors cannot be read.
    """
    try:
        settings = json.loads((path / _SETTINGS).read_text(encoding="utf-8"))
        tensors = load_file(path / _TENSORS)
    except FileNotFoundError as error:
        raise AdapterNotFoundError(f"'{error.filename or path / _TENSORS}' is missing") from error
    except ValueError as error:
        raise ConfigError(f"'{path / _SETTINGS}' is not JSON ({error})") from error
    except SafetensorError as error:
        raise AdapterMismatchError(f"'{path / _TENSORS}' is damaged ({error})") from error
    return _adapter(path / _SETTINGS, tensors, settings)


def _adapter(path: Path, tensors: dict[str, Tensor], settings: Any) -> NemoLora:
    values = settings if isinstance(settings, dict) else {}
    dim, alpha, dropout = (values.get(name) for name in ("dim", "alpha", "dropout"))
    numbers = all(
        isinstance(value, (int, float)) and not isinstance(value, bool)
        for value in (dim, alpha, dropout)
    )
    if not numbers or not isinstance(dim, int) or dim < 1:
        raise ConfigError(
            f"'{path}': dim={dim!r}, alpha={alpha!r}, dropout={dropout!r} must be numbers, dim a whole one"
        )
    return NemoLora(tensors, dim, values["alpha"], float(values["dropout"]))


def read_archive(path: Path, unpickled: Callable[[io.BytesIO], dict[str, Tensor]]) -> NemoLora:
    """The adapter in a `.nemo` archive of a model that was trained with LoRA.

    Args:
        path: of the archive.
        unpickled: reads the tensors of its weights, a Python pickle.

    Raises:
        UnsafeFileError: it is damaged.
        UnsupportedError: weights in several parts, or tied ones.
        ConfigError: its settings are not those of LoRA.
    """
    try:
        with tarfile.open(path) as archive:
            members = {Path(member.name).as_posix(): member for member in archive}
            parts = [name for name in members if name.endswith("model_weights.ckpt")]
            if parts != ["model_weights.ckpt"] or "model_config.yaml" not in members:
                raise UnsupportedError(
                    f"'{path}' must have model_weights.ckpt and model_config.yaml, but has "
                    f"{sorted(members)[:6]}; let NeMo put adapters in several parts together first (tensor "
                    "and pipeline size 1)"
                )
            config = _member(archive, members["model_config.yaml"], _MAX_SETTINGS_BYTES)
            weights = _member(archive, members["model_weights.ckpt"], None)
        settings = _lora_settings(path, yaml.safe_load(config))
    except (tarfile.TarError, EOFError, yaml.YAMLError) as error:
        raise UnsafeFileError(f"'{path}' is damaged ({type(error).__name__})") from error
    return _adapter(path, unpickled(io.BytesIO(weights)), settings)


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, limit: int | None) -> bytes:
    file = archive.extractfile(member)
    if file is None or (limit is not None and member.size > limit):
        raise UnsafeFileError(f"'{member.name}' is no file, or larger than {limit} bytes")
    return file.read()


def _lora_settings(path: Path, config: Any) -> dict[str, Any]:
    """`dim`, `alpha` and `dropout` of a release 1 model's config."""
    try:
        lora = config["peft"]["lora_tuning"]
        dim = lora["adapter_dim"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"'{path}': its model_config.yaml has no peft.lora_tuning.adapter_dim, so it is no LoRA adapter"
        ) from error
    if lora.get("weight_tying"):
        raise UnsupportedError(f"'{path}': weight_tying, one adapter for all layers, is not served")
    # NeMo drops the adapter's output ("post") unless told to drop its input, which is all that PEFT does.
    pre = lora.get("dropout_position", "post") == "pre"
    alpha = lora.get("alpha", dim)
    return {"dim": dim, "alpha": alpha, "dropout": lora.get("adapter_dropout", 0.0) if pre else 0.0}
