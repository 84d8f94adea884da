# SPDX-License-Identifier: Apache-2.0
"""Device memory that ops reuse from call to call."""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

_buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
_workspaces: dict[tuple[torch.device, int], Tensor] = {}
scratch_lock = threading.Lock()
"""Held from `scratch` to the last launch that uses it: threads share buffers, and launches drop the GIL."""


def _renew_after_fork() -> None:
    """In a forked child nobody is left to release the lock, nor to finish what was in the buffers."""
    scratch_lock._at_fork_reinit()  # type: ignore[attr-defined]
    _buffers.clear()
    _workspaces.clear()


os.register_at_fork(after_in_child=_renew_after_fork)


def raw_stream(device: int) -> int:
    """Handle of a CUDA device's current stream, without the 5 us of a Stream object."""
    return torch._C._cuda_getCurrentRawStream(device)


def scratch(numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A buffer of `numel` elements, reused per device, dtype and stream: valid until the next call.

    Work on one stream is ordered, so the next user's writes come after the last one's reads. Inside a
    CUDA-graph capture a fresh tensor is returned: a graph owns the memory it replays on.

    Args:
        numel: elements.
        like: a tensor on the device.
        dtype: default that of `like`.
    """
    dtype = dtype or like.dtype
    stream = 0
    if like.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return like.new_empty((numel,), dtype=dtype)
        stream = raw_stream(like.device.index)
    key = (like.device, dtype, stream)
    held = _buffers.get(key)
    if held is None or held.numel() < numel:
        held = _buffers[key] = torch.empty(numel, dtype=dtype, device=like.device)
    return held[:numel]


def workspace(like: Tensor, stream: int, size: int, zeros: int) -> Tensor:
    """At least `size` bytes on a CUDA device for one stream, reused as `scratch` is.

    The first `zeros` bytes, the same number in every call, are zero: kernels leave zeros behind.
    """
    capturing = torch.cuda.is_current_stream_capturing()
    key = (like.device, stream)
    held = None if capturing else _workspaces.get(key)
    if held is None or held.numel() < size:
        held = like.new_empty(size, dtype=torch.uint8)
        held[:zeros].zero_()
        if not capturing:
            _workspaces[key] = held
    return held
