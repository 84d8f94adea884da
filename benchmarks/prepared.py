# SPDX-License-Identifier: Apache-2.0
"""What a provider makes of a case: a step that can be measured, or the reason why there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Step


class Absent(Exception):
    """This provider does not serve the case; the text says why."""


@dataclass(frozen=True)
class Prepared:
    """A provider's step for one case and mode.

    Attributes:
        step: does the work on copy i.
        read: the step's result as the tensors that the oracle has; None: it computes something else.
        around: runs what it is given with the provider's global settings in place.
        keep: what dropout multiplies a tensor's elements with if it is drawn from the seed that the step
            begins with, of each linear in turn; None: no dropout.
        graphs: the step can be captured in a CUDA graph.
        facts: what the row says besides.
        shared_bytes: of tensors that the step needs and that were there before it was prepared, where the
            memory of all that it needs is asked for.
    """

    step: Step
    read: Callable[[Any], list[Tensor]] | None
    around: Callable[[Callable[[], object]], object] = lambda work: work()
    keep: Callable[[Tensor], Tensor] | None = None
    graphs: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    shared_bytes: int | None = None


def need(package: str) -> None:
    """Raise Absent where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")


def need_cuda(what: str, tensor: Tensor) -> None:
    """Raise Absent where the operands lie elsewhere."""
    if tensor.device.type != "cuda":
        raise Absent(f"{what} needs a CUDA device")


def with_blas(library: str) -> Callable[[Callable[[], object]], object]:
    """A `Prepared.around` with cuBLAS or cuBLASLt behind torch's products."""

    def around(work: Callable[[], object]) -> object:
        if not torch.cuda.is_available():
            return work()
        torch.backends.cuda.preferred_blas_library(library)
        try:
            return work()
        finally:
            torch.backends.cuda.preferred_blas_library("default")

    return around
