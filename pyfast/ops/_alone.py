# SPDX-License-Identifier: Apache-2.0
"""Whether other processes take part in what this one computes."""

from __future__ import annotations

from torch import distributed

from pyfast import _extension

_alone = True
"""What C++ was told last by `share_device`."""


def is_alone() -> bool:
    """Whether no other process takes part in what this one computes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return True
    return distributed.get_world_size() == 1


def share_device() -> bool:
    """Let a GEMM take its SMs all at once where no peer's answer can hold some of them; whether it may."""
    global _alone
    alone = is_alone()
    if alone is not _alone:
        _extension.C.lora_allow_making(alone)
        _alone = alone
    return alone
