# SPDX-License-Identifier: Apache-2.0
"""The adapters that a model carries: switched, merged, disabled and removed.

Every function checks first and changes afterwards: a call that raises leaves the model as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pyfast.errors import AdapterStateError, ConfigError, NonFiniteError, UnsupportedError
from pyfast.methods.base import (
    adapted_modules,
    as_names,
    refuse_meta,
    replace_modules,
)
from pyfast.nn import DENSE_DTYPES, AdapterLayer, SavedModule


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """Adapter name to config for every adapter that the model's modules hold, whichever part of the model
    or wrapper around it they were applied through."""
    configs: dict[str, Any] = {}
    for module in adapted_modules(model).values():
        configs.update(module.configs)
    return configs


def register(model: nn.Module, name: str, config: Any) -> None:
    """Remember the config of an adapter that was added."""
    for module in adapted_modules(model).values():
        if name in module.adapter_names():
            module.configs[name] = config


def known_adapter(model: nn.Module, name: str) -> Any:
    """Config of an adapter, or AdapterStateError naming those there are."""
    configs = adapter_configs(model)
    if name not in configs:
        raise AdapterStateError(f"no adapter {name!r}; the model has {sorted(configs) or 'none'}")
    return configs[name]


def set_adapter(model: nn.Module, names: str | Iterable[str]) -> None:
    """Choose the active adapters; their parameters become trainable, those of others frozen.

    Raises:
        AdapterStateError: an unknown name, or adapters are merged.
    """
    wanted = list(dict.fromkeys(as_names("set_adapter: names", names)))
    for name in wanted:
        known_adapter(model, name)
    refuse_busy(model, "set_adapter")
    activate(model, wanted)


def activate(model: nn.Module, wanted: list[str]) -> None:
    """Make these the active adapters; nothing is checked."""
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
    refuse_busy(model, "delete_adapter")
    take_off(model, name)


def take_off(model: nn.Module, name: str) -> None:
    """Remove whatever modules hold of an adapter, and wrappers that hold none any more."""
    bare: dict[nn.Module, nn.Module] = {}
    for module in adapted_modules(model).values():
        module.remove(name)
        if not module.adapter_names():
            bare[module] = _bare(module)
    replace_modules(model, bare.get)


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Adapter-file key (without the `base_model.model.` prefix) to parameter for one adapter."""
    known_adapter(model, name)
    return tensors_of(model, name)


def tensors_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """As `adapter_parameters`, for an adapter that is not registered yet too."""
    return {
        f"{path}.{key}": parameter
        for path, module in adapted_modules(model).items()
        for key, parameter in module.adapter_tensors(name)
    }


def merge(
    model: nn.Module, names: str | Iterable[str] | None = None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Add adapters to the base weights, in float32 or wider, rounded once to the weight's dtype.

    NF4 layers become dense ones of `dtype` (default: the dtype they were quantised from): adding a
    small update to 4-bit codes would erase it.

    Args:
        model: a model with adapters.
        names: adapters to merge, which become the active ones; default those that are active.
        dtype: for NF4 layers.

    Raises:
        AdapterStateError: nothing to merge, already merged, or an unknown name.
        UnsupportedError: a weight lies on the meta device, or is made from others before each forward.
        ConfigError: a dtype that dense layers do not have.
        NonFiniteError: an adapter or a merged weight holds NaN or infinity; the model is unchanged.
    """
    refuse_busy(model, "merge")
    if dtype is not None and dtype not in DENSE_DTYPES:
        raise ConfigError(
            f"merge: dtype must be a floating-point type of {DENSE_DTYPES}, got {dtype!r}"
        )
    wanted = _merge_names(model, names)
    refuse_meta("merge", model.named_parameters())
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
            for layer, held in _to_merge(model, wanted):
                layer.merge(held, dtype)
                done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if names is not None:
        activate(model, wanted)
    return model


def _merge_names(model: nn.Module, names: str | Iterable[str] | None) -> list[str]:
    if names is None:
        layers = [m for m in adapted_modules(model).values() if isinstance(m, AdapterLayer)]
        wanted = list(dict.fromkeys(name for layer in layers for name in layer.active))
    else:
        wanted = list(dict.fromkeys(as_names("merge: names", names)))
    for name in wanted:
        known_adapter(model, name)
    if not wanted:
        raise AdapterStateError("no active adapter to merge; apply or load one first")
    return wanted


def _to_merge(model: nn.Module, wanted: list[str]) -> list[tuple[AdapterLayer, list[str]]]:
    """The layers that hold wanted adapters, and which; all of them can be merged."""
    found = []
    for path, layer in adapted_modules(model).items():
        held = [name for name in wanted if name in layer.adapter_names()]
        if isinstance(layer, AdapterLayer) and held:
            if not layer.mergeable:
                raise UnsupportedError(
                    f"merge: the weight of {path!r} is made anew before each forward (pruning, weight_norm "
                    "or a parametrization), which would undo the merge; make it permanent first, for "
                    "example with torch.nn.utils.prune.remove. The model is unchanged"
                )
            found.append((layer, held))
    return found


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
    bare: dict[nn.Module, nn.Module] = {m: _bare(m) for m in adapted_modules(model).values()}
    replace_modules(model, bare.get)
    return model


def _bare(module: AdapterLayer | SavedModule) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLayer) else module.current()


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the block; the previous state comes back afterwards, bit for bit.

    Merged adapters are taken out for the block. Blocks may overlap, also in threads: adapters serve again
    when the last one is left. In a copy of the model that is made inside they serve at once.
    """
    with contextlib.ExitStack() as stack:
        for module in adapted_modules(model).values():
            module.disable()
            stack.callback(module.enable)
        yield


def _refuse_disabled(model: nn.Module, what: str) -> None:
    if not all(module.enabled for module in adapted_modules(model).values()):
        raise AdapterStateError(
            f"{what}: adapters are disabled; call it outside the adapters_disabled block"
        )


def refuse_busy(model: nn.Module, what: str) -> None:
    """Raise AdapterStateError while adapters are disabled or merged."""
    _refuse_disabled(model, what)
    refuse_merged(model, what)


def refuse_merged(model: nn.Module, what: str) -> None:
    """Raise AdapterStateError while adapters are merged."""
    for path, module in adapted_modules(model).items():
        if isinstance(module, AdapterLayer) and module.merged:
            raise AdapterStateError(
                f"{what}: adapters {module.merged} are merged into {path!r}; call pyfast.unmerge first"
            )
