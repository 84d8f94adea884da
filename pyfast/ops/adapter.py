# SPDX-License-Identifier: Apache-2.0
"""Small adapters: IA3's scaling and the bottleneck adapter, forward and backward.

Letters: M tokens, K features, R bottleneck size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyfast.ops import _adapter_launch, _check, _library
from pyfast.ops._autocast import cast_for_autocast
from pyfast.ops.nf4 import FLOATS

_COMPUTE = (*FLOATS, torch.float64)
ACTIVATIONS = ("silu", "gelu", "relu")

# --- adapter_scale ------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    """float32 for half types: their products are exact there."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale, contiguous: multiplied in float32 or wider, rounded once to x's dtype, in one launch."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.mul(x, scale, out=out)


def _scale_fake(x: Tensor, scale: Tensor) -> Tensor:
    _check.check_dtype("adapter_scale", "x", x, _COMPUTE)
    _check.check_dtype("adapter_scale", "scale", scale, _COMPUTE)
    _check.check_shape("adapter_scale", "scale", scale, (_check.features("adapter_scale", "x", x),))
    _check.check_same_device("adapter_scale", x, scale=scale)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scale_reference(x: Tensor, scale: Tensor) -> Tensor:
    _scale_fake(x, scale)
    return _scaled(x, scale)


def _scale_kernel(x: Tensor, scale: Tensor) -> Tensor:
    out = _scale_fake(x, scale)
    _library.record("adapter_scale", _adapter_launch.scale_into(out, x, scale))
    return out


def _scale_backward_fake(
    grad_y: Tensor, x: Tensor, scale: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    want_x, want_scale = wanted
    return x.new_empty(x.shape if want_x else (0,)), scale.new_empty(
        scale.shape if want_scale else (0,)
    )


def _scale_backward_reference(
    grad_y: Tensor, x: Tensor, scale: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_x, grad_scale = x.new_empty(0), scale.new_empty(0)
    if wanted[0]:
        grad_x = _scaled(grad_y, scale)
    if wanted[1]:
        products = (_wide(grad_y) * x).reshape(math.prod(x.shape[:-1]), x.shape[-1])
        grad_scale = products.sum(0).to(scale.dtype)
    return grad_x, grad_scale


def _scale_backward_kernel(
    grad_y: Tensor, x: Tensor, scale: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    op, args = "adapter_scale_backward", (grad_y, x, scale)
    if (plan := _adapter_launch.scale_plan(*args)).reason:
        result: tuple[Tensor, Tensor] = _library.fall_back(op, plan.reason, *args, wanted)
        return result
    return _adapter_launch.scale_backward(plan, *args, wanted)


_scale_backward = _library.define(
    "adapter_scale_backward(Tensor grad_y, Tensor x, Tensor scale, bool[] wanted) "
    "-> (Tensor, Tensor)",
    fake=_scale_backward_fake,
    reference=_scale_backward_reference,
    kernel=_scale_backward_kernel,
    devices=("CUDA",),
)


class _AdapterScale(torch.autograd.Function):
    """dx = dy * scale; dscale = sum of dy * x over rows."""

    @staticmethod
    def forward(ctx, below, x, scale):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale)
        return below(x, scale)

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[1:]
        grads = _scale_backward(grad_y, *ctx.saved_tensors, wanted)
        return None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True))


_scale = _library.define(
    "adapter_scale(Tensor x, Tensor scale) -> Tensor",
    fake=_scale_fake,
    reference=_scale_reference,
    kernel=_scale_kernel,
    devices=("CUDA",),
    autograd=_AdapterScale,
)


def adapter_scale(x: Tensor, scale: Tensor) -> Tensor:
    """y = x * scale along the last axis: IA3 (Liu et al., "Few-shot PEFT is better ...", 2022).

    The product is formed in float32 for half types and rounded once to x's dtype.

    Args:
        x: [..., K], floating point.
        scale: [K], any floating-point dtype; its gradient has that dtype.

    Returns:
        [..., K] of x's dtype.

    Raises:
        ValueError: scale is not [K] or lies on another device.
        UnsupportedError: x is a nested tensor.
    """
    y: Tensor = _scale(x, scale)
    return y


# --- adapter_bottleneck -------------------------------------------------------------------------

_BOTTLENECK = (
    "Tensor x, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, Tensor? norm_weight, "
    "Tensor? norm_bias, str activation, float eps"
)


def _normed(
    x_mk: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if weight is None:
        return x_mk, None, None
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm(
        x_mk, (x_mk.shape[1],), weight, bias, eps
    )
    return out


def _activate(h: Tensor, activation: str) -> Tensor:
    out: Tensor = getattr(torch.nn.functional, activation)(h)
    return out


def _activate_backward(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "silu":
        out = aten.silu_backward(grad, h)
    elif activation == "gelu":
        out = aten.gelu_backward(grad, h)
    else:
        out = aten.threshold_backward(grad, h, 0)
    return out  # type: ignore[no-any-return]


def _bottleneck_fake(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, activation: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "adapter_bottleneck"
    _check.check_dtype(op, "x", x, _COMPUTE)
    k, r = _check.features(op, "x", x), _check.rows(op, "down", down)
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias needs norm_weight; without one there is no norm")
    sizes = {
        "down": (down, (r, k)),
        "up": (up, (k, r)),
        "down_bias": (down_bias, (r,)),
        "up_bias": (up_bias, (k,)),
        "norm_weight": (norm_weight, (k,)),
        "norm_bias": (norm_bias, (k,)),
    }
    for name, (tensor, shape) in sizes.items():
        if tensor is not None:
            _check.check_shape(op, name, tensor, shape)
            _check.check_dtype(op, name, tensor, (x.dtype,))
    _check.check_same_device(op, x, down=down, up=up, norm_weight=norm_weight)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
    m = math.prod(x.shape[:-1])
    stats = x.new_empty(_adapter_launch.stats_shape(m, r, norm_weight), dtype=torch.float32)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty((m, r)), stats


def _bottleneck_reference(
    x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor | None, up_bias: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, activation: str, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _bottleneck_fake(x, down, up, down_bias, up_bias, norm_weight, norm_bias, activation, eps)
    x_mk = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    n_mk, mean, rstd = _normed(x_mk, norm_weight, norm_bias, eps)
    h_mr = torch.nn.functional.linear(n_mk, down, down_bias)
    y_mk = torch.addmm(x_mk, _activate(h_mr, activation), up.t())
    if up_bias is not None:
        y_mk = y_mk + up_bias
    stats = x.new_empty((0, 2), dtype=torch.float32)
    if norm_weight is not None and mean is not None and rstd is not None:
        stats = _adapter_launch.stats_by_torch(mean, rstd, down, down_bias, norm_weight, norm_bias)
    return _library.shaped(y_mk, x), h_mr, stats


def _bottleneck_backward_fake(
    grad_y: Tensor, h: Tensor, x: Tensor, down: Tensor, up: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, activation: str, eps: float, wanted: list[bool],
    stats: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    k, r = up.shape
    shapes = (x.shape, down.shape, up.shape, (r,), (k,), (k,), (k,))
    return tuple(
        x.new_empty(tuple(shape) if want else (0,))
        for shape, want in zip(shapes, wanted, strict=True)
    )


def _bottleneck_backward_reference(
    grad_y: Tensor, h: Tensor, x: Tensor, down: Tensor, up: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, activation: str, eps: float, wanted: list[bool],
    stats: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    want_x, want_down, want_up, want_down_bias, want_up_bias, want_norm_w, want_norm_b = wanted
    m, k = h.shape[0], x.shape[-1]
    dy_mk, x_mk = grad_y.reshape(m, k), x.reshape(m, k)
    grads: list[Tensor | None] = [None] * 7
    if want_up:
        grads[2] = dy_mk.t() @ _activate(h, activation)
    if want_up_bias:
        grads[4] = dy_mk.sum(0)
    want_n = want_x or want_norm_w or want_norm_b
    if want_n or want_down or want_down_bias:
        dh_mr = _activate_backward(dy_mk @ up, h, activation)
    if want_down_bias:
        grads[3] = dh_mr.sum(0)
    if want_n or want_down:
        n_mk, mean, rstd = _normed(x_mk, norm_weight, norm_bias, eps)
    if want_down:
        grads[1] = dh_mr.t() @ n_mk
    if want_n:
        dn_mk = dh_mr @ down
        if norm_weight is not None:
            dn_mk, grads[5], grads[6] = torch.ops.aten.native_layer_norm_backward(
                dn_mk, x_mk, (k,), mean, rstd, norm_weight, norm_bias,
                [want_x, want_norm_w, want_norm_b],
            )  # fmt: skip
        if want_x:
            grads[0] = (dy_mk + dn_mk).view(x.shape)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@_library.planned
def _backward_plan(
    grad_y: Tensor, h: Tensor, x: Tensor, down: Tensor, up: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, activation: str, stats: Tensor | None,
) -> _adapter_launch.Plan:  # fmt: skip
    if norm_weight is not None and stats is None:
        return _adapter_launch.Plan("the norm's statistics were not handed on")
    others = (h, up, norm_weight, norm_bias, stats)
    return _adapter_launch.plan(x, down, others, activation, grad_y)


def _bottleneck_backward_kernel(*args: Any) -> tuple[Tensor, ...]:
    stats = args[10] if len(args) > 10 else None
    plan = _backward_plan(*args[:8], stats)
    if plan.reason:
        result: tuple[Tensor, ...]
        result = _library.fall_back("adapter_bottleneck_backward", plan.reason, *args)
        return result
    return _adapter_launch.backward(plan, *args)


_bottleneck_backward = _library.define(
    "adapter_bottleneck_backward(Tensor grad_y, Tensor h, Tensor x, Tensor down, Tensor up, "
    "Tensor? norm_weight, Tensor? norm_bias, str activation, float eps, bool[] wanted, "
    "Tensor? stats=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_bottleneck_backward_fake,
    reference=_bottleneck_backward_reference,
    kernel=_bottleneck_backward_kernel,
    devices=("CUDA",),
)


class _Bottleneck(torch.autograd.Function):
    """With n = norm(x), h = n D^T + d, u = act(h): dh = act'(h) * (dy U); dx = dy + norm'(dh D)."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, below, x, down, up, down_bias, up_bias, norm_weight, norm_bias, activation, eps
    ):
        y, h, stats = below(
            x, down, up, down_bias, up_bias, norm_weight, norm_bias, activation, eps
        )
        ctx.save_for_backward(h, x, down, up, norm_weight, norm_bias, stats)
        ctx.constants = (activation, eps)
        ctx.mark_non_differentiable(h, stats)
        return y, h, stats

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, grad_y, *_):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[1:8]
        *saved, stats = ctx.saved_tensors
        grads = _bottleneck_backward(grad_y, *saved, *ctx.constants, wanted, stats)
        return (
            None,
            *(grad if want else None for grad, want in zip(grads, wanted, strict=True)),
            None,
            None,
        )


@_library.planned
def _forward_plan(*args: Any) -> _adapter_launch.Plan:
    _bottleneck_fake(*args)
    x, down, *others, activation, _ = args
    return _adapter_launch.plan(x, down, tuple(others), activation)


def _bottleneck_kernel(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    plan = _forward_plan(*args)
    if plan.reason:
        result: tuple[Tensor, Tensor, Tensor]
        result = _library.fall_back("adapter_bottleneck", plan.reason, *args)
        return result
    return _adapter_launch.forward(plan, *args)


_bottleneck = _library.define(
    f"adapter_bottleneck({_BOTTLENECK}) -> (Tensor, Tensor, Tensor)",
    fake=_bottleneck_fake,
    reference=_bottleneck_reference,
    kernel=_bottleneck_kernel,
    devices=("CUDA",),
    autograd=_Bottleneck,
)


def adapter_bottleneck(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    activation: str = "silu",
    eps: float = 1e-5,
) -> Tensor:
    """y = x + act(norm(x) D^T + d) U^T + u: the bottleneck adapter of Houlsby et al. (2019).

    With a LayerNorm weight, no biases and silu it is NeMo's canonical adapter; without a norm it is the
    plain form. Computed in x's dtype (under autocast: the autocast dtype); the parameters are cast to it.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        down: D [R, K].
        up: U [K, R].
        down_bias: d [R].
        up_bias: u [K].
        norm_weight: LayerNorm weight [K]; None means no norm.
        norm_bias: LayerNorm bias [K].
        activation: "silu", "gelu" (the exact one) or "relu".
        eps: of the LayerNorm.

    Returns:
        [..., K] of the compute dtype.

    Raises:
        ValueError: a shape, a device or the activation does not fit, or norm_bias comes without
            norm_weight.
        UnsupportedError: x is a nested tensor.
    """
    (x,) = cast_for_autocast(x)
    params = [
        p if p is None else p.to(x.dtype)
        for p in (down, up, down_bias, up_bias, norm_weight, norm_bias)
    ]
    y: Tensor = _bottleneck(x, *params, activation, eps)[0]
    return y
