# SPDX-License-Identifier: Apache-2.0
"""Turning a model's dense linear layers and expert tensors into NF4."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from pyfast.errors import AdapterStateError, ConfigError, NonFiniteError, TargetModuleError
from pyfast.methods.base import (
    adapted_modules,
    adopt,
    as_names,
    refuse_meta,
    replace_modules,
    unwrapped,
)
from pyfast.methods.targets import kept_dense, linear_modules, named, served_weight
from pyfast.nn import DenseWeight, NF4Linear
from pyfast.nn.experts import (
    PREFIX,
    expert_tensors,
    put_experts,
    quantize_experts,
    unserved_experts,
)
from pyfast.nn.nf4 import guard_states
from pyfast.ops._check import BLOCKSIZES

T = TypeVar("T")


def quantize(
    model: nn.Module,
    *,
    blocksize: int = 64,
    nested: bool = True,
    skip_modules: Iterable[str] | None = None,
) -> nn.Module:
    """Turn the linear layers and the experts of mixtures into NF4, in place; embeddings, the output layer and
    T5's `wo` stay dense.

    A call that fails or is interrupted changes nothing: the dense weights are kept until all layers are
    done, which takes the memory of the NF4 weights on top of the dense model's (about a quarter of it in
    half precision). Where a device does not have that much, the dense weights of finished layers are freed
    as the call goes on, so that a model is quantised wherever it fits; interrupted after that, the call
    leaves those layers done, says so, and goes on with the others when it is made again. Memory that does
    not suffice even so is noticed before the first layer is changed.

    What a transformers model's `save_pretrained` writes afterwards, transformers loads through bitsandbytes,
    or, where it holds experts or other layers that bitsandbytes has no form for, through `pyfast.NF4Config`.

    Args:
        model: any module tree; `nn.Linear`, transformers' `Conv1D` and `FalconLinear` are converted, and the
            3-D parameters of its experts.
        blocksize: elements that share a scale.
        nested: 8-bit scales ("double quantisation").
        skip_modules: names that end a module's path, or that of an expert tensor, left dense.

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
    change = _Change(blocksize, nested)

    def linear(module: nn.Module) -> NF4Linear | None:
        return change.linear(chosen[id(module)], module) if id(module) in chosen else None

    try:
        with torch.no_grad():
            replace_modules(bare, linear)
            for module in list(bare.modules()):
                for name in expert_tensors(module):
                    if (id(module), name) in chosen:
                        change.expert(module, name)
    except BaseException as error:
        change.undo(bare)
        if change.freed:
            error.add_note(
                f"quantize: {change.freed} of {len(chosen)} linear layers are NF4 now, since there was no "
                "memory to keep their dense weights; the same call again goes on with the others"
            )
        raise
    guard_states(bare)
    adopt(bare)
    return model


class _Change:
    """What a call of `quantize` did so far, and the dense weights by which it is undone."""

    def __init__(self, blocksize: int, nested: bool) -> None:
        self.blocksize, self.nested = blocksize, nested
        self.freed = 0
        self._linears: dict[nn.Module, nn.Module] = {}
        # A module of experts, its class, and all of its parameters in order.
        self._experts: dict[nn.Module, tuple[type, dict[str, nn.Parameter | None]]] = {}

    def linear(self, path: str, module: nn.Module) -> NF4Linear:
        """The NF4 layer for a dense one."""
        layer = self._within_memory(
            lambda: nf4_linear_of(path, module, blocksize=self.blocksize, nested=self.nested)
        )
        self._linears[layer] = module
        return layer

    def expert(self, module: nn.Module, name: str) -> None:
        """Put an NF4 tensor in the place of a parameter of experts."""
        parameter = module._parameters[name]
        made = self._within_memory(
            lambda: quantize_experts(parameter, blocksize=self.blocksize, nested=self.nested)  # type: ignore[arg-type]
        )
        self._experts.setdefault(module, (type(module), dict(module._parameters)))
        put_experts(module, name, made)

    def _within_memory(self, make: Callable[[], T]) -> T:
        while True:
            try:
                return make()
            except torch.OutOfMemoryError:
                if not self._linears and not self._experts:
                    raise
                self.freed += len(self._linears) + len(self._experts)
                self._linears.clear()
                self._experts.clear()

    def undo(self, model: nn.Module) -> None:
        """Put the dense weights back that are still held."""
        replace_modules(model, self._linears.get)
        for module, (cls, parameters) in self._experts.items():
            module.__class__ = cls
            for name in parameters:
                module._modules.pop(PREFIX + name, None)
            module._parameters.clear()
            module._parameters.update(parameters)


def nf4_linear_of(path: str, module: nn.Module, *, blocksize: int, nested: bool) -> NF4Linear:
    """The NF4 layer for a dense one, which it remembers the class of."""
    layer = NF4Linear.from_weight(served_weight(path, module), blocksize=blocksize, nested=nested)
    layer.replaced = qualified_name(type(module))
    return layer


def qualified_name(cls: type) -> str:
    """A class as `module.Class`."""
    return f"{cls.__module__}.{cls.__qualname__}"


def choose(
    model: nn.Module, blocksize: int, skip_modules: Iterable[str] | None
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """What `quantize` converts: path to module of the linears, and path to module of the expert tensors.

    Raises:
        TargetModuleError: a name in `skip_modules` matches nothing, or no linear is left to quantise.
        ConfigError: a block size that the format does not have.
    """
    if type(blocksize) is not int or blocksize not in BLOCKSIZES:
        raise ConfigError(f"quantize: blocksize={blocksize!r} must be one of {BLOCKSIZES}")
    skipped, kept = as_names("skip_modules", skip_modules or ()), kept_dense(model)
    linears, experts = linear_modules(model), dict[str, nn.Module]()
    for path, module in model.named_modules():
        tensors = expert_tensors(module)
        if tensors and not unserved_experts(module, tensors, blocksize):
            experts |= {f"{path}.{name}": module for name in tensors}
    known = [*linears, *experts, *(path.rpartition(".")[0] for path in experts)]
    for name in skipped:
        if not any(named([name], path) for path in known):
            raise TargetModuleError(f"skip_modules: {name!r} matches no linear module")
    linears = {
        path: module
        for path, module in linears.items()
        if path not in kept
        and getattr(module, "weight", None) is not None
        and module.weight.is_floating_point()  # type: ignore[operator]
        and not named(skipped, path)
    }
    experts = {
        path: module
        for path, module in experts.items()
        if not named(skipped, path) and not named(skipped, path.rpartition(".")[0])
    }
    if not linears and not experts:
        raise TargetModuleError(f"{type(model).__name__} has no dense linear layer to quantise")
    return linears, experts


def check_finite(path: str, weight: Tensor) -> None:
    """Raise NonFiniteError for a weight that holds NaN or infinity."""
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"{path} holds NaN or infinity. The model is unchanged")


def _check(
    model: nn.Module, blocksize: int, nested: bool, skip_modules: Iterable[str] | None
) -> dict[int | tuple[int, str], str]:
    """All of `quantize`'s checks: id of each module to convert, with the name of the parameter for experts,
    to its path. No module or weight is held afterwards, so that the caller can free them."""
    if adapted_modules(model):
        raise AdapterStateError("quantize the model before adapters are applied or loaded")
    linears, experts = choose(model, blocksize, skip_modules)
    dense = {f"{path}.weight": served_weight(path, m).dense() for path, m in linears.items()}
    dense |= {path: m._parameters[path.rpartition(".")[2]] for path, m in experts.items()}  # type: ignore[misc]
    refuse_meta("quantize", dense.items())
    for path, weight in dense.items():
        check_finite(path, weight)
    # The largest layer of each device needs the most memory: it runs out of it here, or no layer does.
    by_size = sorted(dense.values(), key=lambda weight: weight.nbytes)
    for weight in {weight.device: weight for weight in by_size}.values():
        if weight.ndim == 2:
            NF4Linear.from_weight(DenseWeight(weight), blocksize=blocksize, nested=nested)
        else:
            quantize_experts(weight, blocksize=blocksize, nested=nested)
    chosen: dict[int | tuple[int, str], str] = {id(m): path for path, m in linears.items()}
    return chosen | {(id(m), path.rpartition(".")[2]): path for path, m in experts.items()}
