# SPDX-License-Identifier: Apache-2.0
"""Launches of the CUDA kernels behind `dora_linear`; csrc/dora/dora.h says what they compute.

The GEMM of `lora_linear` multiplies y by c as it stores it. Where that is torch's, or there are few rows of
an NF4 weight, y is scaled after. The backward scales what is smaller, W (for `lora_linear_backward` with c W
and c B) or dy. In units of N bfloat16, scaling W reads and writes 2 K, and scaling dy, which is read for dm
in either case, another M. W is never scaled to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast import _extension
from pyfast.ops import _library, _lora_launch
from pyfast.ops._lora_launch import copied, in_place, missing, stored
from pyfast.ops._scratch import raw_stream
from pyfast.ops.nf4 import dequantize_into

BACKWARD = 2
"""From so many times K on, rows of dy are more than scaling W is worth."""

BUILT = not _extension.missing_cuda()


class Nf4(NamedTuple):
    """What a quantised W has besides its bytes."""

    absmax: Tensor | None
    nested_absmax: Tensor | None
    offset: Tensor | None
    blocksize: int


DENSE = Nf4(None, None, None, 64)


def missing_norms(weight: Tensor, a: Tensor, b: Tensor) -> str:
    """Why the kernel cannot make the norms; empty when it can."""
    if not BUILT:
        return _extension.missing_cuda()
    by_out, pitch = stored(weight)[1:]
    dtypes = _extension.DTYPES
    if weight.dtype not in dtypes or a.dtype not in dtypes or a.dtype is not b.dtype:
        return f"W is {weight.dtype}, lora_A {a.dtype} and lora_B {b.dtype}"
    if not by_out or pitch % 8 or a.shape[1] % 8 or weight.data_ptr() % 16:
        return "rows of W must be multiples of 8 that begin on 16 bytes"
    if a.data_ptr() % 16 or not 1 <= a.shape[0] <= _extension.C.dora_most_rank or not b.shape[0]:
        return "the rank is too large, or something is empty"
    return ""


def norms(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """||W + s B A|| of each row, float32."""
    a, b, (n, r) = a.contiguous(), b.contiguous(), b.shape
    out = weight.new_empty(n, dtype=torch.float32)
    device, dtypes = weight.device.index, _extension.DTYPES
    served = _extension.C.dora_norms(
        device, raw_stream(device), dtypes[weight.dtype], dtypes[a.dtype], n, a.shape[1], r,
        weight.data_ptr(), stored(weight)[2], a.data_ptr(), b.data_ptr(), scale, out.data_ptr(),
    )  # fmt: skip
    _library.record("dora_norms", served)
    return out


@_library.planned
def missing_linear(x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> str:
    """Why the kernels cannot serve a layer; empty when they can."""
    if not BUILT:
        return _extension.missing_cuda()
    if x.dtype is not torch.bfloat16:
        return f"there are kernels for bfloat16, not {x.dtype}"
    if magnitude.dtype not in _extension.DTYPES:
        return f"the magnitude is {magnitude.dtype}"
    return missing(x, a, b)


class _Columns(NamedTuple):
    """The operands that c is made of, and where kernels run."""

    device: int
    magnitude: Tensor
    norms: Tensor

    @classmethod
    def of(cls, x: Tensor, magnitude: Tensor, norms: Tensor) -> _Columns:
        return cls(x.device.index, magnitude.contiguous(), norms.contiguous())

    def _where(self) -> tuple[int, int]:
        return self.device, raw_stream(self.device)

    def _args(self) -> tuple[int, int, int]:
        dtype = _extension.DTYPES[self.magnitude.dtype]
        return dtype, self.magnitude.data_ptr(), self.norms.data_ptr()

    def scaled_weight(
        self, weight: Tensor, b: Tensor, k: int, dtype: torch.dtype, nf4: Nf4
    ) -> tuple[Tensor, Tensor]:
        """c W, stored as W is, and c B; an NF4 weight is decoded first and scaled in place."""
        n, r = b.shape
        b = b.contiguous()
        if nf4.absmax is not None:
            packed, weight = weight, weight.new_empty((n, k), dtype=dtype)
            inner, offset = nf4.nested_absmax, nf4.offset
            dequantize_into(weight, packed, nf4.absmax, nf4.blocksize, inner, offset)
        elif not (stored(weight)[0] and weight.data_ptr() % 16 == 0 and stored(weight)[2] % 8 == 0):
            weight = copied(weight)
        _, by_out, pitch = stored(weight)
        rows, columns = (n, k) if by_out else (k, n)
        out, scaled_b = weight, torch.empty_like(b)
        if nf4.absmax is None:
            out = weight.new_empty(rows, columns)
            out = out if by_out else out.t()
        _extension.C.dora_scale(
            *self._where(), by_out, rows, columns, weight.data_ptr(), pitch, out.data_ptr(),
            *self._args(), _extension.DTYPES[b.dtype], r, b.data_ptr(), scaled_b.data_ptr(),
        )  # fmt: skip
        return out, scaled_b

    def factors(self) -> Tensor:
        """c, float32."""
        out = torch.empty_like(self.norms)
        _extension.C.dora_factors(*self._where(), len(out), *self._args(), out.data_ptr())
        return out

    def scale_columns(self, of: Tensor, pitch: int, out: Tensor) -> None:
        """out [..., N] = c times rows of that pitch."""
        n = out.shape[-1]
        _extension.C.dora_scale(
            *self._where(), False, out.numel() // n, n, of.data_ptr(), pitch, out.data_ptr(),
            *self._args(), 0, 0, 0, 0,
        )  # fmt: skip

    def sums(self, dy: Tensor, pitch: int, y: Tensor, scaled_dy: Tensor | None) -> Tensor:
        """Parts of the sums of dy y over rows; also c dy where there is a place for it."""
        y, n = y.contiguous(), y.shape[-1]
        m = y.numel() // n
        parts = y.new_empty(_extension.C.dora_slices(self.device, m, n), n, dtype=torch.float32)
        _extension.C.dora_sums(
            *self._where(), m, n, dy.data_ptr(), pitch, y.data_ptr(), _extension.ptr(scaled_dy),
            *self._args(), parts.data_ptr(),
        )  # fmt: skip
        return parts

    def finish(self, m: int, parts: Tensor | None, grad_b: Tensor | None) -> Tensor:
        """dm from the parts; scales dB in place."""
        magnitude = self.magnitude
        grad_m = magnitude.new_empty(0) if parts is None else torch.empty_like(magnitude)
        factor_dtype = 0 if grad_b is None else _extension.DTYPES[grad_b.dtype]
        _extension.C.dora_finish(
            *self._where(), m, len(magnitude), 0 if grad_b is None else grad_b.shape[1],
            _extension.ptr(parts), *self._args(), 0 if parts is None else grad_m.data_ptr(),
            factor_dtype, _extension.ptr(grad_b),
        )  # fmt: skip
        return grad_m


_forward_plan = _library.planned(_lora_launch.plan)


def forward(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, norms: Tensor,
    scale: float, *quantized: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and z, see `ops.dora_linear`."""
    n, k = b.shape[0], x.shape[-1]
    m = x.numel() // k
    columns, nf4 = _Columns.of(x, magnitude, norms), Nf4(*quantized)
    plan = _forward_plan(x, weight, a, b, nf4.absmax, nf4.blocksize)
    factors = columns.factors() if plan.gemm and plan.by_out else None
    y, z = _lora_launch.forward(
        plan, x, weight, None, a, b, scale, 0.0, None, *nf4, columns=factors
    )
    if m and factors is None:
        columns.scale_columns(y, n, y)
    served = "dora_linear_columns" if factors is None else "dora_linear_epilogue"
    _library.record("dora_linear", served)
    return y, z


def backward(
    grad_y: Tensor, x: Tensor, z: Tensor | None, y: Tensor | None, weight: Tensor, a: Tensor, b: Tensor,
    magnitude: Tensor, norms: Tensor, scale: float, absmax: Tensor | None,
    nested_absmax: Tensor | None, offset: Tensor | None, blocksize: int, wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dA, dB and dm, empty where not wanted, see `ops.dora_linear`."""
    want_x, want_a, want_b, want_m = wanted
    n, k = b.shape[0], x.shape[-1]
    m = x.numel() // k
    columns = _Columns.of(x, magnitude, norms)
    nf4 = Nf4(absmax, nested_absmax, offset, blocksize)
    through = want_x or want_a or want_b
    by_weight = through and m >= BACKWARD * k
    parts = scaled = None
    if m:
        fits, pitch = in_place(grad_y, n)
        grad_y = grad_y if fits else copied(grad_y)
        if through and not by_weight:
            scaled = grad_y.new_empty(grad_y.shape)
        if want_m:
            parts = columns.sums(grad_y, pitch, y, scaled)  # type: ignore[arg-type]
        elif scaled is not None:
            columns.scale_columns(grad_y, pitch, scaled)
    if by_weight:
        weight, b = columns.scaled_weight(weight, b, k, x.dtype, nf4)
        nf4 = DENSE
    grad_x, grad_a, grad_b = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    if through:
        lora = _library.OPS["lora_linear_backward"].call
        grad_x, _, grad_a, grad_b = lora(
            grad_y if scaled is None else scaled, x, z, weight, a, b, scale, 0.0, None, *nf4,
            [want_x, False, want_a, want_b],
        )  # fmt: skip
    grad_m = magnitude.new_zeros(n if want_m else 0)
    if parts is not None or (by_weight and want_b):
        grad_m = columns.finish(m, parts, grad_b if by_weight and want_b else None)
    served = "dora_linear_weight" if by_weight else "dora_linear_columns"
    _library.record("dora_linear_backward", served)
    return grad_x, grad_a, grad_b, grad_m
