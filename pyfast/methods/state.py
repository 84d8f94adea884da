# SPDX-License-Identifier: Apache-2.0
"""The adapters that a model carries: switched, merged, disabled and removed.

Every function checks first and changes afterwards: a call that raises leaves the model as it was.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyfast.errors import AdapterStateError, ConfigError, NonFiniteError
from pyfast.methods.base import (
    adapted_modules,
    as_names,
    public_path,
    refuse_meta,
    replace_modules,
)
from pyfast.methods.of_peft import refuse_peft
from pyfast.methods.residual import refuse_residual
from pyfast.nn import (
    DENSE_DTYPES,
    AdapterLayer,
    Attachment,
    Mergeable,
    NF4Tensor,
    NF4Weight,
    SavedModule,
    Switchable,
    weight_of,
)


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
        AdapterStateError: an unknown name, adapters are merged, or they are PEFT's.
        UnsupportedError: an adapter is left out that began with PiSSA.
    """
    refuse_peft(model, "set_adapter")
    wanted = list(dict.fromkeys(as_names("set_adapter: names", names)))
    for name in wanted:
        known_adapter(model, name)
    refuse_residual(model, "set_adapter", wanted)
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
        AdapterStateError: an unknown name, adapters are merged, or they are PEFT's.
        UnsupportedError: the adapter began with PiSSA: the base weights lack the part that it took out.
    """
    refuse_peft(model, "delete_adapter")
    known_adapter(model, name)
    refuse_residual(model, "delete_adapter", adapter_configs(model).keys() - {name})
    refuse_busy(model, "delete_adapter")
    take_off(model, name)


def take_off(model: nn.Module, name: str) -> None:
    """Remove whatever modules hold of an adapter, and those that hold none any more."""
    empty: dict[str, Switchable] = {}
    for path, module in adapted_modules(model).items():
        module.remove(name)
        if not module.adapter_names():
            empty[path] = module
    _take_out(model, empty)


def _take_out(model: nn.Module, holders: Mapping[str, Switchable]) -> None:
    """Take holders of adapters, given by path, out of a model; what they stood for takes their place."""
    bare: dict[nn.Module, nn.Module] = {}
    for path, module in holders.items():
        if isinstance(module, AdapterLayer):
            bare[module] = module.base_layer
        elif isinstance(module, SavedModule):
            bare[module] = module.current()
        elif isinstance(module, Attachment):
            module.detach(model.get_submodule(path.rpartition(".")[0]))

    def inner(module: nn.Module) -> nn.Module | None:
        found = bare.get(module)
        while found in bare:
            found = bare[found]
        return found

    replace_modules(model, inner)


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """Adapter-file key (without the `base_model.model.` prefix) to parameter for one adapter."""
    refuse_peft(model, "adapter_parameters")
    known_adapter(model, name)
    return tensors_of(model, name)


def tensors_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """As `adapter_parameters`, for an adapter that is not registered yet too."""
    return {
        f"{public_path(model, path)}.{key}": parameter
        for path, module in adapted_modules(model).items()
        for key, parameter in module.adapter_tensors(name)
    }


def merge(
    model: nn.Module, names: str | Iterable[str] | None = None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Put adapters into the base weights, in float32 or wider, rounded once to the weight's dtype.

    NF4 layers with LoRA become dense ones of `dtype` (default: the dtype they were quantised from): adding
    a small update to 4-bit codes would erase it. IA3's factors of outputs go into flat scales and leave the
    codes as they are; where they cannot, `dtype` must be given. The model still carries its adapters, which
    are all that a transformers model's `save_pretrained` writes (with a warning) until `unload`.

    Args:
        model: a model with adapters.
        names: adapters to merge, which become the active ones; default those that are active.
        dtype: for NF4 layers, which then become dense.

    Raises:
        AdapterStateError: nothing to merge, already merged, an unknown name, or adapters of PEFT's.
        UnsupportedError: a weight lies on the meta device, or is made from others before each forward; or an
            adapter is none of weights (virtual tokens, bottlenecks), or one that began with PiSSA is left
            out.
        QuantizedMergeError: the scales of an NF4 layer cannot take IA3's factors, and no dtype is given.
        ConfigError: a dtype that dense layers do not have, or NF4 layers would become dense ones of another
            dtype than the rest of the model.
        NonFiniteError: an adapter or a merged weight holds NaN or infinity; the model is unchanged.
    """
    refuse_peft(model, "merge")
    refuse_busy(model, "merge")
    if dtype is not None and dtype not in DENSE_DTYPES:
        raise ConfigError(
            f"merge: dtype must be a floating-point type of {DENSE_DTYPES}, got {dtype!r}"
        )
    wanted = _merge_names(model, names)
    refuse_residual(model, "merge", wanted)
    refuse_meta("merge", model.named_parameters())
    for name in wanted:
        for key, parameter in adapter_parameters(model, name).items():
            bad = int((~torch.isfinite(parameter)).sum())
            if bad:
                raise NonFiniteError(
                    f"adapter {name!r} has {bad} non-finite values in {key}; merging would spread them "
                    "to the base weights. The model is unchanged"
                )
    layers, done = _to_merge(model, wanted, dtype), list[Mergeable]()
    _check_dense_dtype(model, layers, wanted, dtype)
    try:
        with torch.no_grad():
            for layer in layers:
                layer.merge(wanted, dtype)
                done += layer.links()
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    if names is not None:
        activate(model, wanted)
    return model


def _merge_names(model: nn.Module, names: str | Iterable[str] | None) -> list[str]:
    if names is None:
        holders = adapted_modules(model).values()
        held = [m for m in holders if not isinstance(m, SavedModule)]
        wanted = list(dict.fromkeys(name for module in held for name in module.active))
    else:
        wanted = list(dict.fromkeys(as_names("merge: names", names)))
    for name in wanted:
        known_adapter(model, name)
    if not wanted:
        raise AdapterStateError("no active adapter to merge; apply or load one first")
    return wanted


def _to_merge(model: nn.Module, wanted: list[str], dtype: torch.dtype | None) -> list[Mergeable]:
    """The outermost layers of those that hold wanted adapters; all of them can be merged."""
    found: list[Mergeable] = []
    inner: set[Mergeable] = set()
    for path, module in adapted_modules(model).items():
        held = [name for name in wanted if name in module.adapter_names()]
        if not held:
            continue
        module.check_merge(public_path(model, path), wanted, dtype)
        if isinstance(module, Mergeable):
            found.append(module)
            inner.update(module.links()[1:])
    return [layer for layer in found if layer not in inner]


def _check_dense_dtype(
    model: nn.Module, layers: list[Mergeable], wanted: list[str], dtype: torch.dtype | None
) -> None:
    """Raise ConfigError where NF4 layers would become dense ones that the rest of the model cannot feed."""
    made: Counter[torch.dtype] = Counter()
    for layer in layers:
        weight = layer.base_weight if isinstance(layer, AdapterLayer) else None
        if isinstance(weight, NF4Weight):
            held = [at for at in layer.links() if not set(wanted).isdisjoint(at.adapter_names())]
            if dtype or not all(isinstance(at, AdapterLayer) and at.packs for at in held):
                made[dtype or weight.dtype] += 1
    rest = _dtypes_beside_nf4(model) if made else []
    for wrong, count in made.items():
        if rest and wrong not in rest:
            raise ConfigError(
                f"merge: {count} NF4 layers would become dense in {wrong}, but the other parameters of "
                f"{type(model).__name__} are in {rest[0]}, so that no forward could run; merge with "
                f"dtype={rest[0]}, or call model.to({wrong}) first. The model is unchanged"
            )


def _dtypes_beside_nf4(model: nn.Module) -> list[torch.dtype]:
    """Those of a model's floating-point parameters without adapters and the parts of NF4 layers."""
    adapters = {
        parameter
        for module in adapted_modules(model).values()
        for name in module.adapter_names()
        for _, parameter in module.adapter_tensors(name)
    }
    found = [
        parameter.dtype
        for module in model.modules()
        if not isinstance(module, NF4Tensor) and not isinstance(weight_of(module), NF4Weight)
        for parameter in module.parameters(recurse=False)
        if parameter.is_floating_point() and parameter not in adapters
    ]
    return list(dict.fromkeys(found))


def unmerge(model: nn.Module) -> nn.Module:
    """Undo `merge`: base weights come back bit for bit.

    Raises:
        AdapterStateError: nothing is merged, or adapters are PEFT's.
    """
    refuse_peft(model, "unmerge")
    _refuse_inside(model, "unmerge")
    layers = [m for m in adapted_modules(model).values() if isinstance(m, Mergeable) and m.merged]
    if not layers:
        raise AdapterStateError("no adapter is merged")
    for layer in layers:
        layer.unmerge()
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take all adapters off and leave a plain model: merged weights where merged, the base elsewhere.

    Modules trained whole stay at their active copy.

    Raises:
        AdapterStateError: called inside an `adapters_disabled` or `adapters_per_sample` block, or adapters
            are PEFT's.
        UnsupportedError: an adapter that began with PiSSA is not merged: the base weights lack its part.
    """
    refuse_peft(model, "unload")
    _refuse_inside(model, "unload")
    refuse_residual(model, "unload", merged=True)
    _take_out(model, adapted_modules(model))
    return model


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the block; the previous state comes back afterwards, bit for bit.

    Merged adapters are taken out for the block. Blocks may overlap, also in threads: adapters serve again
    when the last one is left. In a copy of the model that is made inside they serve at once.

    Raises:
        AdapterStateError: adapters are PEFT's.
        UnsupportedError: an adapter began with PiSSA: there is no base model without its part.
    """
    refuse_peft(model, "adapters_disabled")
    refuse_residual(model, "adapters_disabled")
    with contextlib.ExitStack() as stack:
        for module in adapted_modules(model).values():
            module.disable()
            stack.callback(module.enable)
        yield


def _refuse_inside(model: nn.Module, what: str) -> None:
    """Raise AdapterStateError inside blocks after which the model is to be as it was before."""
    holders = adapted_modules(model).values()
    if not all(module.enabled for module in holders):
        raise AdapterStateError(
            f"{what}: adapters are disabled; call it outside the adapters_disabled block"
        )
    if any(module.samples is not None for module in holders):
        raise AdapterStateError(
            f"{what}: samples have adapters of their own; call it outside the adapters_per_sample block"
        )


def refuse_busy(model: nn.Module, what: str) -> None:
    """Raise AdapterStateError while adapters are disabled, given to samples, or merged."""
    _refuse_inside(model, what)
    refuse_merged(model, what)


def merged_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that are merged somewhere."""
    holders = adapted_modules(model).values()
    return list(dict.fromkeys(n for m in holders if isinstance(m, Mergeable) for n in m.merged))


def refuse_merged(model: nn.Module, what: str) -> None:
    """Raise AdapterStateError while adapters are merged."""
    for path, module in adapted_modules(model).items():
        if isinstance(module, Mergeable) and module.merged:
            raise AdapterStateError(
                f"{what}: adapters {module.merged} are merged into {path!r}; call pyfast.unmerge first"
            )
