# SPDX-License-Identifier: Apache-2.0
"""Applying a method to a model: all checks first, then one change that is made whole or not at all."""

from __future__ import annotations

import dataclasses
import string
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterStateError, UnsupportedError
from pyfast.families import shared_inputs
from pyfast.methods.base import METHODS, Method, Plan, adopt, unwrapped
from pyfast.methods.residual import refuse_residual
from pyfast.methods.state import (
    activate,
    adapter_configs,
    refuse_busy,
    register,
    take_off,
)
from pyfast.nn.group import form_groups
from pyfast.nn.per_sample import BASE

_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_-")


def check_adapter_name(name: str) -> None:
    """Raise AdapterStateError unless the name is safe as a module key and as a file name."""
    if (
        not isinstance(name, str)
        or not 1 <= len(name) <= 64
        or not _NAME_CHARACTERS.issuperset(name)
    ):
        raise AdapterStateError(f"adapter name {name!r} must match [A-Za-z0-9_-]{{1,64}}")
    if name == BASE:
        raise AdapterStateError(
            f"adapter name {name!r} stands for no adapter in adapters_per_sample; choose another"
        )
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        raise AdapterStateError(
            f"adapter name {name!r} is taken by an attribute of torch's modules; choose another"
        )


def coerce_config(config: Any, model: nn.Module) -> tuple[Method, Any]:
    """The method and our config for ours, PEFT's, or any config object with a `peft_type`, which may leave to
    the model what its fields mean.

    Raises:
        UnsupportedError: no method serves it, or a field that we do not serve is set.
    """
    method = METHODS.get(type(config))
    if method is not None:
        return method, config
    kind = getattr(config, "peft_type", None)
    kind = getattr(kind, "value", kind)
    for method in METHODS.values():
        if kind is not None and method.peft_type == kind:
            values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            return method, config_from_fields(method, values, model)
    served = sorted(t.__name__ for t in METHODS)
    raise UnsupportedError(
        f"{type(config).__name__} (peft_type {kind!r}) is not served; use one of {served}"
    )


# Fields of PEFT's configs that say nothing about the computation, or only with another field set.
_INERT = frozenset(
    [
        "peft_type",
        "auto_mapping",
        "peft_version",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    ]
)


def config_from_fields(method: Method, values: dict[str, Any], model: nn.Module) -> Any:
    """Build a method's config from PEFT's fields; refuse set fields that we do not serve."""
    known = {f.name for f in dataclasses.fields(method.config_type)}
    extra = {
        name: value
        for name, value in values.items()
        if name not in known and name not in _INERT and value
    }
    if extra:
        name, value = next(iter(sorted(extra.items())))
        raise UnsupportedError(
            f"{method.name}: {name}={value!r} is not served ({len(extra)} such fields: "
            f"{', '.join(sorted(extra))}). Nothing was changed"
        )
    used = {name: value for name, value in values.items() if name in known}
    for name, value in used.items():
        if isinstance(value, (set, tuple)):
            used[name] = sorted(value)
        elif isinstance(value, Enum):
            used[name] = str(value.value)
    return method.config_type(**method.completed(used, model))


def apply(
    model: nn.Module,
    config: Any,
    *,
    adapter_name: str = "default",
    allow_unmatched: bool = False,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Apply a fine-tuning method to a model, in place, and return the same model.

    Adapter methods freeze the base and add trainable parameters; a second call with another name adds
    another adapter and makes it the active one. A transformers model afterwards saves its adapters,
    not its base, in `save_pretrained`, and so in `Trainer`'s checkpoints. A warning names the modules
    whose tie `modules_to_save` breaks.

    Args:
        model: any module tree; for defaults, a transformers model of a known family.
        config: the config of a method, or PEFT's config object for it.
        adapter_name: letters, digits, `_` and `-`.
        allow_unmatched: let single names in `target_modules` match nothing.
        autocast_adapter_dtype: float32 adapters on half-precision weights, as PEFT does.

    Raises:
        TargetModuleError: a name matches nothing.
        ConfigError: a value out of range.
        UnsupportedError: a setting that is not served, or the model carries an adapter that began with PiSSA,
            which left its base weights without their principal part.
        AdapterStateError: the name is taken or not allowed, or adapters are merged.
    """
    bare = unwrapped(model)
    plan, ours = prepare(bare, config, adapter_name, allow_unmatched, autocast_adapter_dtype)
    for text in plan.warnings:
        warnings.warn(text, stacklevel=2)
    commit_plan(bare, adapter_name, plan, ours)
    return model


def prepare(
    model: nn.Module, config: Any, adapter_name: str, allow_unmatched: bool, autocast: bool
) -> tuple[Plan, Any]:
    """All of `apply`'s checks: the plan and our config."""
    check_adapter_name(adapter_name)
    if adapter_name in adapter_configs(model):
        raise AdapterStateError(
            f"the model already has an adapter {adapter_name!r}; pass another adapter_name or "
            "delete_adapter first"
        )
    refuse_residual(model, f"adapter {adapter_name!r}")
    refuse_busy(model, "apply")
    method, ours = coerce_config(config, model)
    plan = method.plan(
        model,
        ours,
        adapter_name,
        allow_unmatched=allow_unmatched,
        autocast_adapter_dtype=autocast,
    )
    return plan, ours


def commit_plan(
    model: nn.Module,
    adapter_name: str,
    plan: Plan,
    ours: Any,
    values: Mapping[str, Tensor] | None = None,
) -> None:
    """Carry a plan out: freeze, add, fill with values, register, activate; all of it or nothing."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if plan.shapes:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
        plan.commit()
        if values is not None:
            with torch.no_grad():
                METHODS[type(ours)].fill(model, adapter_name, values)
    except BaseException:
        take_off(model, adapter_name)
        plan.undo()
        for parameter, required in trainable:
            parameter.requires_grad_(required)
        raise
    register(model, adapter_name, ours)
    if plan.shapes:
        activate(model, [adapter_name])
        form_groups(shared_inputs(model))
    adopt(model)
