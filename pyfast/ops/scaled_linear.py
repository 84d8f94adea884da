# SPDX-License-Identifier: Apache-2.0
"""The linear layer whose inputs are scaled by a learned vector (IA3), forward and backward.

Letters: M tokens, N out features, K in features.

    y = (x * s) W^T + bias      D = dy W      dx = D * s      ds = sum over rows of D * x

Scaling W's columns instead of x's gives the same product with as many roundings: on CUDA the smaller of the
two is scaled, so that nothing of x's size is made beside x. The backward is one GEMM there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfast import _extension
from pyfast.errors import UnsupportedError
from pyfast.ops import _check, _library
from pyfast.ops._adapter_launch import scale_into
from pyfast.ops._autocast import cast_for_autocast
from pyfast.ops._lora_launch import copied, in_place, stored
from pyfast.ops._remake import saved_tensors_are_hooked
from pyfast.ops._scratch import raw_stream, scratch, scratch_lock, workspace
from pyfast.ops.adapter import adapter_scale
from pyfast.ops.nf4 import FLOATS

_COMPUTE = (*FLOATS, torch.float64)


def _linear_fake(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    op = "scaled_linear"
    _check.check_dtype(op, "x", x, _COMPUTE)
    _check.check_dtype(op, "scale", scale, _COMPUTE)
    k, n = _check.features(op, "x", x), _check.rows(op, "weight", weight)
    _check.check_shape(op, "weight", weight, (n, k))
    _check.check_weight(op, "weight", weight, x)
    _check.check_shape(op, "scale", scale, (k,))
    if bias is not None:
        _check.check_shape(op, "bias", bias, (n,))
        _check.check_dtype(op, "bias", bias, (x.dtype,))
    _check.check_same_device(op, x, weight=weight, scale=scale, bias=bias)
    return x.new_empty((*x.shape[:-1], n))


def _linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _linear_fake(x, weight, scale, bias)
    return F.linear(_library.OPS["adapter_scale"].reference(x, scale), weight, bias)


@_library.planned
def _scales_weight(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether W has fewer elements than x, and there is something to multiply. Not in float16, where weights
    times factors may be so small that digits are lost."""
    _linear_fake(x, weight, scale, bias)
    fewer = x.shape[:-1].numel() > weight.shape[0]
    return fewer and weight.numel() > 0 and x.dtype is not torch.float16


def _linear_kernel(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if not _scales_weight(x, weight, scale, bias):
        _library.record("scaled_linear", "scaled_linear_input")
        return F.linear(_library.OPS["adapter_scale"].call(x, scale), weight, bias)
    _library.record("scaled_linear", "scaled_linear_weight")
    with scratch_lock:
        scaled = scratch(weight.numel(), x).view(weight.shape)
        scale_into(scaled, weight, scale)
        return F.linear(x, scaled, bias)


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    want_x, want_scale = wanted
    return x.new_empty(x.shape if want_x else (0,)), scale.new_empty(
        scale.shape if want_scale else (0,)
    )


def _composed(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """torch's product, then both gradients from it."""
    dy_mn = grad_y.reshape(x.shape[:-1].numel(), weight.shape[0])
    product = (dy_mn @ weight).view(x.shape)
    grads: tuple[Tensor, Tensor]
    grads = _library.OPS["adapter_scale_backward"].call(product, x, scale, wanted)
    return grads


class _Plan(NamedTuple):
    """What every backward for one signature shares."""

    reason: str
    """Why torch makes the product; the rest is then unset."""
    device: int = 0
    sizes: tuple[int, ...] = ()
    """Code of the scale's dtype, M, N and K."""
    pitch_dy: int = 0
    """0 where dy needs a copy, as x does by its own."""
    pitch_x: int = 0
    pitch_w: int = 0
    counters: int = 0
    """Bytes of zeros ahead of the workspace, as all kernels of a stream have them, and of both."""
    space: int = 0


@_library.planned
def _backward_plan(grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, want_x: bool) -> _Plan:
    if reason := _extension.missing_cuda():
        return _Plan(reason)
    if x.dtype is not torch.bfloat16 or grad_y.dtype is not torch.bfloat16:
        return _Plan(f"the GEMM is for bfloat16, not {x.dtype}")
    if scale.dtype not in _extension.DTYPES:
        return _Plan(f"there are kernels for halves and float32, not {scale.dtype}")
    if not want_x:
        return _Plan("the input wants no gradient")
    n, k = weight.shape
    if x.numel() == 0 or n == 0:
        return _Plan("there is nothing to multiply")
    w_fits, by_out, pitch_w = stored(weight)
    if not (w_fits and by_out) or pitch_w % 8 or weight.data_ptr() % 16:
        return _Plan("the weight must be stored by out feature, in units of 16 bytes")
    m, device = x.numel() // k, x.device.index
    if reason := _extension.C.scaled_linear_missing(device, m, n, k):
        return _Plan(reason)
    (dy_fits, pitch_dy), (x_fits, pitch_x) = in_place(grad_y, n), in_place(x, k)
    counters = 4 * _extension.C.lora_counters
    return _Plan(
        "",
        device,
        (_extension.DTYPES[scale.dtype], m, n, k),
        pitch_dy if dy_fits else 0,
        pitch_x if x_fits else 0,
        pitch_w,
        counters,
        counters + _extension.C.scaled_linear_workspace(m, k),
    )


def _backward_kernel(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    want_x, want_scale = wanted
    plan = _backward_plan(grad_y, x, weight, scale, want_x)
    if plan.reason:
        _library.record("scaled_linear_backward", f"scaled_linear_backward_torch ({plan.reason})")
        return _composed(grad_y, x, weight, scale, wanted)
    _, _, n, k = plan.sizes
    grad_x, grad_scale = x.new_empty(x.shape), scale.new_empty(k if want_scale else 0)
    grad_y = grad_y if plan.pitch_dy else copied(grad_y)
    x = x if plan.pitch_x else copied(x)
    factors = scale.float().contiguous()
    stream = raw_stream(plan.device)
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        name = _extension.C.scaled_linear_backward(
            plan.device, stream, *plan.sizes, grad_y.data_ptr(), plan.pitch_dy or n,
            weight.data_ptr(), plan.pitch_w, x.data_ptr(), plan.pitch_x or k, factors.data_ptr(),
            space.data_ptr() + plan.counters, grad_x.data_ptr(),
            grad_scale.data_ptr() if want_scale else 0,
        )  # fmt: skip
    _library.record("scaled_linear_backward", name)
    return grad_x, grad_scale


_backward = _library.define(
    "scaled_linear_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor scale, bool[] wanted) "
    "-> (Tensor, Tensor)",
    fake=_backward_fake,
    reference=_composed,
    kernel=_backward_kernel,
    devices=("CUDA",),
)


class _ScaledLinear(torch.autograd.Function):
    """The formulas of this file; dbias = sum of dy over rows. The weight has no gradient."""

    @staticmethod
    def forward(ctx, below, x, weight, scale, bias):  # type: ignore[no-untyped-def]
        if ctx.needs_input_grad[2]:
            raise UnsupportedError(
                "scaled_linear: the weight wants a gradient, which only frozen ones go without. Fix: "
                "F.linear(adapter_scale(x, scale), weight, bias)"
            )
        ctx.save_for_backward(x, weight, scale)
        return below(x, weight, scale, bias)

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        _, want_x, _, want_scale, want_bias = ctx.needs_input_grad
        grad_x = grad_scale = grad_bias = None
        if want_x or want_scale:
            grad_x, grad_scale = _backward(grad_y, *ctx.saved_tensors, [want_x, want_scale])
        if want_bias:
            grad_bias = grad_y.sum_to_size(grad_y.shape[-1:])
        return None, grad_x if want_x else None, None, grad_scale if want_scale else None, grad_bias


_linear = _library.define(
    "scaled_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    fake=_linear_fake,
    reference=_linear_reference,
    kernel=_linear_kernel,
    devices=("CUDA",),
    autograd=_ScaledLinear,
)


def scaled_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = (x * scale) W^T + bias over a frozen W; differentiable in x, scale and bias.

    Either x or W is multiplied with the scale, in float32 for half types and rounded once to x's dtype. Where
    W wants a gradient, autocast casts or saved tensors are hooked, as in checkpoints (which stop their second
    forward ahead of the last product), it is `F.linear(adapter_scale(x, scale), weight, bias)`.

    Args:
        x: [..., K], floating point.
        weight: W [N, K] of x's dtype.
        scale: [K], any floating-point dtype; its gradient has that dtype.
        bias: [N]; cast to x's dtype.

    Returns:
        [..., N] of x's dtype; under autocast of its dtype.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: W's dtype is not x's.
        UnsupportedError: x is a nested tensor.
    """
    cast, cast_weight = cast_for_autocast(x, weight)
    casts = cast is not x or cast_weight is not weight
    if weight.requires_grad or casts or saved_tensors_are_hooked():
        return F.linear(adapter_scale(x, scale), weight, bias)
    y: Tensor = _linear(x, weight, scale, bias if bias is None else bias.to(x.dtype))
    return y
