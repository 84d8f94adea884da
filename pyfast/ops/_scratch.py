# SPDX-License-Identifier: Apache-2.0
"""Device memory that ops reuse from call to call.

CUDA graphs. A captured call takes memory of its own: a graph replays on the addresses that it has seen,
while the buffers here may be replaced by larger ones. Zeroing that memory is captured as well, and what it
takes is the graph's again after the call. So the ops need no `torch.Tag.cudagraph_unsafe`. Ahead of a
capture, `mode="reduce-overhead"` runs the code once with this thread's allocations taken from the graphs'
pool, which may hold nothing but the graphs' results: what is kept is therefore allocated by another thread.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_buffers: dict[Any, Tensor] = {}
_workspaces: dict[Any, Tensor] = {}
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


def _keep(
    kept: dict[Any, Tensor],
    key: Any,
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    zeros: int,
) -> Tensor:
    """Keep a new buffer under a key, instead of a smaller one that is freed first."""
    kept.pop(key, None)
    cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device) if cuda else None

    def allocate() -> Tensor:
        with torch.cuda.stream(stream) if cuda else contextlib.nullcontext():
            made = torch.empty(numel, dtype=dtype, device=device)
            made[:zeros].zero_()
        return made

    with ThreadPoolExecutor(1) as another:
        held = kept[key] = another.submit(allocate).result()
    return held


def scratch(numel: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A buffer of `numel` elements, reused per device, dtype and stream: valid until the next call.

    Work on one stream is ordered, so the next user's writes come after the last one's reads. Inside a
    CUDA-graph capture a fresh tensor is returned.

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
        held = None  # else it would not be freed
        held = _keep(_buffers, key, numel, dtype, like.device, 0)
    return held[:numel]


def workspace(like: Tensor, stream: int, size: int, zeros: int) -> Tensor:
    """At least `size` bytes on a CUDA device for one stream, reused as `scratch` is.

    The first `zeros` bytes, the same number in every call, are zero: kernels leave zeros behind.
    """
    if torch.cuda.is_current_stream_capturing():
        fresh = like.new_empty(size, dtype=torch.uint8)
        fresh[:zeros].zero_()
        return fresh
    key = (like.get_device(), stream)
    held = _workspaces.get(key)
    if held is None or held.numel() < size:
        held = None  # else it would not be freed
        held = _keep(_workspaces, key, size, torch.uint8, like.device, zeros)
    return held
