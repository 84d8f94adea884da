# SPDX-License-Identifier: Apache-2.0
"""The experts of a mixture with their 3-D tensors in NF4.

transformers keeps all experts of a layer in one module whose parameters are [experts, out, in]. Here each of
them is an `NF4Tensor` beside its name: `experts.gate_up_proj` becomes `experts.nf4_gate_up_proj`, with the
state-dict keys that every NF4 weight has (`experts.nf4_gate_up_proj.weight`, `....weight.absmax` and so on).
The module's class becomes a subclass of its own whose forward takes one expert after another through
`nf4_linear`, so that only those which tokens go to are read, and the backward keeps none of them dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyfast.errors import UnsupportedError
from pyfast.nn.nf4 import NF4Tensor, nf4_of
from pyfast.nn.weight import DENSE_DTYPES, DenseWeight, NF4Weight
from pyfast.ops._check import NEST_BLOCK
from pyfast.ops.nf4 import flat_scales

PREFIX = (
    "nf4_"  # no suffix: transformers takes names that begin with a parameter's for that parameter
)
_MARKS = {"is_transposed", "has_gate", "has_bias", "num_experts"}


def expert_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """The dense 3-D parameters of a module that transformers takes for experts; no other module has any."""
    if not vars(module).keys() >= _MARKS or not hasattr(module, "_apply_gate"):
        return {}
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.dtype in DENSE_DTYPES
    }


def quantized_experts(module: nn.Module) -> dict[str, NF4Tensor]:
    """The NF4 tensors of a module of experts, by the names of the parameters that they stand for."""
    if not isinstance(module, NF4Experts):
        return {}
    return {
        name.removeprefix(PREFIX): child
        for name, child in module._modules.items()
        if name.startswith(PREFIX) and isinstance(child, NF4Tensor)
    }


def unserved_experts(module: Any, tensors: Mapping[str, Tensor], blocksize: int) -> str:
    """Why a module's experts cannot be held in NF4; empty if they can."""
    if module.is_transposed:
        return "its experts are stored as [experts, in, out]"
    for name, tensor in tensors.items():
        if tensor[0].numel() % blocksize:
            return (
                f"an expert of {name} has {tensor[0].numel()} weights, no multiple of {blocksize}"
            )
    return ""


def quantize_experts(tensor: Tensor, *, blocksize: int, nested: bool) -> NF4Tensor:
    """A 3-D tensor in NF4, as bitsandbytes would quantise it whole."""
    weight = nf4_of(tensor.detach(), blocksize=blocksize, nested=nested)
    return NF4Tensor(weight, tuple(tensor.shape))


def put_experts(module: nn.Module, name: str, tensor: NF4Tensor) -> None:
    """Put an NF4 tensor in the place of one of a module's parameters."""
    del module._parameters[name]
    module.add_module(PREFIX + name, tensor)
    inner = type(module).__mro__[2] if isinstance(module, NF4Experts) else type(module)
    module.__class__ = _experts_class(inner, tuple(quantized_names(module)))


def make_dense(module: nn.Module) -> None:
    """Put dense parameters, frozen, in the place of a module's NF4 tensors."""
    for name, tensor in quantized_experts(module).items():
        del module._modules[PREFIX + name]
        module._parameters[name] = nn.Parameter(tensor.dense(), requires_grad=False)
    if isinstance(module, NF4Experts):
        module.__class__ = type(module).__mro__[2]


def quantized_names(module: nn.Module) -> list[str]:
    """The parameters of a module that are NF4 tensors now."""
    held = module._modules.items()
    return [n.removeprefix(PREFIX) for n, child in held if isinstance(child, NF4Tensor)]


def projections(module: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Name to [experts, out, in] of the 3-D tensors by which a module of experts projects, dense or NF4, in
    the order that transformers has their parameters in."""
    held: Any = module
    found = {name: tuple(tensor.shape) for name, tensor in expert_tensors(module).items()}
    found |= {name: tensor.shape for name, tensor in quantized_experts(module).items()}
    shapes = {}
    for name in (first_projection(held), "down_proj") if found else ():
        if name in found:
            experts, *ends = found[name]
            out, inner = reversed(ends) if held.is_transposed else ends
            shapes[name] = (experts, out, inner)
    return shapes


def first_projection(module: Any) -> str:
    """The projection that reads a module's input."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def expert_weight(module: Any, name: str, index: int) -> DenseWeight | NF4Weight:
    """One expert's matrix [out, in] and its bias.

    Raises:
        UnsupportedError: its NF4 weights are on the meta device, where accelerate keeps what is offloaded.
    """
    bias = getattr(module, f"{name}_bias")[index] if module.has_bias else None
    held = module._modules.get(PREFIX + name)
    if held is not None:
        if held.weight.is_meta:
            raise UnsupportedError(
                f"the NF4 weights of {type(module).__name__} were offloaded by themselves and are not back "
                f"when it runs; offload with preload_module_classes=[{type(module).__name__!r}]"
            )
        return replace(_expert(held, index), bias=bias)
    tensor = getattr(module, name)[index]
    return DenseWeight(tensor.t() if module.is_transposed else tensor, bias)


Project = Callable[[str, DenseWeight | NF4Weight, int, Tensor], Tensor]


def project(name: str, weight: DenseWeight | NF4Weight, index: int, x: Tensor) -> Tensor:
    """The product with an expert's frozen matrix alone."""
    if isinstance(weight, NF4Weight):
        return weight.linear(x)
    return nn.functional.linear(x, weight.tensor, weight.bias)


def experts_forward(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    project: Project = project,
) -> Tensor:
    """Each token's chosen experts, weighted and added up.

    Args:
        module: experts by transformers' rules.
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k]; a number that no expert has stands for none.
        top_k_weights: [tokens, k].
        project: gives the product of some rows with an expert's matrix; told the parameter's name too.
    """
    result = torch.zeros_like(hidden_states)
    for index in torch.unique(top_k_index).tolist():
        if not 0 <= index < module.num_experts:
            continue
        tokens, slots = torch.where(top_k_index == index)
        name, x = first_projection(module), hidden_states[tokens]
        x = project(name, expert_weight(module, name, index), index, x)
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = project("down_proj", expert_weight(module, "down_proj", index), index, x)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        x = x * top_k_weights[tokens, slots, None]
        result.index_add_(0, tokens, x.to(result.dtype))
    return result


class NF4Experts:
    """Mixed in front of a class of experts."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `experts_forward`."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made here and not found by its name, so that pickle and copy must make it again.
        names = tuple(quantized_names(self))  # type: ignore[arg-type]
        return _blank, (type(self).__mro__[2], names), self.__getstate__()


def _expert(held: NF4Tensor, index: int) -> NF4Weight:
    """The view of one expert's matrix."""
    _, rows, columns = held.shape
    weight, numel = held.nf4_weight(), rows * columns
    blocks = numel // weight.blocksize
    first = index * blocks
    absmax, nested = weight.absmax[first : first + blocks], weight.nested_absmax
    offset = weight.nested_offset
    if nested is not None:
        nested = nested[first // NEST_BLOCK : -(-(first + blocks) // NEST_BLOCK)]
        if first % NEST_BLOCK:  # it starts inside a block of nested scales
            before = first % NEST_BLOCK
            codes = weight.absmax[first - before : first + blocks]
            absmax = flat_scales(codes, nested, offset)[before:].contiguous()
            nested, offset = None, None
    packed = weight.packed[index * numel // 2 : (index + 1) * numel // 2]
    shape = (rows, columns)
    return NF4Weight(packed, absmax, shape, weight.original_dtype, weight.blocksize, nested, offset)


@cache
def _experts_class(cls: Any, names: tuple[str, ...]) -> type[nn.Module]:
    dense = {name: _dense_property(name) for name in names}
    made = type(cls.__name__, (NF4Experts, cls), {"__module__": cls.__module__, **dense})
    made.__qualname__ = cls.__qualname__
    return made


def _dense_property(name: str) -> property:
    """For code that reads the parameter itself: the tensor dequantised."""

    def dense(module: Any) -> Tensor:
        held: NF4Tensor = module._modules[PREFIX + name]
        return held.dense()

    return property(dense)


def _blank(cls: Any, names: tuple[str, ...]) -> nn.Module:
    made = _experts_class(cls, names)
    return made.__new__(made)
