# SPDX-License-Identifier: Apache-2.0
"""What the kernels that multiply with an NF4 weight's packed bytes share: the device, and their arguments."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyfast import _extension


@functools.cache
def device_of(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def in_rows(x_mk: Tensor) -> Tensor:
    """x [M, K] itself where its rows lie in 16-byte units, else a copy."""
    step, pitch, k = x_mk.stride(1), x_mk.stride(0), x_mk.shape[1]
    if step != 1 or pitch % 8 or pitch < k or x_mk.data_ptr() % 16:
        return x_mk.clone(memory_format=torch.contiguous_format)
    return x_mk


def arguments(
    out: Tensor, x_mk: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None,
    blocksize: int, nested_absmax: Tensor | None, offset: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """Of out [..., N], contiguous, = x W^T + bias, by the names that C++ knows; x `in_rows`."""
    m, k = x_mk.shape
    n = out.shape[-1]
    return {
        "x": x_mk.data_ptr(),
        "pitch_x": max(x_mk.stride(0), k),
        "packed": packed.data_ptr(),
        "absmax": absmax.data_ptr(),
        "nested_absmax": _extension.ptr(nested_absmax),
        "offset": _extension.ptr(offset),
        "bias": _extension.ptr(bias),
        "y": out.data_ptr(),
        "pitch_y": n,
        "m": m,
        "n": n,
        "k": k,
        "dtype": _extension.DTYPES[x_mk.dtype],
        "blocksize": blocksize,
        **_extension.launch_args(x_mk),
    }
