# SPDX-License-Identifier: Apache-2.0
"""Argument checks shared by fakes, references and kernels, so that each failure has one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyfast.errors import QuantStateError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NEST_BLOCK = 256


def check_dtype(op: str, name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless the tensor's dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {names}, got {got}")


def check_weight(op: str, name: str, weight: torch.Tensor, x: torch.Tensor) -> None:
    """Raise TypeError unless a dense weight has x's dtype, which is that of the product."""
    if weight.dtype is x.dtype:
        return
    if not weight.is_floating_point():
        check_dtype(op, name, weight, (x.dtype,))
    got, expected = (str(tensor.dtype).removeprefix("torch.") for tensor in (x, weight))
    # Autocast leaves float64 alone.
    helps = torch.float64 not in (x.dtype, weight.dtype)
    raise TypeError(
        f"{op}: x is {got} and {name} {expected}. Fix: cast x to {expected}"
        + (", or call the model under torch.autocast" if helps else "")
    )


def check_shape(op: str, name: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless the tensor's shape is `expected`."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {list(expected)}, got {list(tensor.shape)}")


def features(op: str, name: str, tensor: torch.Tensor) -> int:
    """Size of the last axis; raise ValueError for a tensor without axes."""
    if tensor.dim() == 0:
        raise ValueError(f"{op}: {name} must have at least one dimension, got a scalar")
    return tensor.shape[-1]


def rows(op: str, name: str, tensor: torch.Tensor) -> int:
    """Size of a matrix's first axis; raise ValueError for a tensor that is none."""
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must have two dimensions, got {list(tensor.shape)}")
    return tensor.shape[0]


def check_same_device(op: str, first: torch.Tensor, **others: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors lie on the first one's device."""
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {other.device}, the input on {first.device}; "
                f"move the module or the input to one device"
            )


def check_blocksize(op: str, blocksize: int) -> None:
    """Raise ValueError unless `blocksize` is one that the format has."""
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"{op}: blocksize must be one of {BLOCKSIZES}, got {blocksize}")


def check_quantized(
    op: str,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    numel: int,
    blocksize: int,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
) -> None:
    """Raise unless the parts of an NF4 tensor of `numel` elements fit together.

    The lengths are checked before any kernel reads through the pointers.
    """
    check_blocksize(op, blocksize)
    check_dtype(op, "packed", packed, (torch.uint8,))
    num_blocks = -(-numel // blocksize)
    _check_numel(op, "packed", packed, -(-numel // 2), numel, blocksize)
    _check_numel(op, "absmax", absmax, num_blocks, numel, blocksize)
    if (nested_absmax is None) != (offset is None):
        raise QuantStateError(f"{op}: nested_absmax and offset go together; one of them is missing")
    if nested_absmax is None or offset is None:
        check_dtype(op, "absmax", absmax, (torch.float32,))
    else:
        check_dtype(op, "nested absmax codes", absmax, (torch.uint8,))
        check_dtype(op, "nested_absmax", nested_absmax, (torch.float32,))
        check_dtype(op, "offset", offset, (torch.float32,))
        _check_numel(
            op, "nested_absmax", nested_absmax, -(-num_blocks // NEST_BLOCK), numel, blocksize
        )
        _check_numel(op, "offset", offset, 1, numel, blocksize)
    check_same_device(op, packed, absmax=absmax, nested_absmax=nested_absmax, offset=offset)


def _check_numel(
    op: str, name: str, tensor: torch.Tensor, expected: int, numel: int, blocksize: int
) -> None:
    if tensor.numel() != expected:
        raise QuantStateError(
            f"{op}: {name} has {tensor.numel()} values, {expected} are needed for {numel} weights "
            f"at blocksize {blocksize}; the quantised weight is damaged or belongs to another shape"
        )
    if not tensor.is_contiguous():
        raise QuantStateError(f"{op}: {name} must be contiguous; pass {name}.contiguous()")
