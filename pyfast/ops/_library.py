# SPDX-License-Identifier: Apache-2.0
"""Registration of ops with torch: schema, fake, reference, kernels and autograd in one call.

`torch.library.Library` is used directly because `torch.library.custom_op` costs about three times as
much a call. This is the only file that touches it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad

from pyfast.errors import UnsupportedError

_LIB: Any = torch.library.Library("pyfast", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


@dataclass(frozen=True)
class Op:
    """One registered op and the functions that serve it; `devices` are those its kernel takes."""

    name: str
    overload: Any
    reference: Callable[..., Any]
    devices: tuple[str, ...]
    differentiable: bool


OPS: dict[str, Op] = {}
"""Every op by name: the generic tests and `pyfast info` walk this table."""


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
    devices: tuple[str, ...] = ("CPU", "CUDA"),
    autograd: Callable[..., Any] | None = None,
) -> Any:
    """Register an op and return its overload.

    Args:
        schema: torch schema without the namespace, such as `"scale(Tensor x) -> Tensor"`.
        fake: shape and dtype propagation; runs the op's checks, so eager and compiled calls fail alike.
        reference: plain torch; serves every device that `kernel` does not, and is the tests' oracle.
        kernel: the compiled implementation.
        devices: dispatch keys of the devices whose tensors `kernel` takes.
        autograd: called as `autograd(*args)` where a gradient is wanted; applies an autograd.Function.
    """
    name = schema.split("(", 1)[0]
    _LIB.define(schema, tags=_TAGS)
    overload = getattr(torch.ops.pyfast, name).default
    torch.library.register_fake(f"pyfast::{name}", fake, lib=_LIB)

    def checked_reference(*args: Any) -> Any:
        record(name, "reference")
        return reference(*args)

    _LIB.impl(name, checked_reference, "CompositeExplicitAutograd")
    if kernel is not None:
        for device in devices:
            _LIB.impl(name, kernel, device)
    if autograd is not None:

        def route(*args: Any) -> Any:
            _refuse_transforms(name, args)
            if torch.is_grad_enabled() and any(
                isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
            ):
                return autograd(*args)
            return below_autograd(overload, *args)

        _LIB.impl(name, route, "Autograd")
    served = devices if kernel is not None else ()
    OPS[name] = Op(name, overload, reference, served, autograd is not None)
    return overload


def _refuse_transforms(op: str, args: tuple[Any, ...]) -> None:
    """Raise for a derivative that would be silently zero, or fail far from the call."""
    forward = forward_ad._current_level >= 0
    functional = torch._C._are_functorch_transforms_active()
    if not forward and not functional:
        return
    for arg in args:
        if isinstance(arg, torch.Tensor) and (
            (functional and arg.requires_grad)
            or (forward and forward_ad.unpack_dual(arg).tangent is not None)  # type: ignore[no-untyped-call]
        ):
            raise UnsupportedError(
                f"pyfast.{op} serves neither forward-mode derivatives nor torch.func's transforms. "
                "Fix: torch.autograd.grad or backward()."
            )


def below_autograd(overload: Any, *args: Any) -> Any:
    """Call an op past its autograd registration: for an autograd.Function's forward."""
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


_recorders: list[list[tuple[str, str]]] = []
_warned: set[tuple[str, str]] = set()


def record(op: str, kernel: str) -> None:
    """Note which kernel served an op, for `recorded_kernels`."""
    for recorder in _recorders:
        recorder.append((op, kernel))


@contextlib.contextmanager
def recorded_kernels() -> Iterator[list[tuple[str, str]]]:
    """Collect `(op, kernel name)` for every pyfast op that runs inside the block, in order."""
    recorder: list[tuple[str, str]] = []
    _recorders.append(recorder)
    try:
        yield recorder
    finally:
        _recorders.remove(recorder)


def fall_back(op: str, reason: str, *args: Any) -> Any:
    """Serve a call by the reference; on an accelerator say so once for each (op, reason)."""
    if (op, reason) not in _warned and any(
        isinstance(arg, torch.Tensor) and arg.device.type != "cpu" for arg in args
    ):
        _warned.add((op, reason))
        warnings.warn(f"pyfast.{op} runs its torch reference: {reason}", stacklevel=3)
    record(op, "reference")
    return OPS[op].reference(*args)
