# SPDX-License-Identifier: Apache-2.0
"""Dropout whose mask is drawn again from a seed instead of being saved.

    y = x * keep / (1 - p)        dx = dy * keep / (1 - p)        keep: see `_philox`

An element that is dropped is 0 whatever x is, NaN included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyfast import _extension
from pyfast.ops import _check, _library, _philox
from pyfast.ops.nf4 import FLOATS, missing_kernel


def _dropout_fake(x: Tensor, p: float, seed: Tensor) -> Tensor:
    _check.check_dtype("dropout", "x", x, (*FLOATS, torch.float64))
    _check.features("dropout", "x", x)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p must be in [0, 1], got {p}")
    _check.check_dtype("dropout", "seed", seed, (torch.int64,))
    _check.check_shape("dropout", "seed", seed, (2,))
    _check.check_same_device("dropout", x, seed=seed)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _dropout_reference(x: Tensor, p: float, seed: Tensor) -> Tensor:
    _dropout_fake(x, p, seed)
    keep = _philox.keep_mask(seed, math.prod(x.shape[:-1]), x.shape[-1], p).view(x.shape)
    return torch.where(keep, x * _philox.keep_scale(p), 0.0).contiguous()


def _dropout_kernel(x: Tensor, p: float, seed: Tensor) -> Tensor:
    if reason := missing_kernel(x, x.dtype):
        result: Tensor = _library.fall_back("dropout", reason, x, p, seed)
        return result
    out = _dropout_fake(x, p, seed)
    x, seed = x.contiguous(), seed.contiguous()
    name = _extension.C.dropout(
        x=x.data_ptr(),
        out=out.data_ptr(),
        dtype=_extension.DTYPES[x.dtype],
        rows=math.prod(x.shape[:-1]),
        columns=x.shape[-1],
        threshold=_philox.threshold(p),
        seed=seed.data_ptr(),
        **_extension.launch_args(x),
    )
    _library.record("dropout", name)
    return out


class _Dropout(torch.autograd.Function):
    """Saves 16 bytes of seed; the gradient is the same op on dy."""

    @staticmethod
    def forward(ctx, below, x, p, seed):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(seed)
        ctx.p = p
        return below(x, p, seed)

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        (seed,) = ctx.saved_tensors
        return None, dropout_op(grad_y, ctx.p, seed), None, None


dropout_op = _library.define(
    "dropout(Tensor x, float p, Tensor seed) -> Tensor",
    fake=_dropout_fake,
    reference=_dropout_reference,
    kernel=_dropout_kernel,
    autograd=_Dropout,
)


def dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """y = x * keep / (1 - p), the mask a function of the seed, the row and the column alone.

    Leading axes count as one: the row of an element is its index in x.view(-1, K). The scale is one over
    the share that is really kept, as p is taken to the nearest multiple of 1 / 256, within 1 / 32 of 0 and of
    1 of 1 / 65536.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        p: probability of dropping an element, in [0, 1].
        seed: int64 [2], a seed and an offset, on x's device; None draws both from the device's default
            generator. It is read where the kernel runs, so a CUDA graph's replay sees its new values.

    Returns:
        [..., K] of x's dtype, contiguous.

    Raises:
        ValueError: p is not in [0, 1], or the seed is not [2] or lies on another device.
        TypeError: x is not floating point, or the seed not int64.
        UnsupportedError: x is a nested tensor.
    """
    if seed is None:
        _library.refuse_nested("dropout", x)  # ahead of the generator's next state
        seed = _philox.new_seed(x.device)
    y: Tensor = dropout_op(x, p, seed)
    return y
