# SPDX-License-Identifier: Apache-2.0
"""The LoRA linear layer over a dense or NF4 weight, forward and backward.

Letters: M tokens, N out features, K in features, R rank. With A [R, K], B [N, R] and scale s
(Hu et al., "LoRA", 2021), and D the dropout of the adapter's input:

    z  = s D(x) A^T                  y  = x W^T + bias + z B^T
    dz = s dy B                      dx = dy W + D(dz A)
    dA = dz^T D(x)                   dB = dy^T z

z is [M, R rounded up to 8], zero beyond R. D multiplies by keep / (1 - p); its mask is drawn again from
(seed, offset), see `_philox`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyfast.ops import _check, _library, _lora_launch, _philox
from pyfast.ops._accumulate import goes_into_grad
from pyfast.ops._autocast import cast_for_autocast
from pyfast.ops._lora_launch import NO_ROOM, Room
from pyfast.ops._remake import recipe
from pyfast.ops.dropout import dropout_op
from pyfast.ops.nf4 import FLOATS
from pyfast.ops.nf4_linear import nf4_linear_backward_op, nf4_linear_op

_COMPUTE = (*FLOATS, torch.float64)
_NF4_ARGS = "Tensor? absmax, Tensor? nested_absmax, Tensor? offset, int blocksize)"


def _check_lora(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, dropout: float,
    seed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, blocksize: int,
) -> None:  # fmt: skip
    _check.check_dtype(op, "x", x, _COMPUTE)
    _check.check_same_device(op, x, weight=weight, bias=bias, lora_A=a, lora_B=b, absmax=absmax)
    r, n, k = (
        _check.rows(op, "lora_A", a),
        _check.rows(op, "lora_B", b),
        _check.features(op, "x", x),
    )
    _check.check_shape(op, "lora_A", a, (r, k))
    _check.check_shape(op, "lora_B", b, (n, r))
    if absmax is None:
        _check.check_shape(op, "weight", weight, (n, k))
        _check.check_weight(op, "weight", weight, x)
    else:
        _check.check_quantized(op, weight, absmax, n * k, blocksize, nested_absmax, offset)
    for name, tensor in (("lora_A", a), ("lora_B", b)):
        _check.check_dtype(op, name, tensor, _COMPUTE)
    if bias is not None:
        _check.check_dtype(op, "bias", bias, (x.dtype,))
        _check.check_shape(op, "bias", bias, (n,))
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{op}: dropout must be in [0, 1], got {dropout}")
    if dropout > 0.0 and seed is None:
        raise ValueError(f"{op}: dropout {dropout} needs a seed, an int64 tensor of two values")


def _dropped(x_mk: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    if dropout == 0.0 or seed is None:
        return x_mk
    out: Tensor = dropout_op(x_mk, dropout, seed)
    return out


def _lora_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, blocksize: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_lora("lora_linear", x, weight, bias, a, b, dropout, seed, absmax, nested_absmax, offset,
                blocksize)  # fmt: skip
    rows = math.prod(x.shape[:-1])
    return x.new_empty((*x.shape[:-1], b.shape[0])), x.new_empty(
        (rows, _lora_launch.padded(a.shape[0]))
    )


def _lora_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, blocksize: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_lora("lora_linear", x, weight, bias, a, b, dropout, seed, absmax, nested_absmax, offset,
                blocksize)  # fmt: skip
    n, k = b.shape[0], x.shape[-1]
    x_mk = x.reshape(math.prod(x.shape[:-1]), k)
    if absmax is None:
        y_mn = torch.nn.functional.linear(x_mk, weight, bias)
    else:
        y_mn = nf4_linear_op(x_mk, weight, absmax, bias, n, blocksize, nested_absmax, offset)
    z_mr = _scaled_product(_dropped(x_mk, dropout, seed), a.to(x.dtype).t(), scale)
    y_mn = torch.addmm(y_mn, z_mr, b.to(x.dtype).t())
    r = a.shape[0]
    z_padded = torch.nn.functional.pad(z_mr, (0, _lora_launch.padded(r) - r))
    return _library.shaped(y_mn, x), z_padded


def _lora_backward_fake(
    grad_y: Tensor, x: Tensor | None, z: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, blocksize: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x_shape, dtype = (*grad_y.shape[:-1], a.shape[1]), grad_y.dtype
    like = ((x_shape, dtype), (weight.shape, dtype), (a.shape, a.dtype), (b.shape, b.dtype))
    return tuple(  # type: ignore[return-value]
        grad_y.new_empty(tuple(shape) if want else (0,), dtype=dtype)
        for (shape, dtype), want in zip(like, wanted, strict=True)
    )


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, rounded once: a product that is scaled afterwards rounds twice."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _lora_backward_reference(
    grad_y: Tensor, x: Tensor | None, z: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, blocksize: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    want_x, want_w, want_a, want_b = wanted
    m, n, k, dtype = math.prod(grad_y.shape[:-1]), b.shape[0], a.shape[1], grad_y.dtype
    empty = grad_y.new_empty(0)
    dy_mn, x_mk = grad_y.reshape(m, n), empty if x is None else x.reshape(m, k)
    grad_x = grad_w = grad_a = grad_b = empty
    if want_x or want_a:
        dz_mr = _scaled_product(dy_mn, b.to(dtype), scale)
    if want_a:
        grad_a = dz_mr.t() @ _dropped(x_mk, dropout, seed)
    if want_b:
        grad_b = dy_mn.t() @ (empty if z is None else z[:, : b.shape[1]])
    if want_w:
        grad_w = dy_mn.t() @ x_mk
    if want_x:
        if absmax is None:
            base_mk = dy_mn @ weight
        else:
            base_mk = nf4_linear_backward_op(
                dy_mn, weight, absmax, k, blocksize, nested_absmax, offset
            )
        if dropout == 0.0:
            grad_x = torch.addmm(base_mk, dz_mr, a.to(dtype))
        else:
            grad_x = base_mk.add_(_dropped(dz_mr @ a.to(dtype), dropout, seed))
        grad_x = grad_x.view(*grad_y.shape[:-1], k)
    # Unwanted results share one empty tensor above; an op's outputs must not alias.
    grads = ((grad_x, dtype), (grad_w, dtype), (grad_a, a.dtype), (grad_b, b.dtype))
    return tuple(  # type: ignore[return-value]
        grad.to(dtype) if want else grad_y.new_empty(0, dtype=dtype)
        for (grad, dtype), want in zip(grads, wanted, strict=True)
    )


_backward_plan = _library.planned(_lora_launch.plan)


def _lora_backward_kernel(
    *args: Any, room: Room = NO_ROOM
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_y, x, _, weight, a, b, _, dropout, _, absmax, _, _, blocksize, wanted = args
    plan = _backward_plan(
        x, weight, a, b, absmax, blocksize, grad_y, wanted[0], None, dropout > 0.0
    )
    if plan.reason:
        result: tuple[Tensor, Tensor, Tensor, Tensor]
        result = _library.fall_back("lora_linear_backward", plan.reason, *args)
        return *result[:2], *(
            made if into is None else into.add_(made)
            for made, into in zip(result[2:], room[1:], strict=True)
        )  # type: ignore[return-value]
    return _lora_launch.backward(plan, *(*args, room))


_lora_backward = _library.define(
    "lora_linear_backward(Tensor grad_y, Tensor? x, Tensor? z, Tensor weight, Tensor a, Tensor b, "
    "float scale, float dropout, Tensor? seed, Tensor? absmax, Tensor? nested_absmax, "
    "Tensor? offset, int blocksize, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_lora_backward_fake,
    reference=_lora_backward_reference,
    kernel=_lora_backward_kernel,
    devices=("CUDA",),
)


class _LoraLinear(torch.autograd.Function):
    """Saves the factors and, for those that are wanted of the results in brackets, x unless it can be made
    again (dA, dW), z (dB) and 16 bytes of seed (dx, dA); formulas at the top."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, below, x, weight, bias, a, b, scale, dropout, seed, absmax, nested_absmax, offset,
        blocksize,
    ):  # fmt: skip
        y, z = below(
            x, weight, bias, a, b, scale, dropout, seed, absmax, nested_absmax, offset, blocksize
        )
        want_x, want_w, _, want_a, want_b = ctx.needs_input_grad[1:6]
        reads_x = want_w or want_a
        ctx.remake = recipe(x) if reads_x else None
        ctx.save_for_backward(
            x if reads_x and ctx.remake is None else None,
            z if want_b else None,
            weight,
            a,
            b,
            seed if want_x or want_a else None,
            absmax,
            nested_absmax,
            offset,
        )
        ctx.constants = (scale, dropout, blocksize)
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        ctx.direct = below is _lora_kernel
        ctx.place = 2 + (bias is not None)  # of A among the tensors
        return y, z

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, grad_y, _grad_z):  # type: ignore[no-untyped-def]
        if grad_y is None:
            return (None,) * 13
        x, z, weight, a, b, seed, absmax, nested_absmax, offset = ctx.saved_tensors
        scale, dropout, blocksize = ctx.constants
        want_x, want_w, want_bias, want_a, want_b = ctx.needs_input_grad[1:6]
        wanted = (want_x, want_w, want_a, want_b)
        grad_x = grad_w = grad_bias = grad_a = grad_b = None
        if any(wanted):
            own_x = ctx.remake is not None
            if own_x:
                x = ctx.remake()
            args = (
                grad_y, x, z, weight, a, b, scale, dropout, seed, absmax, nested_absmax, offset,
                blocksize, wanted,
            )  # fmt: skip
            if ctx.direct and _library.direct(grad_y):
                into_a, into_b = (
                    want_a and goes_into_grad(ctx, ctx.place, a),
                    want_b and goes_into_grad(ctx, ctx.place + 1, b),
                )
                room = Room(own_x, a.grad if into_a else None, b.grad if into_b else None)
                grad_x, grad_w, grad_a, grad_b = _lora_backward_kernel(*args, room=room)
                if into_a:
                    a.grad, want_a = grad_a, False
                if into_b:
                    b.grad, want_b = grad_b, False
            else:
                grad_x, grad_w, grad_a, grad_b = _lora_backward(*args)
        if want_bias:
            grad_bias = grad_y.reshape(math.prod(grad_y.shape[:-1]), grad_y.shape[-1]).sum(0)
        return (
            None, grad_x if want_x else None, grad_w if want_w else None, grad_bias,
            grad_a if want_a else None, grad_b if want_b else None, *(None,) * 7,
        )  # fmt: skip


@_library.planned
def _forward_plan(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, _scale: float,
    dropout: float, seed: Tensor | None, absmax: Tensor | None, *rest: Any,
) -> _lora_launch.Plan:  # fmt: skip
    _check_lora("lora_linear", x, weight, bias, a, b, dropout, seed, absmax, *rest)
    return _lora_launch.plan(x, weight, a, b, absmax, rest[-1], bias=bias)


def _lora_kernel(*args: Any) -> tuple[Tensor, Tensor]:
    plan = _forward_plan(*args)
    if plan.reason:
        result: tuple[Tensor, Tensor] = _library.fall_back("lora_linear", plan.reason, *args)
        return result
    return _lora_launch.forward(plan, *args)


_lora = _library.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, "
    f"float dropout, Tensor? seed, {_NF4_ARGS} -> (Tensor, Tensor)",
    fake=_lora_fake,
    reference=_lora_reference,
    kernel=_lora_kernel,
    devices=("CUDA",),
    autograd=_LoraLinear,
)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    absmax: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    blocksize: int = 64,
) -> Tensor:
    """y = x W^T + bias + scale * dropout(x) A^T B^T; differentiable in x, W, bias, A and B.

    Everything is computed in x's dtype (under autocast: the autocast dtype), sums in float32; A, B and
    bias of another dtype are cast, and their gradients come back in their own dtype.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        weight: [N, K] of x's dtype; or, with `absmax`, NF4 bytes uint8 [ceil(N K / 2), 1].
        a: lora_A, [R, K], any rank.
        b: lora_B, [N, R].
        scale: lora_alpha / R, or lora_alpha / sqrt(R) for rsLoRA.
        bias: [N].
        dropout: probability of dropping an element of the adapter's input, in steps of 1 / 256
            (within 1 / 32 of 0 and of 1: 1 / 65536).
        absmax: scales of an NF4 weight: float32 [B], or uint8 codes with the two nested fields.
        nested_absmax: float32 [ceil(B / 256)].
        nested_offset: float32 scalar.
        blocksize: elements that share a scale.

    Returns:
        [..., N] of the compute dtype.

    Raises:
        ValueError: shapes, devices or the dropout do not fit.
        TypeError: a dense weight's dtype is not the compute dtype.
        QuantStateError: an NF4 weight's parts do not fit [N, K].
        UnsupportedError: x is a nested tensor.
    """
    x, weight, bias = cast_for_autocast(x, weight, bias)
    if dropout > 0.0:  # ahead of the generator's next state
        _library.refuse_nested("lora_linear", x)
        _check.check_dtype("lora_linear", "x", x, _COMPUTE)
        if absmax is None:
            _check.check_weight("lora_linear", "weight", weight, x)
    if bias is not None:
        bias = bias.to(x.dtype)
    seed = _philox.new_seed(x.device) if dropout > 0.0 else None
    y: Tensor = _lora(
        x, weight, bias, a, b, scale, dropout, seed, absmax, nested_absmax, nested_offset, blocksize
    )[0]
    return y
