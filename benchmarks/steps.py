# SPDX-License-Identifier: Apache-2.0
"""Steps of differentiable ops: the outputs, and in mode fwdbwd the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.operands import Operands
from benchmarks.timing import Step


def step_of(
    mode: str,
    forward: Callable[[int], Sequence[Tensor]],
    leaves: list[list[Tensor]],
    dys: list[list[Tensor]],
) -> Step:
    """A step of `forward` on copy i, and in mode fwdbwd the gradients of its leaves."""
    if mode == "fwd":

        def step(i: int) -> list[Tensor]:
            with torch.no_grad():
                return list(forward(i))
    else:

        def step(i: int) -> list[Tensor]:
            ys = forward(i)
            return [*ys, *torch.autograd.grad(ys, leaves[i], dys[i])]

    return step


def step_of_one(
    mode: str,
    copies: list[Operands],
    forward: Callable[[int], Tensor],
    leaves: list[list[Tensor]] | None = None,
) -> Step:
    """The same for an op with one output, by default with the gradients of all operands."""
    leaves = leaves or [operands.leaves() for operands in copies]
    dys = [operands.dys for operands in copies]
    return step_of(mode, lambda i: [forward(i)], leaves, dys)
