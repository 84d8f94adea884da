# SPDX-License-Identifier: Apache-2.0
"""What torch's autocast does to `F.linear`, for our own ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cast_for_autocast(first: Tensor, *others: Tensor | None) -> Any:
    """Cast floating-point tensors (but float64) to the autocast dtype of the first one's device, if on."""
    if not torch._C._is_any_autocast_enabled():  # a quick answer for most calls
        return first, *others
    kind = first.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # torch has no autocast for meta
        return first, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype)
        if t is not None and t.is_floating_point() and t.dtype is not torch.float64
        else t
        for t in (first, *others)
    )
