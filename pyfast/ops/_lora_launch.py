# SPDX-License-Identifier: Apache-2.0
"""Launches of the CUDA kernels behind `lora_linear`; csrc/lora/lora.h says what they compute.

One call into C++ a direction. Where torch's GEMM is the better one, or ours cannot run, the products with
W go through it and C++ makes those with A and B.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from pyfast import _extension
from pyfast.ops import _library, _philox
from pyfast.ops._scratch import counters, scratch, scratch_lock
from pyfast.ops.dropout import dropout_op
from pyfast.ops.nf4 import dequantize_into

_HALVES = (torch.float16, torch.bfloat16)
_MAX_ROWS = 64 << 16
"""Each 64 rows have a counter; the kernels have 2^17 in all (csrc/lora/lora.h), half of them for these."""


def padded(rank: int) -> int:
    """Columns of z: the rank rounded up to whole 16-byte units, which TMA needs."""
    return (rank + 7) // 8 * 8


def missing(x: Tensor, a: Tensor, b: Tensor) -> str:
    """Why the kernels cannot serve a call; empty when they can."""
    if _extension.C is None:
        return _extension.reason
    if not _extension.has_cuda():
        return "this build has no CUDA kernels"
    if x.dtype not in _HALVES:
        return f"there are kernels for float16 and bfloat16, not {x.dtype}"
    if a.dtype is not b.dtype or a.dtype not in _extension.DTYPES:
        return f"lora_A and lora_B must share a dtype, got {a.dtype} and {b.dtype}"
    k, n = a.shape[1], b.shape[0]
    if k % 8 or n % 8 or min(k, n, a.shape[0]) == 0:
        return "in and out features must be multiples of 8, they and the rank not zero"
    if x.numel() // k > _MAX_ROWS:
        return f"at most {_MAX_ROWS} rows, got {x.numel() // k}"
    return ""


@functools.lru_cache(maxsize=4096)
def _gemm_name(
    device: int, m: int, n: int, k: int, pitch: int, by_out: bool, transposed: bool
) -> str:
    """The kernel for x W^T or, transposed, dy W; empty where torch's serves."""
    name: str = _extension.C.lora_gemm_name(device, m, n, k, pitch, by_out, transposed)[0]
    return name


@functools.lru_cache(maxsize=4096)
def _workspace(device: int, m: int, n: int, k: int, r: int) -> int:
    size: int = _extension.C.lora_workspace(device, m, n, k, r)
    return size


def _rows(tensor: Tensor, columns: int) -> Tensor:
    """[..., columns] as a matrix whose rows the kernels can read: 16-byte units at a fixed pitch."""
    matrix = tensor.reshape(tensor.numel() // columns, columns)
    if matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()


class _Weight:
    """W as the GEMMs take it: stored by out or by in feature, at a pitch."""

    def __init__(self, weight: Tensor) -> None:
        self.by_out = weight.stride(1) == 1
        if not self.by_out and weight.stride(0) != 1:
            weight, self.by_out = weight.contiguous(), True
        self.matrix = weight
        self.pitch = weight.stride(0) if self.by_out else weight.stride(1)
        self.aligned = weight.data_ptr() % 16 == 0

    def gemm(self, device: int, m: int, transposed: bool) -> str:
        n, k = self.matrix.shape
        if not self.aligned:
            return ""
        return _gemm_name(device, m, n, k, self.pitch, self.by_out, transposed)


def _dense(
    weight: Tensor, shape: tuple[int, int], dtype: torch.dtype, absmax: Tensor | None,
    nested_absmax: Tensor | None, offset: Tensor | None, blocksize: int,
) -> Tensor:  # fmt: skip
    """The dense weight; an NF4 one is decoded into the scratch buffer, under the caller's lock."""
    if absmax is None:
        return weight
    w = scratch(shape[0] * shape[1], weight, dtype).view(shape)
    dequantize_into(w, weight, absmax, blocksize, nested_absmax, offset)
    return w


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, blocksize: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and z, see `ops.lora_linear`."""
    (r, k), n = a.shape, b.shape[0]
    x_mk = _rows(x, k)
    m = x_mk.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    z = x.new_empty((m, padded(r)))
    if m == 0:
        return y, z
    device = x.device.index
    a, b = a.contiguous(), b.contiguous()
    with scratch_lock:
        w = _Weight(_dense(weight, (n, k), x.dtype, absmax, nested_absmax, offset, blocksize))
        name = w.gemm(device, m, False)
        work = scratch(_workspace(device, m, n, k, r), x, torch.uint8)
        served = _extension.C.lora_forward(
            device, _extension.stream(device), _extension.DTYPES[x.dtype],
            _extension.DTYPES[a.dtype], m, n, k, r, x_mk.data_ptr(), x_mk.stride(0),
            w.matrix.data_ptr() if name else 0, w.pitch, w.by_out, a.data_ptr(), b.data_ptr(),
            scale, padded(r), _extension.ptr(seed), _philox.threshold(dropout), work.data_ptr(),
            counters(_extension.C.lora_counters, x).data_ptr(), _extension.ptr(bias),
            y.data_ptr(), z.data_ptr(),
        )  # fmt: skip
        _library.record("lora_linear", served or "lora_linear_skinny")
        if not name:
            base = torch.nn.functional.linear(x_mk, w.matrix, bias)
            torch.addmm(base, z[:, :r], b.to(x.dtype).t(), out=y.view(m, n))
    return y, z


def backward(
    grad_y: Tensor, x: Tensor, z: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float,
    dropout: float, seed: Tensor | None, absmax: Tensor | None, nested_absmax: Tensor | None,
    offset: Tensor | None, blocksize: int, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dW, dA and dB, empty where not wanted, see `ops.lora_linear`."""
    want_x, want_w, want_a, want_b = wanted
    (r, k), n = a.shape, b.shape[0]
    m = math.prod(x.shape[:-1])
    make = x.new_zeros if m == 0 else x.new_empty
    grad_x = make(x.shape if want_x else (0,))
    grad_a = make(a.shape if want_a else (0,), dtype=a.dtype)
    grad_b = make(b.shape if want_b else (0,), dtype=b.dtype)
    if m == 0:
        return grad_x, make(weight.shape if want_w else (0,)), grad_a, grad_b
    x_mk, dy_mn = _rows(x, k), _rows(grad_y, n)
    dz = x.new_empty((m, padded(r)))
    device = x.device.index
    a, b = a.contiguous(), b.contiguous()
    with scratch_lock:
        name = ""
        if want_x:
            w = _Weight(_dense(weight, (n, k), x.dtype, absmax, nested_absmax, offset, blocksize))
            name = w.gemm(device, m, True)
        work = scratch(_workspace(device, m, n, k, r), x, torch.uint8)
        served = _extension.C.lora_backward(
            device, _extension.stream(device), _extension.DTYPES[x.dtype],
            _extension.DTYPES[a.dtype], m, n, k, r, x_mk.data_ptr(), x_mk.stride(0),
            w.matrix.data_ptr() if name else 0, w.pitch if name else 0, w.by_out if name else True,
            a.data_ptr(), b.data_ptr(), scale, padded(r), _extension.ptr(seed),
            _philox.threshold(dropout), work.data_ptr(),
            counters(_extension.C.lora_counters, x).data_ptr(), dy_mn.data_ptr(), dy_mn.stride(0),
            z.data_ptr(), dz.data_ptr(), grad_x.data_ptr() if want_x else 0,
            grad_a.data_ptr() if want_a else 0, grad_b.data_ptr() if want_b else 0,
        )  # fmt: skip
        _library.record("lora_linear_backward", served or "lora_linear_skinny")
        if want_x and not name:
            base = torch.mm(dy_mn, w.matrix)
            low, a_rk = dz[:, :r], a.to(x.dtype)
            if dropout == 0.0:
                torch.addmm(base, low, a_rk, out=grad_x.view(m, k))
            else:
                masked = dropout_op(low @ a_rk, dropout, seed)
                torch.add(base, masked, out=grad_x.view(m, k))
    grad_w = dy_mn.t() @ x_mk if want_w else make((0,))
    return grad_x, grad_w, grad_a, grad_b
