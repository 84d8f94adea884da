# SPDX-License-Identifier: Apache-2.0
"""Gradients of factors that a kernel adds to `.grad` itself, without torch's accumulation: opt-in.

It saves a launch and a read of each gradient for every backward but the first of a step, and host time in
all. torch's accumulation, and with it what DDP hangs on it, gets no gradient: so nothing is done in that way
beside other processes, for a parameter with hooks, or where `torch.autograd.grad` asks for other gradients.
A hook on the AccumulateGrad node is not to be seen from here: it runs with None for the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast.ops._alone import is_alone

_MARK = "pyfast_accumulates"


def mark(parameter: Tensor, enabled: bool) -> None:
    """Let kernels add to a parameter's `.grad`, or no longer."""
    if enabled:
        setattr(parameter, _MARK, True)
    elif hasattr(parameter, _MARK):
        delattr(parameter, _MARK)


def is_marked(parameter: Tensor) -> bool:
    """Whether kernels may add to a parameter's `.grad`."""
    return getattr(parameter, _MARK, False)


def goes_into_grad(node: Any, place: int, parameter: Tensor) -> bool:
    """Whether what a backward makes for a parameter goes into its `.grad` now.

    Args:
        node: the backward's, which runs.
        place: of the parameter among the tensors that the node's forward was given.
        parameter: a leaf.
    """
    if not is_marked(parameter) or not is_alone() or not parameter.is_contiguous():
        return False
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    grad = parameter.grad
    fits = grad is None or (
        type(grad) is Tensor
        and grad.dtype is parameter.dtype
        and grad.is_contiguous()
        and not grad.requires_grad
    )
    if not fits:
        return False
    try:
        return torch._C._will_engine_execute_node(node.next_functions[place][0])
    except RuntimeError:  # torch.autograd.grad captures it
        return False


def those_into_grad(
    node: Any, place: int, parameters: Sequence[Tensor | None], wanted: Sequence[bool]
) -> dict[int, Tensor]:
    """Those of several, by their number, that `goes_into_grad` is true of; absent ones have no place, and of
    one that is there twice torch adds the gradients up."""
    ids = [id(parameter) for parameter in parameters]
    here = [i for i, parameter in enumerate(parameters) if parameter is not None]
    return {
        i: parameters[i]  # type: ignore[misc]
        for at, i in enumerate(here, place)
        if wanted[i] and ids.count(ids[i]) == 1 and goes_into_grad(node, at, parameters[i])  # type: ignore[arg-type]
    }
