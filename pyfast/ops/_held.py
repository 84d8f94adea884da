# SPDX-License-Identifier: Apache-2.0
"""Saved tensors of a node whose outputs may have a backward each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


class Held(NamedTuple):
    """What a backward that was not of all members leaves for the others', since autograd frees its own."""

    saved: tuple[Tensor | None, ...]
    versions: list[int]
    done: set[int]
    """Members whose derivatives were here."""

    def check(self) -> None:
        """Raise as autograd does where a saved tensor was changed."""
        if self.versions != versions(self.saved):
            raise RuntimeError(
                "lora_group: one of the variables needed for gradient computation has been modified by an "
                "inplace operation between the backwards of two members. Fix: one backward for both"
            )


def versions(tensors: Iterable[Tensor | None]) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]
