# SPDX-License-Identifier: Apache-2.0
"""Turning a model's dense linear layers into NF4."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pyfast.errors import AdapterStateError, ConfigError, NonFiniteError, TargetModuleError
from pyfast.methods.base import (
    adapted_modules,
    adopt,
    as_names,
    refuse_meta,
    replace_modules,
    unwrapped,
)
from pyfast.methods.targets import linear_modules, named, output_layers, served_weight
from pyfast.nn import NF4Linear
from pyfast.ops._check import BLOCKSIZES


def quantize(
    model: nn.Module,
    *,
    blocksize: int = 64,
    nested: bool = True,
    skip_modules: Iterable[str] | None = None,
) -> nn.Module:
    """Turn the linear layers into NF4, in place; embeddings and the output layer stay dense.

    A call that fails or is interrupted changes nothing: the dense weights are kept until all layers are
    done, which takes the memory of the NF4 weights on top of the dense model's (about a quarter of it in
    half precision). Where a device does not have that much, the dense weights of finished layers are freed
    as the call goes on, so that a model is quantised wherever it fits; interrupted after that, the call
    leaves those layers done, says so, and goes on with the others when it is made again. Memory that does
    not suffice even so is noticed before the first layer is changed.

    What a transformers model's `save_pretrained` writes afterwards, transformers loads through bitsandbytes.

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
        ConfigError: a block size that the format does not have.
        NonFiniteError: a weight holds NaN or infinity; the model is unchanged.
        UnsupportedError: a weight has 8-bit floats, or lies on the meta device; the model is unchanged.
    """
    bare = unwrapped(model)
    chosen = _check(bare, blocksize, nested, skip_modules)
    kept: dict[nn.Module, nn.Module] = {}
    freed = 0

    def quantized(module: nn.Module) -> NF4Linear | None:
        nonlocal freed
        if id(module) not in chosen:
            return None
        weight = served_weight(chosen[id(module)], module)
        while True:
            try:
                layer = NF4Linear.from_weight(weight, blocksize=blocksize, nested=nested)
                break
            except torch.OutOfMemoryError:
                if not kept:
                    raise
                freed += len(kept)
                kept.clear()
        kept[layer] = module
        return layer

    try:
        with torch.no_grad():
            replace_modules(bare, quantized)
    except BaseException as error:
        replace_modules(bare, kept.get)
        if freed:
            error.add_note(
                f"quantize: {freed} of {len(chosen)} linear layers are NF4 now, since there was no memory to "
                "keep their dense weights; the same call again goes on with the others"
            )
        raise
    adopt(bare)
    return model


def _check(
    model: nn.Module, blocksize: int, nested: bool, skip_modules: Iterable[str] | None
) -> dict[int, str]:
    """All of `quantize`'s checks: id of each module to convert to its path. No module or weight is held
    afterwards, so that the caller can free them."""
    if adapted_modules(model):
        raise AdapterStateError("quantize the model before adapters are applied or loaded")
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ConfigError(f"quantize: blocksize={blocksize!r} must be one of {BLOCKSIZES}")
    skipped, linears = as_names("skip_modules", skip_modules or ()), linear_modules(model)
    heads = output_layers(model)
    for name in skipped:
        if not any(named([name], path) for path in linears):
            raise TargetModuleError(f"skip_modules: {name!r} matches no linear module")
    dense = {
        path: served_weight(path, module)
        for path, module in linears.items()
        if path not in heads
        and getattr(module, "weight", None) is not None
        and module.weight.is_floating_point()  # type: ignore[operator]
        and not named(skipped, path)
    }
    if not dense:
        raise TargetModuleError(f"{type(model).__name__} has no dense linear layer to quantise")
    refuse_meta("quantize", ((f"{path}.weight", weight.dense()) for path, weight in dense.items()))
    for path, weight in dense.items():
        if not bool(torch.isfinite(weight.dense()).all()):
            raise NonFiniteError(f"{path}.weight holds NaN or infinity. The model is unchanged")
    # The largest layer of each device needs the most memory: it runs out of it here, or no layer does.
    by_size = sorted(dense.values(), key=lambda weight: weight.dense().nbytes)
    for weight in {weight.device: weight for weight in by_size}.values():
        NF4Linear.from_weight(weight, blocksize=blocksize, nested=nested)
    return {id(linears[path]): path for path in dense}
