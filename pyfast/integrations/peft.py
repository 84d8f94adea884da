# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter format for models: read, written and copied over. Nothing here imports PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterMismatchError, AdapterStateError, EmbeddingNotSavedError
from pyfast.integrations.adapter_file import (
    TRAINING_NAME,
    check_finite,
    read_config,
    read_tensors,
    read_training,
    write_adapter,
)
from pyfast.integrations.base_weights import check_base, described
from pyfast.methods.apply import check_adapter_name, commit_plan, prepare
from pyfast.methods.base import METHODS, adapted_modules, refuse_meta, unwrapped
from pyfast.methods.of_peft import refuse_peft
from pyfast.methods.state import adapter_parameters, known_adapter
from pyfast.nn import SavedModule, Switchable, weight_of
from pyfast.nn.experts import projections


def adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """PEFT's file keys to tensors (detached, not copied) of one adapter.

    Raises:
        AdapterStateError: there is no such adapter, or adapters are PEFT's.
    """
    refuse_peft(model, "adapter_state_dict")
    model = unwrapped(model)
    method = METHODS[type(known_adapter(model, adapter_name))]
    with torch.no_grad():
        tensors = method.file_tensors(model, adapter_name)
    return {method.key_prefix + key: tensor.detach() for key, tensor in tensors.items()}


def save_adapter(model: nn.Module, directory: str | Path, adapter_name: str = "default") -> None:
    """Write one adapter in PEFT's format, which `peft` and `load_adapter` read.

    Files are written beside their final name and renamed, so an interrupted save leaves the old ones. What
    PEFT's file has no place for and training needs, P-tuning's network, goes into
    `adapter_training.safetensors`. Bottleneck adapters, which PEFT has not, are laid out as
    `pyfast.methods.bottleneck` says. The file says on which base weights the adapter was trained, dense or in
    NF4 of which settings, and has the same bytes each time. A warning names what of it PEFT does not serve:
    IA3's vectors of experts.

    Args:
        model: a model that carries the adapter.
        directory: created if missing.
        adapter_name: which adapter; the name is not part of the file.

    Raises:
        AdapterStateError: there is no such adapter, or adapters are PEFT's.
        EmbeddingNotSavedError: the vocabulary was resized and the embeddings are not in the adapter.
        NonFiniteError: the adapter holds NaN or infinity.
        UnsupportedError: it lies on the meta device.
    """
    refuse_peft(model, "save_adapter")
    model = unwrapped(model)
    if not adapted_modules(model):
        raise AdapterStateError(
            f"save_adapter: {type(model).__name__} has no adapter. Nothing was written. Fix: pyfast.apply "
            "one first, or for a model that is trained whole (SFTConfig) model.save_pretrained(directory)"
        )
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
    unread = method.unread_by_peft(model, adapter_name)
    if unread:
        warnings.warn(
            f"adapter {adapter_name!r} has {len(unread)} vectors of experts (first: {unread[0]!r}), which "
            "PEFT does not serve and leaves out without a word, so that its outputs differ from these; load "
            "the file with pyfast.load_adapter, or train without them (target_modules=['k_proj', 'v_proj'])",
            stacklevel=2,
        )
    tensors = _checked(adapter_name, adapter_state_dict(model, adapter_name))
    training = _checked(adapter_name, method.training_tensors(model, adapter_name))
    fields = method.fields(model, config, adapter_name)
    if fields["base_model_name_or_path"] is None:
        fields["base_model_name_or_path"] = getattr(
            getattr(model, "config", None), "_name_or_path", None
        )
    fields.update(peft_type=method.peft_type, auto_mapping=None, inference_mode=True)
    own = {name: fields.pop(name) for name in method.own_fields if name in fields}
    write_adapter(Path(directory), tensors, fields, own, described(model), training)


def _checked(adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a file takes them, all of whose values are finite."""
    refuse_meta("save_adapter", tensors.items())
    found = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    for key, tensor in found.items():
        check_finite(f"adapter {adapter_name!r}", key, tensor)
    return found


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
    config = read_config(directory, model)
    # The file's tensors say exactly what is adapted, so a name that matches nothing does no harm.
    plan, ours = prepare(model, config, adapter_name, True, True)
    refuse_meta("load_adapter", model.named_parameters())
    name, prefix = type(model).__name__, METHODS[type(ours)].key_prefix
    tensors, trained_on = read_tensors(
        directory, plan.shapes, _base_tensors(model), name, prefix, _without_adapters(model)
    )
    if trainable and plan.training:
        found = read_training(directory, plan.training, name)
        if found is None:
            warnings.warn(
                f"adapter {str(directory)!r} has no {TRAINING_NAME}, which save_adapter writes and PEFT does "
                f"not; {', '.join(plan.shapes)} will be trained as it stands",
                stacklevel=3,
            )
        tensors |= found or {}
    other = check_base(repr(str(directory)), trained_on, model)
    if other is not None:
        warnings.warn(other, stacklevel=3)
    commit_plan(model, adapter_name, plan, ours, tensors)
    for parameter in adapter_parameters(model, adapter_name).values():
        parameter.requires_grad_(trainable)


def _without_adapters(model: nn.Module) -> Callable[[str], str]:
    """What tells for a file's key the module of the model that it is of, with its class, where that has
    weights of its own but is none of those that adapters go to, as the routers of mixtures; else nothing."""
    modules = dict(model.named_modules())
    depth = 1 + max(path.count(".") for path in modules)

    def named(key: str) -> str:
        parts = key.split(".", depth)[:depth]
        paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        path = next((path for path in paths if path in modules), "")
        module = modules[path]
        served = weight_of(module) is not None or isinstance(module, (Switchable, nn.Embedding))
        bare = all(parameter is None for parameter in module._parameters.values())
        if not path or served or bare or projections(module):
            return ""
        return f"{path!r}, a {type(module).__name__}"

    return named


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
    """Copy tensors under the keys of an adapter's files over the adapter that a model carries.

    Raises:
        AdapterMismatchError: keys or shapes differ.
        NonFiniteError: a value is NaN or infinite.
    """
    expected = adapter_state_dict(model, adapter_name)
    method = METHODS[type(known_adapter(model, adapter_name))]
    training = method.training_tensors(unwrapped(model), adapter_name)
    if tensors.keys() == training.keys():
        expected = training
    wrong = sorted(expected.keys() ^ tensors.keys()) or [
        key for key, tensor in expected.items() if tensor.shape != tensors[key].shape
    ]
    if wrong:
        raise AdapterMismatchError(
            f"the tensors do not fit adapter {adapter_name!r} of {type(model).__name__}: {len(wrong)} "
            f"keys or shapes differ (first: {wrong[0]!r}). Nothing was changed"
        )
    for key, tensor in tensors.items():
        check_finite(f"adapter {adapter_name!r}", key, tensor)
    found = {key.removeprefix(method.key_prefix): tensor for key, tensor in tensors.items()}
    with torch.no_grad():
        method.fill(unwrapped(model), adapter_name, found)


def is_adapter_state(model: nn.Module, adapter_name: str, keys: Collection[str]) -> bool:
    """Whether keys are those of an adapter's files and not a model's."""
    method = METHODS[type(known_adapter(model, adapter_name))]
    if not keys:
        return False
    if method.key_prefix:
        return all(key.startswith(method.key_prefix) for key in keys)
    own = (method.file_tensors(model, adapter_name), method.training_tensors(model, adapter_name))
    return any(set(keys) == tensors.keys() for tensors in own)
