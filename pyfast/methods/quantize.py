# SPDX-License-Identifier: Apache-2.0
"""Turning a model's dense linear layers into NF4."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pyfast.errors import AdapterStateError, ConfigError, NonFiniteError, TargetModuleError
from pyfast.methods.base import (
    adapted_modules,
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

    Each dense weight is freed when its layer is done, so that memory never holds both models. A call that
    is interrupted or runs out of memory therefore leaves some layers done; the same call again goes on
    with the others.

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
    if adapted_modules(model):
        raise AdapterStateError("quantize the model before adapters are applied or loaded")
    bare = unwrapped(model)
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ConfigError(f"quantize: blocksize={blocksize!r} must be one of {BLOCKSIZES}")
    skipped, linears = as_names("skip_modules", skip_modules or ()), linear_modules(bare)
    heads = output_layers(bare)
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
        raise TargetModuleError(f"{type(bare).__name__} has no dense linear layer to quantise")
    refuse_meta("quantize", ((f"{path}.weight", weight.dense()) for path, weight in dense.items()))
    for path, weight in dense.items():
        if not bool(torch.isfinite(weight.dense()).all()):
            raise NonFiniteError(f"{path}.weight holds NaN or infinity. The model is unchanged")
    chosen = {id(linears[path]): path for path in dense}
    # Only the model holds the dense weights from here on, so that each is freed when its layer is done.
    del linears, dense, weight

    done = 0

    def quantized(module: nn.Module) -> NF4Linear | None:
        nonlocal done
        if id(module) not in chosen:
            return None
        weight = served_weight(chosen[id(module)], module)
        layer = NF4Linear.from_weight(weight, blocksize=blocksize, nested=nested)
        done += 1
        return layer

    try:
        with torch.no_grad():
            replace_modules(bare, quantized)
    except BaseException as error:
        error.add_note(
            f"quantize: {done} of {len(chosen)} linear layers are NF4 now; the same call again goes on with "
            "the others"
        )
        raise
    return model
