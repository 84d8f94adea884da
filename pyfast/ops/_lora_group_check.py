# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of `lora_group`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyfast.ops import _check
from pyfast.ops._lora_group_plan import members
from pyfast.ops.lora import _COMPUTE


def check_group(*args: Any) -> None:
    """Raise unless the arguments of the op fit together."""
    x, scales, blocksize = args[0], args[-2], args[-1]
    weights, biases, a, b, *nf4 = members(args[1:-2])
    _check.check_dtype("lora_group", "x", x, _COMPUTE)
    k = _check.features("lora_group", "x", x)
    if len(scales) != len(weights):
        count = len(weights)
        raise ValueError(f"lora_group: {count} linears need as many scales, got {len(scales)}")
    for i, member in enumerate(zip(weights, biases, a, b, zip(*nf4, strict=True), strict=True)):
        if not _fits(x, k, *member):
            _check_member(i, x, k, blocksize, *member)


def _fits(
    x: Tensor, k: int, w_nk: Tensor, bias: Tensor | None, a_rk: Tensor, b_nr: Tensor,
    nf4: tuple[Tensor | None, ...],
) -> bool:  # fmt: skip
    """Whether `_check_member` has nothing to say; its texts would cost 5 us a member."""
    device, dtype = x.device, x.dtype
    return (
        nf4[0] is None
        and a_rk is not None
        and b_nr is not None
        and a_rk.device == b_nr.device == w_nk.device == device
        and a_rk.dim() == b_nr.dim() == 2
        and a_rk.shape == (b_nr.shape[1], k)
        and w_nk.shape == (b_nr.shape[0], k)
        and w_nk.dtype is dtype
        and a_rk.dtype in _COMPUTE
        and b_nr.dtype in _COMPUTE
        and (
            bias is None
            or (bias.dtype is dtype and bias.device == device and bias.shape == b_nr.shape[:1])
        )
    )


def _check_member(
    i: int, x: Tensor, k: int, blocksize: int, w_nk: Tensor, bias: Tensor | None, a_rk: Tensor,
    b_nr: Tensor, nf4: tuple[Tensor | None, ...],
) -> None:  # fmt: skip
    op, weight, a, b = "lora_group", f"weights[{i}]", f"a[{i}]", f"b[{i}]"
    if a_rk is None or b_nr is None:
        raise ValueError(f"{op}: {weight} needs {a} and {b}")
    named = {weight: w_nk, a: a_rk, b: b_nr, f"biases[{i}]": bias}
    _check.check_same_device(op, x, **named)
    r, n = _check.rows(op, a, a_rk), _check.rows(op, b, b_nr)
    _check.check_shape(op, a, a_rk, (r, k))
    _check.check_shape(op, b, b_nr, (n, r))
    absmax, nested_absmax, offset = nf4
    if absmax is None:
        _check.check_shape(op, weight, w_nk, (n, k))
        _check.check_weight(op, weight, w_nk, x)
    else:
        _check.check_same_device(op, x, **{f"absmax[{i}]": absmax})
        _check.check_quantized(op, w_nk, absmax, n * k, blocksize, nested_absmax, offset)
    _check.check_dtype(op, a, a_rk, _COMPUTE)
    _check.check_dtype(op, b, b_nr, _COMPUTE)
    if bias is not None:
        _check.check_dtype(op, f"biases[{i}]", bias, (x.dtype,))
        _check.check_shape(op, f"biases[{i}]", bias, (n,))
