# SPDX-License-Identifier: Apache-2.0
"""Applying methods to a model and switching, merging and removing its adapters.

Every function checks first and changes afterwards: a call that raises leaves the model as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import string
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pyfast.errors import (
    AdapterStateError,
    ConfigError,
    NonFiniteError,
    TargetModuleError,
    UnsupportedError,
)
from pyfast.methods.base import METHODS, Method, Plan, adapted_modules, replace_module
from pyfast.methods.lora import quantize_linears
from pyfast.methods.targets import linear_modules, named, output_layers
from pyfast.nn import AdapterLayer, NF4Linear, SavedModule

_CONFIGS = "_pyfast_configs"
_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_-")


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Adapter name to config for everything applied to a model."""
    configs: dict[str, Any] = model.__dict__.get(_CONFIGS, {})
    return configs


def check_adapter_name(name: str) -> None:
    """Raise AdapterStateError unless the name is safe as a module key and as a file name."""
    if not 1 <= len(name) <= 64 or not _NAME_CHARACTERS.issuperset(name):
        raise AdapterStateError(f"adapter name {name!r} must match [A-Za-z0-9_-]{{1,64}}")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        raise AdapterStateError(
            f"adapter name {name!r} is taken by an attribute of torch's modules; choose another"
        )


def known_adapter(model: nn.Module, name: str) -> Any:
    """Config of an adapter, or AdapterStateError naming those there are."""
    configs = adapter_configs(model)
    if name not in configs:
        raise AdapterStateError(f"no adapter {name!r}; the model has {sorted(configs) or 'none'}")
    return configs[name]


def coerce_config(config: Any) -> tuple[Method, Any]:
    """The method and our config for ours, PEFT's, or any config object with a `peft_type`.

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
            return method, config_from_fields(method, values)
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


def config_from_fields(method: Method, values: dict[str, Any]) -> Any:
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
        elif name == "task_type" and value is not None:
            used[name] = str(getattr(value, "value", value))
    return method.config_type(**used)


def apply(
    model: nn.Module,
    config: Any,
    *,
    adapter_name: str = "default",
    allow_unmatched: bool = False,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Apply a fine-tuning method to any module tree, in place; arguments and errors as `pyfast.apply`'s,
    which also teaches a transformers model to save its adapters.
    """
    plan, ours = prepare(model, config, adapter_name, allow_unmatched, autocast_adapter_dtype)
    commit_plan(model, adapter_name, plan, ours)
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
    _refuse_busy(model, "apply")
    method, ours = coerce_config(config)
    plan = method.plan(
        model,
        ours,
        adapter_name,
        allow_unmatched=allow_unmatched,
        autocast_adapter_dtype=autocast,
    )
    return plan, ours


def commit_plan(model: nn.Module, adapter_name: str, plan: Plan, ours: Any) -> None:
    """Carry a plan out: freeze, add, register, activate."""
    if plan.shapes:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    plan.commit()
    model.__dict__.setdefault(_CONFIGS, {})[adapter_name] = ours
    if plan.shapes:
        set_adapter(model, adapter_name)


def set_adapter(model: nn.Module, names: str | Iterable[str]) -> None:
    """Choose the active adapters; their parameters become trainable, those of others frozen.

    Raises:
        AdapterStateError: an unknown name, or adapters are merged.
    """
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in wanted:
        known_adapter(model, name)
    _refuse_busy(model, "set_adapter")
    _activate(model, wanted)


def _activate(model: nn.Module, wanted: list[str]) -> None:
    for module in adapted_modules(model).values():
        module.set_active(wanted)
        for name in module.adapter_names():
            for _, parameter in module.adapter_tensors(name):
                parameter.requires_grad_(name in module.active)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; a layer that holds none any more becomes its base layer again.

    Where it was the active one, the base serves until `set_adapter` chooses another.

    Raises:
        AdapterStateError: an unknown name, or adapters are merged.
    """
    known_adapter(model, name)
    _refuse_busy(model, "delete_adapter")
    for path, module in adapted_modules(model).items():
        module.remove(name)
        if not module.adapter_names():
            replace_module(model, path, _bare(module))
    del adapter_configs(model)[name]


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Adapter-file key (without the `base_model.model.` prefix) to parameter for one adapter."""
    known_adapter(model, name)
    return {
        f"{path}.{key}": parameter
        for path, module in adapted_modules(model).items()
        for key, parameter in module.adapter_tensors(name)
    }


def merge(
    model: nn.Module, names: str | Iterable[str] | None = None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Add adapters to the base weights, in float32, rounded once to the weight's dtype.

    NF4 layers become dense ones of `dtype` (default: the dtype they were quantised from): adding a
    small update to 4-bit codes would erase it.

    Args:
        model: a model with adapters.
        names: adapters to merge, which become the active ones; default those that are active.
        dtype: for NF4 layers.

    Raises:
        AdapterStateError: nothing to merge, already merged, or an unknown name.
        NonFiniteError: an adapter or a merged weight holds NaN or infinity; the model is unchanged.
    """
    layers = [m for m in adapted_modules(model).values() if isinstance(m, AdapterLayer)]
    _refuse_busy(model, "merge")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"merge: dtype must be a floating-point torch.dtype, got {dtype!r}")
    wanted = _merge_names(model, layers, names)
    for name in wanted:
        for key, parameter in adapter_parameters(model, name).items():
            bad = int((~torch.isfinite(parameter)).sum())
            if bad:
                raise NonFiniteError(
                    f"adapter {name!r} has {bad} non-finite values in {key}; merging would spread them "
                    "to the base weights. The model is unchanged"
                )
    done: list[AdapterLayer] = []
    try:
        with torch.no_grad():
            for layer in layers:
                held = [name for name in wanted if name in layer.adapter_names()]
                if held:
                    layer.merge(held, dtype)
                    done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if names is not None:
        _activate(model, wanted)
    return model


def _merge_names(
    model: nn.Module, layers: list[AdapterLayer], names: str | Iterable[str] | None
) -> list[str]:
    if names is None:
        wanted = list(dict.fromkeys(name for layer in layers for name in layer.active))
    else:
        wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    for name in wanted:
        known_adapter(model, name)
    if not wanted:
        raise AdapterStateError("no active adapter to merge; apply or load one first")
    return wanted


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: base weights come back bit for bit.

    Raises:
        AdapterStateError: nothing is merged.
    """
    _refuse_disabled(model, "unmerge")
    layers = [
        m for m in adapted_modules(model).values() if isinstance(m, AdapterLayer) and m.merged
    ]
    if not layers:
        raise AdapterStateError("no adapter is merged")
    for layer in layers:
        layer.unmerge()
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take all adapters off and leave a plain model: merged weights where merged, the base elsewhere.

    Modules trained whole stay at their active copy.

    Raises:
        AdapterStateError: called inside an `adapters_disabled` block.
    """
    _refuse_disabled(model, "unload")
    for path, module in adapted_modules(model).items():
        replace_module(model, path, _bare(module))
    adapter_configs(model).clear()
    return model


def _bare(module: AdapterLayer | SavedModule) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLayer) else module.current()


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the block; the previous state comes back afterwards.

    Merged adapters are taken out for the block and merged again after it.
    """
    modules = list(adapted_modules(model).values())
    merged = {
        m: (m.merged, m.base_weight.dtype)
        for m in modules
        if isinstance(m, AdapterLayer) and m.merged
    }
    before = [module.enabled for module in modules]
    for layer in merged:
        layer.unmerge()
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(modules, before, strict=True):
            module.enabled = enabled
        with torch.no_grad():
            for layer, (names, dtype) in merged.items():
                layer.merge(names, dtype)


def _refuse_disabled(model: nn.Module, what: str) -> None:
    if not all(module.enabled for module in adapted_modules(model).values()):
        raise AdapterStateError(
            f"{what}: adapters are disabled; call it outside the adapters_disabled block"
        )


def _refuse_busy(model: nn.Module, what: str) -> None:
    _refuse_disabled(model, what)
    for path, module in adapted_modules(model).items():
        if isinstance(module, AdapterLayer) and module.merged:
            raise AdapterStateError(
                f"{what}: adapters {module.merged} are merged into {path!r}; call pyfast.unmerge first"
            )


def quantize(
    model: nn.Module,
    *,
    blocksize: int = 64,
    nested: bool = True,
    skip_modules: Iterable[str] | None = None,
) -> nn.Module:
    """Turn the linear layers into NF4, in place; embeddings and the output layer stay dense.

    Args:
        model: any module tree; `nn.Linear` and transformers' `Conv1D` are converted.
        blocksize: elements that share a scale.
        nested: 8-bit scales ("double quantisation").
        skip_modules: names that end a module's path, left dense.

    Returns:
        The same model.

    Raises:
        TargetModuleError: a name in `skip_modules` matches nothing, or no linear is left to quantise.
        AdapterStateError: adapters are applied already; quantise first.
        NonFiniteError: a weight holds NaN or infinity; the model is unchanged.
    """
    if adapter_configs(model):
        raise AdapterStateError("quantize the model before adapters are applied or loaded")
    skipped, linears = list(skip_modules or ()), linear_modules(model)
    heads = output_layers(model)
    for name in skipped:
        if not any(named([name], path) for path in linears):
            raise TargetModuleError(f"skip_modules: {name!r} matches no linear module")
    paths = [
        path
        for path, module in linears.items()
        if path not in heads
        and not isinstance(module, NF4Linear)
        and getattr(module, "weight", None) is not None
        and module.weight.is_floating_point()  # type: ignore[operator]
        and not named(skipped, path)
    ]
    if not paths:
        raise TargetModuleError(f"{type(model).__name__} has no dense linear layer to quantise")
    for path in paths:
        if not bool(torch.isfinite(linears[path].weight).all()):  # type: ignore[arg-type]
            raise NonFiniteError(f"{path}.weight holds NaN or infinity. The model is unchanged")
    with torch.no_grad():
        quantize_linears(model, paths, blocksize, nested)
    return model
