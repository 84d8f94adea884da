# SPDX-License-Identifier: Apache-2.0
"""The product of many rows with an NF4 weight on CUDA, from the packed bytes, with LoRA's product inside.

Letters: M rows of x, N columns of y, K columns of x, R rank. W is [N, K] in a layer's forward (`by_out`), and
in dx = dy W the same bytes are [K, N]. Products see `nf4_dequantize`'s weights, bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pyfast import _extension
from pyfast.ops import _library, _nf4_operands

_BLOCKSIZE = 64
_TILE_ROWS = 512
"""Of y, for the two blocks of threads of a cluster."""
_KERNELS = {128: "nf4_gemm_sm90", 112: "nf4_gemm_sm90_narrow"}
"""By the columns of a tile; the second for W by out feature alone."""

# Microseconds on an H100 (benchmarks/NOTES.md): of a tile's column and a column of x; of dequantising a
# weight into a scratch; of the library's product, for a multiplication; of a pass over an element of x.
_COLUMN_US, _WEIGHT_US, _PRODUCT_US, _READ_US = 53 / 4096 / 128, 0.86e-6, 2 / 725e6, 2 / 2.5e6


def _tile(m: int, n: int, by_out: bool, sm_count: int) -> tuple[int, int]:
    """Columns of the tiles that fill the device's waves best, and what all waves have, one after another."""

    def columns(width: int) -> int:
        tiles = math.ceil(m / _TILE_ROWS) * math.ceil(n / width)
        return math.ceil(tiles / (sm_count // 2)) * width

    width = min(_KERNELS if by_out else (128,), key=columns)
    return width, columns(width)


def is_faster(m: int, n: int, k: int, by_out: bool, sm_count: int, read: int = 0) -> bool:
    """Whether the kernel should take less time than a dequantised scratch and the library's GEMM.

    Args:
        m, n, k, by_out: of the product.
        sm_count: of the device.
        read: elements that are read once more beside the kernel.
    """
    _, columns = _tile(m, n, by_out, sm_count)
    return columns * k * _COLUMN_US + read * _READ_US < n * k * (_WEIGHT_US + m * _PRODUCT_US)


def why_not(
    m: int, n: int, k: int, by_out: bool, dtype: torch.dtype, blocksize: int, aligned: bool,
    capability: tuple[int, int], sm_count: int, read: int = 0,
) -> str:  # fmt: skip
    """Why the kernel does not serve a product on a CUDA device; empty if it does."""
    if capability != (9, 0):
        return f"the kernel is for compute capability 9.0, the device has {capability}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, x is {dtype}"
    if blocksize != _BLOCKSIZE:
        return f"the kernel takes blocks of {_BLOCKSIZE}, the weight has {blocksize}"
    rows, columns = (n, k) if by_out else (k, n)
    if columns % _BLOCKSIZE or rows % 8:
        return (
            f"the kernel takes multiples of {_BLOCKSIZE} in features and of 8 out features, the weight "
            f"has {columns} and {rows}"
        )
    if not is_faster(m, n, k, by_out, sm_count, read):
        return f"with {m} rows, {n} and {k} features a dequantised scratch is as fast"
    return "" if aligned else "the packed weight does not lie at a multiple of 16 bytes"


def serves(
    x: Tensor, packed: Tensor, n: int, blocksize: int, *, by_out: bool, read: int = 0
) -> bool:
    """Whether the kernel serves x, checked and not empty, on a CUDA device; `read`: see `is_faster`."""
    k = x.shape[-1]
    m, aligned = x.numel() // k, packed.data_ptr() % 16 == 0
    place = _nf4_operands.device_of(x.device.index)
    return not why_not(m, n, k, by_out, x.dtype, blocksize, aligned, *place, read)


def gemm(
    out: Tensor, x_mk: Tensor, packed: Tensor, absmax: Tensor, blocksize: int,
    nested_absmax: Tensor | None, offset: Tensor | None, *, by_out: bool,
    bias: Tensor | None = None, z: Tensor | None = None, factor: Tensor | None = None,
    kernel: str = "",
) -> str:  # fmt: skip
    """out = x W^T + z B^T + bias, for arguments that `serves` has accepted; the kernel's name.

    Args:
        out: contiguous, M rows of N, of x's dtype.
        x_mk: [M, K], float16 or bfloat16, in any layout.
        z: [M, R rounded up to 8] of x's dtype, contiguous; with `factor` or not at all.
        factor: B [N, R], or [R, N] where W is not `by_out`; of any dtype, cast to x's.
        packed, absmax, blocksize, nested_absmax, offset, by_out, bias: as in `nf4_linear`, and above.
        kernel: the name of the one that is to serve; "": the one that fits the shape.
    """
    x_mk = _nf4_operands.in_rows(x_mk)
    r = 0
    if factor is not None:
        r = factor.shape[1 if by_out else 0]
        factor = factor.to(x_mk.dtype).contiguous()
        if factor.shape[1] % 8 or factor.data_ptr() % 16:
            factor = F.pad(factor, (0, -factor.shape[1] % 8)).clone()
    if bias is not None:
        bias = bias.contiguous()
    if not kernel:
        _, sm_count = _nf4_operands.device_of(x_mk.device.index)
        kernel = _KERNELS[_tile(len(x_mk), out.shape[-1], by_out, sm_count)[0]]
    name: str = _extension.C.nf4_gemm(
        **_nf4_operands.arguments(
            out, x_mk, packed, absmax, bias, blocksize, nested_absmax, offset
        ),
        z=_extension.ptr(z),
        pitch_z=0 if z is None else z.shape[1],
        b=_extension.ptr(factor),
        pitch_b=0 if factor is None else factor.shape[1],
        r=r,
        by_out=by_out,
        variant=kernel,
    )
    _library.record("nf4_gemm", name)
    return name
