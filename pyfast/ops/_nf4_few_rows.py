# SPDX-License-Identifier: Apache-2.0
"""The product of few rows with an NF4 weight on CUDA, which reads the packed bytes and nothing else.

Letters: M rows of x, N out features, K in features.

Codes are rounded to x's dtype and each block's sums get its scale in float32, or weights are rounded to
what `nf4_dequantize` gives: the kernel decides, and either is within one rounding of that weight.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pyfast import _extension
from pyfast.ops import _library, _nf4_operands

MOST_ROWS = 256
"""Beyond, W is dequantised into a scratch for a GEMM of torch's."""
_MOST_ROWS_SM80 = 16
_BLOCKSIZE = 64
_SMALL = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities of GPUs whose blocks have 100 KiB of shared memory; the kernels need 160."""

_FEWEST = ((_MOST_ROWS_SM80, 0, 0), (64, 0, 7), (128, 2, 9), (MOST_ROWS, 13, 13))
"""Up to so many rows: out features a multiprocessor that the kernels need, for up to 4096 in features and for
more. With fewer a scratch is faster, as too few blocks of threads read W (measured: benchmarks/NOTES.md)."""


def why_not(
    m: int, n: int, k: int, dtype: torch.dtype, blocksize: int, aligned: bool,
    capability: tuple[int, int], sm_count: int,
) -> str:  # fmt: skip
    """Why no few-row kernel serves a product on a CUDA device; empty if one does."""
    most = MOST_ROWS if capability == (9, 0) else _MOST_ROWS_SM80
    if dtype not in (torch.float16, torch.bfloat16):
        return f"the few-row kernels take float16 and bfloat16, x is {dtype}"
    if m > most:
        return f"the few-row kernels take up to {most} rows here, x has {m}"
    if blocksize != _BLOCKSIZE:
        return f"the few-row kernels take blocks of {_BLOCKSIZE}, the weight has {blocksize}"
    if k % _BLOCKSIZE:
        return f"the few-row kernels take multiples of {_BLOCKSIZE} in features, x has {k}"
    fewest = next(long if k > 4096 else short for rows, short, long in _FEWEST if m <= rows)
    if n <= fewest * sm_count:
        return f"with {m} rows and {n} out features a dequantised scratch is faster"
    if capability < (8, 0) or capability in _SMALL:
        return f"the few-row kernels do not fit a GPU of compute capability {capability}"
    return "" if aligned else "the weight's parts do not lie at multiples of 16 bytes"


def serves(x: Tensor, packed: Tensor, absmax: Tensor, blocksize: int) -> bool:
    """Whether the few-row kernels serve x, checked and not empty, on a CUDA device."""
    k = x.shape[-1]
    aligned = packed.data_ptr() % 16 == 0 and absmax.data_ptr() % 16 == 0
    n = packed.numel() * 2 // k
    place = _nf4_operands.device_of(x.device.index)
    return not why_not(x.numel() // k, n, k, x.dtype, blocksize, aligned, *place)


_read: MutableMapping[Tensor, tuple[int, ...]] = WeakIdKeyDictionary()


def _settled(packed: Tensor, absmax: Tensor) -> bool:
    """Whether a weight was read before in its present state: no kernel that may still run writes it."""
    if packed.is_inference() or absmax.is_inference():
        return False  # no changes would be seen
    state = (packed.data_ptr(), packed._version, absmax.data_ptr(), absmax._version)
    if _read.get(packed) == state:
        return True
    _read[packed] = state
    return False


def few_rows(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out_features: int,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> Tensor:  # fmt: skip
    """y = x W^T + bias, for arguments that `serves` has accepted."""
    x_mk = _nf4_operands.in_rows(x.reshape(-1, x.shape[-1]))
    if bias is not None:
        bias = bias.contiguous()
    y_mn = x.new_empty((len(x_mk), out_features))
    name = _extension.C.nf4_few_rows(
        **_nf4_operands.arguments(
            y_mn, x_mk, packed, absmax, bias, blocksize, nested_absmax, offset
        ),
        early=_settled(packed, absmax),
    )
    _library.record("nf4_linear", name)
    return _library.shaped(y_mn, x)
