# SPDX-License-Identifier: Apache-2.0
"""The linear layer over a frozen NF4 weight, forward and backward.

Letters: M tokens, N out features, K in features, B quantisation blocks.

    y = x W^T + bias        dx = dy W        W = dequantised to x's dtype, exactly bitsandbytes' values

On CUDA few rows are multiplied from the packed bytes (`_nf4_few_rows.py`), no further from the exact product;
so are more on Hopper (`_nf4_gemm.py`), with exactly these values, where it is faster than a scratch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyfast.ops import _check, _library, _nf4_few_rows, _nf4_gemm
from pyfast.ops._autocast import cast_for_autocast
from pyfast.ops._scratch import scratch, scratch_lock
from pyfast.ops.nf4 import FLOATS, dequantize_into, dequantize_reference, missing_kernel

_SLAB_ELEMENTS = 1 << 24
"""Weights that the CPU path dequantises at a time: 32 MiB of bf16. Larger slabs are faster down to there
(4096 x 4096, 64 rows: 5.5 ms in slabs of 2^21, 3.6 ms whole), and the buffer stays of a modest size."""


def _linear_check(
    op: str, inner: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None,
    n: int, k: int, blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> None:  # fmt: skip
    _check.check_dtype(op, "input", inner, (*FLOATS, torch.float64))
    _check.check_quantized(op, packed, absmax, n * k, blocksize, nested_absmax, offset)
    _check.check_same_device(op, inner, weight=packed, bias=bias)
    if bias is not None:
        _check.check_shape(op, "bias", bias, (n,))
        _check.check_dtype(op, "bias", bias, (inner.dtype,))


def _linear_fake(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    k = _check.features("nf4_linear", "x", x)
    _linear_check("nf4_linear", x, packed, absmax, bias, out_features, k, blocksize,
                  nested_absmax, offset)  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


def _linear_reference(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    _linear_fake(x, packed, absmax, bias, out_features, blocksize, nested_absmax, offset)
    shape = (out_features, x.shape[-1])
    w = dequantize_reference(packed, absmax, shape, x.dtype, blocksize, nested_absmax, offset)
    return torch.nn.functional.linear(x, w, bias)


def _slabs(n: int, k: int, blocksize: int) -> list[tuple[int, int]]:
    """Row ranges of W[n, k] of about `_SLAB_ELEMENTS`, each starting on a block's first element."""
    step = blocksize // math.gcd(k, blocksize)
    rows = max(step, _SLAB_ELEMENTS // max(k, 1) // step * step)
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


@_library.planned
def _linear_plan(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> tuple[str, bool]:  # fmt: skip
    """What serves ("few rows", "packed", "whole": W is dequantised, "slabs"), and if anything is to do."""
    k = _check.features("nf4_linear", "x", x)
    _linear_check("nf4_linear", x, packed, absmax, bias, out_features, k, blocksize,
                  nested_absmax, offset)  # fmt: skip
    cuda = x.device.type == "cuda"
    filled = out_features > 0 and 0 not in x.shape[:-1]
    if cuda and filled and k > 0:
        if _nf4_few_rows.serves(x, packed, absmax, blocksize):
            return "few rows", filled
        if _nf4_gemm.serves(x, packed, out_features, blocksize, by_out=True):
            return "packed", filled
    return "whole" if cuda or out_features * k <= _SLAB_ELEMENTS else "slabs", filled


def _from_bytes(op: str, x: Tensor, columns: int, *weight: Any, **options: Any) -> Tensor:
    """x W^T or x W [..., columns] by `_nf4_gemm.gemm`, for an op."""
    out = x.new_empty((*x.shape[:-1], columns))
    _library.record(op, _nf4_gemm.gemm(out, x.reshape(-1, x.shape[-1]), *weight, **options))
    return out


def _linear_kernel(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    args = (x, packed, absmax, bias, out_features, blocksize, nested_absmax, offset)
    if reason := missing_kernel(x, x.dtype):
        result: Tensor = _library.fall_back("nf4_linear", reason, *args)
        return result
    by, filled = _linear_plan(*args)
    if by == "few rows":
        return _nf4_few_rows.few_rows(*args)
    k = x.shape[-1]
    if by == "packed":
        scales = (absmax, blocksize, nested_absmax, offset)
        return _from_bytes("nf4_linear", x, out_features, packed, *scales, by_out=True, bias=bias)
    _library.record("nf4_linear", "nf4_linear_scratch" if by == "whole" else "nf4_linear_slabs")
    if by == "whole" and filled:
        with scratch_lock:
            w = scratch(out_features * k, x).view(out_features, k)
            dequantize_into(w, packed, absmax, blocksize, nested_absmax, offset)
            return torch.nn.functional.linear(x, w, bias)
    out = x.new_empty((*x.shape[:-1], out_features))
    if not filled:
        return out
    x_mk, out_mn = x.reshape(-1, k), out.view(-1, out_features)
    for start, stop in _slabs(out_features, k, blocksize):
        part = None if bias is None else bias[start:stop]
        with scratch_lock:
            w = scratch((stop - start) * k, x).view(stop - start, k)
            dequantize_into(
                w, packed, absmax, blocksize, nested_absmax, offset, start * k // blocksize
            )
            out_mn[:, start:stop] = torch.nn.functional.linear(x_mk, w, part)
    return out


def _linear_backward_check(
    grad_y: Tensor, packed: Tensor, absmax: Tensor, in_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> None:  # fmt: skip
    n = _check.features("nf4_linear_backward", "grad_y", grad_y)
    _linear_check("nf4_linear_backward", grad_y, packed, absmax, None, n, in_features, blocksize,
                  nested_absmax, offset)  # fmt: skip


@_library.planned
def _linear_backward_plan(
    grad_y: Tensor, packed: Tensor, absmax: Tensor, in_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> bool:  # fmt: skip
    """Whether W is read as it is."""
    _linear_backward_check(grad_y, packed, absmax, in_features, blocksize, nested_absmax, offset)
    if grad_y.device.type != "cuda" or grad_y.numel() == 0 or in_features == 0:
        return False
    return _nf4_gemm.serves(grad_y, packed, in_features, blocksize, by_out=False)


def _linear_backward_fake(
    grad_y: Tensor, packed: Tensor, absmax: Tensor, in_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    _linear_backward_check(grad_y, packed, absmax, in_features, blocksize, nested_absmax, offset)
    return grad_y.new_empty((*grad_y.shape[:-1], in_features))


def _linear_backward_reference(
    grad_y: Tensor, packed: Tensor, absmax: Tensor, in_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    _linear_backward_fake(grad_y, packed, absmax, in_features, blocksize, nested_absmax, offset)
    shape = (grad_y.shape[-1], in_features)
    dtype = grad_y.dtype
    w = dequantize_reference(packed, absmax, shape, dtype, blocksize, nested_absmax, offset)
    return grad_y @ w


def _linear_backward_kernel(
    grad_y: Tensor, packed: Tensor, absmax: Tensor, in_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    args = (grad_y, packed, absmax, in_features, blocksize, nested_absmax, offset)
    if reason := missing_kernel(grad_y, grad_y.dtype):
        result: Tensor = _library.fall_back("nf4_linear_backward", reason, *args)
        return result
    if _linear_backward_plan(*args):
        scales = (absmax, blocksize, nested_absmax, offset)
        return _from_bytes(
            "nf4_linear_backward", grad_y, in_features, packed, *scales, by_out=False
        )
    # The contraction runs over the rows of W, so slabs would be summed in the output's dtype and round
    # once a slab; the whole matrix goes into a reused buffer instead.
    n = grad_y.shape[-1]
    _library.record("nf4_linear_backward", "nf4_linear_scratch")
    with scratch_lock:
        w = scratch(n * in_features, grad_y).view(n, in_features)
        dequantize_into(w, packed, absmax, blocksize, nested_absmax, offset)
        return grad_y @ w


_NESTED = "int blocksize, Tensor? nested_absmax, Tensor? offset) -> Tensor"
nf4_linear_backward_op = _library.define(
    f"nf4_linear_backward(Tensor grad_y, Tensor packed, Tensor absmax, SymInt in_features, {_NESTED}",
    fake=_linear_backward_fake,
    reference=_linear_backward_reference,
    kernel=_linear_backward_kernel,
)


class _NF4Linear(torch.autograd.Function):
    """dx = dy W; dbias = sum of dy over rows. The packed weight has no gradient."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, below, x, packed, absmax, bias, out_features, blocksize, nested_absmax, offset
    ):
        ctx.save_for_backward(packed, absmax, nested_absmax, offset)
        ctx.geometry = (x.shape[-1], blocksize)
        return below(x, packed, absmax, bias, out_features, blocksize, nested_absmax, offset)

    @staticmethod
    @_library.once_differentiable
    def backward(ctx, grad_y):  # type: ignore[no-untyped-def]
        packed, absmax, nested_absmax, offset = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[1]:
            grad_x = nf4_linear_backward_op(
                grad_y, packed, absmax, *ctx.geometry, nested_absmax, offset
            )
        if ctx.needs_input_grad[4]:
            grad_bias = grad_y.reshape(-1, grad_y.shape[-1]).sum(0)
        return None, grad_x, None, None, grad_bias, None, None, None, None


nf4_linear_op = _library.define(
    "nf4_linear(Tensor x, Tensor packed, Tensor absmax, Tensor? bias, SymInt out_features, "
    + _NESTED,
    fake=_linear_fake,
    reference=_linear_reference,
    kernel=_linear_kernel,
    autograd=_NF4Linear,
)


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int,
    blocksize: int = 64,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias with W [N, K] stored in NF4; differentiable in x and bias.

    W is dequantised to x's dtype, so the product sees exactly `nf4_dequantize`'s values; up to 256 rows on
    CUDA may see them rounded after the product instead. Under autocast x and bias are cast to its dtype.

    Args:
        x: [..., K], float32, float16 or bfloat16.
        packed: uint8 [ceil(N K / 2), 1].
        absmax: float32 [B], or uint8 codes [B] with `nested_absmax` and `nested_offset`.
        bias: [N] of x's dtype.
        out_features: N.
        blocksize: elements that share a scale.
        nested_absmax: float32 [ceil(B / 256)].
        nested_offset: float32 scalar.

    Returns:
        [..., N] of x's dtype.

    Raises:
        QuantStateError: the parts do not fit [N, K].
    """
    x, bias = cast_for_autocast(x, bias)
    y: Tensor = nf4_linear_op(
        x, packed, absmax, bias, out_features, blocksize, nested_absmax, nested_offset
    )
    return y
