# SPDX-License-Identifier: Apache-2.0
"""Inputs that a backward makes again instead of keeping them.

The down projection of a gated MLP reads h = act(gate) * up. Autograd keeps the two factors for the product's
own backward, so keeping h as well, as wide as each of them, is half as much again. A layer that needs h for a
gradient of its own asks `recipe` for a way to make it from what the product has kept: the same bits. So does
a group for the output of the norm ahead of it, once for all members.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyfast import _extension
from pyfast.errors import UnsupportedError
from pyfast.ops._scratch import raw_stream

LEAST = 1 << 22
"""Elements from which on it pays: below, the launch costs more than the memory is worth."""


def saved_tensors_are_hooked() -> bool:
    """Whether somebody keeps what autograd saves, as checkpoints do; never while compiling."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def recipe(x: Tensor, norms: bool = False) -> Callable[[], Tensor] | None:
    """How to make `x` again once its backward has begun; None where it must be kept.

    Known are torch's `a * b` where both factors are kept, Liger's fused SwiGLU and GEGLU, and, if `norms`,
    its RMSNorm as Llama's; other norms keep too little to give the same bits. Nothing is made again under
    saved-tensor hooks (checkpointing, offloading), those of now or of the product: they keep things in
    their own way.
    """
    node = x.grad_fn
    if node is None or type(x) is not Tensor or x.numel() < LEAST or x._version:
        return None
    name = type(node).__name__
    make = _PRODUCTS.get(name) or (_NORMS.get(name) if norms else None)
    if make is None or torch.compiler.is_compiling():
        return None
    if saved_tensors_are_hooked():
        return None
    try:
        return make(node, x)
    except RuntimeError:  # a backward of its own has freed what it kept
        return None


def _hooked(*kept: Any) -> bool:
    """Whether hooks keep one of a node's raw saved tensors: a hook may serve one reading alone. Where torch
    does not tell, there are taken to be none."""
    return any(getattr(each, "unpack_hook", None) is not None for each in kept)


def _product(node: Any, x: Tensor) -> Callable[[], Tensor] | None:
    """Of torch's product: both factors are kept if both want a gradient."""
    if _hooked(node._raw_saved_self, node._raw_saved_other):
        return None
    for factor in (node._saved_self, node._saved_other):
        if factor is None or factor.shape != x.shape or factor.dtype is not x.dtype:
            return None
    return lambda: node._saved_self * node._saved_other


class _NoContext:
    """Takes what a Function's forward leaves for its backward, and drops it."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


class _Liger:
    """Of Liger's products of two tensors; their backward writes over the factors, so it works once."""

    def __init__(self, node: Any, numbers: tuple[str, ...], shape: torch.Size) -> None:
        self.node, self.numbers, self.shape, self.spent = node, numbers, shape, False

    def __call__(self) -> Tensor:
        if self.spent:
            raise UnsupportedError(
                "lora_linear: a second backward through a product of Liger's, whose first one overwrote its "
                "inputs. Fix: call backward once on the sum of the losses, or leave Liger's MLP kernels out."
            )
        self.spent = True
        numbers = [getattr(self.node, name) for name in self.numbers]
        made: Tensor = self.node._forward_cls.forward(
            _NoContext(), *self.node.saved_tensors, *numbers
        )
        return made.view(self.shape)  # the factors are kept as matrices


def _liger(*numbers: str) -> _Make:
    def make(node: Any, x: Tensor) -> Callable[[], Tensor] | None:
        if not node._forward_cls.__module__.startswith("liger_kernel."):
            return None
        if _hooked(*node._raw_saved_tensors):
            return None
        kept = node.saved_tensors
        known = len(kept) == 2 and all(hasattr(node, name) for name in numbers)
        fits = known and all(factor.numel() == x.numel() for factor in kept)
        return _Liger(node, numbers, x.shape) if fits else None

    return make


def _liger_norm(node: Any, x: Tensor) -> Callable[[], Tensor] | None:
    """Of Liger's RMSNorm in mode 0: rounded after the division, and again after the weight, as Llama's."""
    names = ("casting_mode", "offset", "elementwise_affine")
    if not node._forward_cls.__module__.startswith("liger_kernel."):
        return None
    if [getattr(node, name, None) for name in names] != [0, 0.0, True]:
        return None
    if _hooked(*node._raw_saved_tensors):
        return None
    kept = node.saved_tensors
    if len(kept) != 3 or kept[0].numel() != x.numel() or kept[1].dtype is not x.dtype:
        return None

    x_shape = x.shape
    return lambda: _normed(*node.saved_tensors).view(x_shape)


@torch.no_grad()
def _normed(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """round(round(x inverse) weight), x [M, K], weight [K], inverse [M] in float32."""
    y = torch.empty_like(x)
    k = x.shape[-1]
    if _has_kernel(x, weight, inverse):
        device = x.get_device()
        _extension.C.remake_norm(
            device, raw_stream(device), _extension.DTYPES[x.dtype], x.numel() // k, k,
            x.data_ptr(), inverse.data_ptr(), weight.data_ptr(), y.data_ptr(),
        )  # fmt: skip
        return y
    torch.mul(x, inverse[:, None], out=y)
    return y.mul_(weight)


def _has_kernel(x: Tensor, weight: Tensor, inverse: Tensor) -> bool:
    return (
        x.is_cuda
        and _extension.has_cuda()
        and x.dtype in (torch.float16, torch.bfloat16)
        and inverse.dtype is torch.float32
        and x.shape[-1] % 8 == 0
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (x, weight, inverse))
    )


_Make = Callable[[Any, Tensor], Callable[[], Tensor] | None]
_NORMS: dict[str, _Make] = {"LigerRMSNormFunctionBackward": _liger_norm}
_PRODUCTS: dict[str, _Make] = {
    "MulBackward0": _product,
    "LigerSiLUMulFunctionBackward": _liger("gate_multiplier", "down_multiplier"),
    "LigerGELUMulFunctionBackward": _liger(),
}
