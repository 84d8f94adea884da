# SPDX-License-Identifier: Apache-2.0
"""NF4 quantisation in bitsandbytes' format, and the linear layer over it.

Letters: N out features, K in features, B quantisation blocks.

A tensor is flattened row-major and cut into blocks of `blocksize`; each block stores its largest
magnitude `absmax` and a 4-bit code a weight, two to a byte with the even element in the high nibble.
Nested ("double") quantisation stores absmax itself as 8-bit codes in blocks of 256 around their mean.
Format: QLoRA (Dettmers et al., 2023) as bitsandbytes writes it; bytes and values are equal to
bitsandbytes' except that an all-zero block is always written as code 7 (the value 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyfast import _extension
from pyfast.ops import _check, _library
from pyfast.ops._nf4_format import NEST_MAP, NEST_THRESHOLDS, NF4_CODE, NF4_THRESHOLDS

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class NestedScales(NamedTuple):
    """8-bit scales: absmax[b] = map[codes[b]] * absmax2[b // 256] + offset, each step rounded."""

    codes: Tensor
    """uint8 [B]."""
    absmax: Tensor
    """float32 [ceil(B / 256)]."""
    offset: Tensor
    """float32 scalar: the mean of the flat scales."""


def missing_kernel(tensor: Tensor, dtype: torch.dtype) -> str:
    """Why no compiled kernel serves this element type on the tensor's device; empty if one does."""
    if _extension.C is None:
        return _extension.reason
    if dtype not in _extension.DTYPES:
        return f"no compiled kernel takes {dtype}"
    if tensor.device.type == "cuda" and not _extension.has_cuda():
        return "the extension was built without CUDA (PYFAST_CUDA=OFF or no nvcc)"
    return ""


# --- nf4_quantize -------------------------------------------------------------------------------


def _quantize_check(w: Tensor, blocksize: int) -> None:
    _check.check_dtype("nf4_quantize", "w", w, (*FLOATS, torch.float64))
    _check.check_blocksize("nf4_quantize", blocksize)


def _quantize_fake(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    _quantize_check(w, blocksize)
    numel = w.numel()
    packed = w.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = w.new_empty(((numel + blocksize - 1) // blocksize,), dtype=torch.float32)
    return packed, absmax


def _quantize_reference(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    _quantize_check(w, blocksize)
    flat = w.reshape(-1).float()
    numel = flat.numel()
    full = numel - numel % blocksize
    blocks = flat[:full].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if full < numel:
        # A last, partial block is divided, not multiplied by the reciprocal: as bitsandbytes does on CPU.
        tail = flat[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, tail[None]])
        scaled = torch.cat([scaled, flat[full:] / tail])
    codes = torch.bucketize(scaled.clamp(-1, 1), NF4_THRESHOLDS.to(w.device))
    if numel % 2:
        codes = torch.cat([codes, codes.new_full((1,), 7)])
    pairs = codes.to(torch.uint8).view(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:], absmax


def _quantize_kernel(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    _quantize_check(w, blocksize)
    if reason := missing_kernel(w, w.dtype):
        result: tuple[Tensor, Tensor] = _library.fall_back("nf4_quantize", reason, w, blocksize)
        return result
    w = w.contiguous()
    packed, absmax = _quantize_fake(w, blocksize)
    name = _extension.C.nf4_quantize(
        src=w.data_ptr(),
        dtype=_extension.DTYPES[w.dtype],
        numel=w.numel(),
        blocksize=blocksize,
        packed=packed.data_ptr(),
        absmax=absmax.data_ptr(),
        **_extension.launch_args(w),
    )
    _library.record("nf4_quantize", name)
    return packed, absmax


_quantize = _library.define(
    "nf4_quantize(Tensor w, int blocksize) -> (Tensor, Tensor)",
    fake=_quantize_fake,
    reference=_quantize_reference,
    kernel=_quantize_kernel,
)


def nf4_quantize(w: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantise a tensor to NF4.

    Code of a weight: the number of midpoints between neighbouring NF4 values that lie strictly below
    w / absmax of its block.

    Args:
        w: any shape, float32, float16 or bfloat16.
        blocksize: 32, 64, 128, ... 4096 elements that share a scale.

    Returns:
        packed uint8 [ceil(numel / 2), 1], and absmax float32 [ceil(numel / blocksize)].

    Raises:
        TypeError: w is not floating point.
        ValueError: the blocksize is not one of the format's.
    """
    packed, absmax = _quantize(w.detach(), blocksize)
    return packed, absmax


# --- nf4_nest -----------------------------------------------------------------------------------


def _nest_fake(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    _check.check_dtype("nf4_nest", "absmax", absmax, (torch.float32,))
    _check.check_dtype("nf4_nest", "offset", offset, (torch.float32,))
    _check.check_shape("nf4_nest", "absmax", absmax, (absmax.numel(),))
    blocks = (absmax.numel() + _check.NEST_BLOCK - 1) // _check.NEST_BLOCK
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty((blocks,))


def _nest_reference(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    _nest_fake(absmax, offset)
    centred = absmax - offset
    blocks = -(-absmax.numel() // _check.NEST_BLOCK)
    padded = torch.nn.functional.pad(centred, (0, blocks * _check.NEST_BLOCK - absmax.numel()))
    groups = padded.view(blocks, _check.NEST_BLOCK)
    scale = groups.abs().amax(dim=1) if blocks else groups.new_empty(0)
    scaled = groups * (1.0 / scale.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled, NEST_THRESHOLDS.to(absmax.device)).to(torch.uint8)
    return codes.view(-1)[: absmax.numel()].clone(), scale


def _nest_kernel(absmax: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = _nest_fake(absmax, offset)
    if reason := missing_kernel(absmax, absmax.dtype):
        result: tuple[Tensor, Tensor] = _library.fall_back("nf4_nest", reason, absmax, offset)
        return result
    absmax = absmax.contiguous()
    name = _extension.C.nf4_nest(
        absmax=absmax.data_ptr(),
        num_blocks=absmax.numel(),
        offset=offset.data_ptr(),
        codes=codes.data_ptr(),
        nested_absmax=scale.data_ptr(),
        **_extension.launch_args(absmax),
    )
    _library.record("nf4_nest", name)
    return codes, scale


_nest = _library.define(
    "nf4_nest(Tensor absmax, Tensor offset) -> (Tensor, Tensor)",
    fake=_nest_fake,
    reference=_nest_reference,
    kernel=_nest_kernel,
)


def nf4_nest(absmax: Tensor) -> NestedScales:
    """Quantise NF4 scales to 8 bits ("double quantisation"): 4.5 to 4.127 bits a weight.

    offset = mean(absmax); each block of 256 of absmax - offset is scaled by its largest magnitude and
    stored as the nearest entry of the signed dynamic 8-bit map.

    Args:
        absmax: float32 [B] from `nf4_quantize`.

    Raises:
        TypeError: absmax is not float32.
    """
    _check.check_dtype("nf4_nest", "absmax", absmax, (torch.float32,))
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    codes, scale = _nest(absmax, offset)
    return NestedScales(codes, scale, offset)


# --- nf4_dequantize -----------------------------------------------------------------------------


def _dequantize_fake(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    if dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"nf4_dequantize: dtype must be a floating-point type, got {dtype}")
    if any(size < 0 for size in shape):
        raise ValueError(f"nf4_dequantize: shape must not be negative, got {list(shape)}")
    numel = math.prod(shape)
    _check.check_quantized(
        "nf4_dequantize", packed, absmax, numel, blocksize, nested_absmax, offset
    )
    return packed.new_empty(shape, dtype=dtype)


def flat_scales(absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None) -> Tensor:
    """The float32 scales [B] that flat or nested storage stands for."""
    if nested_absmax is None or offset is None:
        return absmax
    scale = nested_absmax.repeat_interleave(_check.NEST_BLOCK)[: absmax.numel()]
    return NEST_MAP.to(absmax.device)[absmax.long()] * scale + offset


def dequantize_reference(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    _dequantize_fake(packed, absmax, shape, dtype, blocksize, nested_absmax, offset)
    numel = math.prod(shape)
    flat = packed.view(-1)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[:numel]
    scales = flat_scales(absmax, nested_absmax, offset).repeat_interleave(blocksize)[:numel]
    values = NF4_CODE.to(packed.device)[codes.int()] * scales
    return values.to(dtype).view(tuple(shape))


def dequantize_into(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    first_block: int = 0,
) -> None:
    """Write out.numel() weights, from block `first_block` on, into a contiguous buffer (no checks)."""
    if (
        out.numel() == 0
    ):  # empty parts have null pointers, by which the kernel tells flat from nested
        return
    name = _extension.C.nf4_dequantize(
        packed=packed.data_ptr(),
        absmax=absmax.data_ptr(),
        nested_absmax=_extension.ptr(nested_absmax),
        offset=_extension.ptr(offset),
        out=out.data_ptr(),
        dtype=_extension.DTYPES[out.dtype],
        first_block=first_block,
        numel=out.numel(),
        blocksize=blocksize,
        **_extension.launch_args(out),
    )
    _library.record("nf4_dequantize", name)


def _dequantize_kernel(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocksize: int,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
) -> Tensor:
    args = (packed, absmax, shape, dtype, blocksize, nested_absmax, offset)
    if reason := missing_kernel(packed, dtype):
        result: Tensor = _library.fall_back("nf4_dequantize", reason, *args)
        return result
    out = _dequantize_fake(*args)
    dequantize_into(out, packed, absmax, blocksize, nested_absmax, offset)
    return out


_dequantize = _library.define(
    "nf4_dequantize(Tensor packed, Tensor absmax, SymInt[] shape, ScalarType dtype, int blocksize, "
    "Tensor? nested_absmax, Tensor? offset) -> Tensor",
    fake=_dequantize_fake,
    reference=dequantize_reference,
    kernel=_dequantize_kernel,
)


def nf4_dequantize(
    packed: Tensor,
    absmax: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    blocksize: int = 64,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
) -> Tensor:
    """Restore a tensor from NF4: w = round_dtype(code_value * absmax), the product in float32.

    Args:
        packed: uint8 [ceil(numel / 2), 1].
        absmax: float32 [B], or the uint8 codes [B] of nested scales.
        shape: shape of the result.
        dtype: float32, float16 or bfloat16.
        blocksize: elements that share a scale.
        nested_absmax: float32 [ceil(B / 256)] for nested scales.
        nested_offset: float32 scalar for nested scales.

    Raises:
        QuantStateError: the parts do not fit together or the shape.
        TypeError: a part has the wrong dtype.
    """
    out: Tensor = _dequantize(
        packed, absmax, list(shape), dtype, blocksize, nested_absmax, nested_offset
    )
    return out
