# SPDX-License-Identifier: Apache-2.0
"""Registration of ops with torch: schema, fake, reference, kernels and autograd in one call.

`torch.library.Library` is used directly because `torch.library.custom_op` costs about three times as
much a call. This is the only file that touches it. Eager calls on plain tensors go past the dispatcher
as well, see `_caller`.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from pyfast.errors import UnsupportedError

_LIB: Any = torch.library.Library("pyfast", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_DEVICES = ("CPU", "CUDA")


@dataclass(frozen=True)
class Op:
    """One registered op and the functions that serve it; `devices` are those its kernel takes.

    `overload` goes through torch's dispatcher, `call` past it where it can, see `_caller`.
    """

    name: str
    overload: Any
    call: Callable[..., Any]
    reference: Callable[..., Any]
    devices: tuple[str, ...]
    differentiable: bool


OPS: dict[str, Op] = {}
"""Every op by name: the generic tests and `pyfast info` walk this table."""


def _plain_keys(device: str) -> list[int]:
    """Dispatch keys of a device's plain tensors, made in inference mode and else: no subclass, transform,
    lazy negation, sparse or quantised layout."""
    key = torch._C.DispatchKey
    keys = torch._C.DispatchKeySet(getattr(key, device))
    keys = keys | torch._C.DispatchKeySet(getattr(key, f"Autocast{device}"))
    inference = keys.raw_repr()
    for name in (f"Autograd{device}", "ADInplaceOrView"):
        keys = keys | torch._C.DispatchKeySet(getattr(key, name))
    return [inference, keys.raw_repr()]


_PLAIN = frozenset(_plain_keys("CPU") + _plain_keys("CUDA"))


def direct(tensor: Tensor) -> bool:
    """Whether a kernel may be called past the dispatcher for a tensor, as `_caller` decides for arguments.
    For a backward whose forward was called so: one of its gradients stands for all tensors."""
    return type(tensor) is Tensor and (
        torch._C._dispatch_keys(tensor).raw_repr() in _PLAIN and _undisturbed(())
    )


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
    devices: tuple[str, ...] = _DEVICES,
    autograd: type[Function] | None = None,
) -> Callable[..., Any]:
    """Register an op and return the function that calls it.

    Args:
        schema: torch schema without the namespace, such as `"scale(Tensor x) -> Tensor"`.
        fake: shape and dtype propagation; runs the op's checks, so eager and compiled calls fail alike.
        reference: plain torch; serves every device that `kernel` does not, and is the tests' oracle.
        kernel: the compiled implementation.
        devices: dispatch keys of the devices whose tensors `kernel` takes.
        autograd: applied where a gradient is wanted; its forward is given the op below autograd ahead of
            the op's arguments.
    """
    name = schema.split("(", 1)[0]
    _LIB.define(schema, tags=_TAGS)
    overload = getattr(torch.ops.pyfast, name).default
    torch.library.register_fake(f"pyfast::{name}", fake, lib=_LIB)

    def checked_reference(*args: Any) -> Any:
        record(name, "reference")
        return reference(*args)

    _LIB.impl(name, checked_reference, "CompositeExplicitAutograd")
    kernels = {key: checked_reference for device in _DEVICES for key in _plain_keys(device)}
    if kernel is not None:
        for device in devices:
            _LIB.impl(name, kernel, device)
            kernels |= dict.fromkeys(_plain_keys(device), kernel)
    if autograd is not None:
        below = functools.partial(below_autograd, overload)

        def route(*args: Any) -> Any:
            _refuse_transforms(name, args)
            if torch.is_grad_enabled() and any(
                isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
            ):
                return autograd.apply(below, *args)  # type: ignore[no-untyped-call]
            return below(*args)

        _LIB.impl(name, route, "Autograd")
    served = devices if kernel is not None else ()
    call = _caller(name, overload, kernels, autograd)
    OPS[name] = Op(name, overload, call, reference, served, autograd is not None)
    return call


def _caller(
    name: str,
    overload: Any,
    kernels: dict[int, Callable[..., Any]],
    autograd: type[Function] | None,
) -> Callable[..., Any]:
    """The op as a function that goes past torch's dispatcher, 6 us a call and 18 with a gradient, where that
    would only find the kernel: eager, nothing listens or transforms, all tensors plain and of one device."""
    arguments = overload._schema.arguments
    places = [place for place, argument in enumerate(arguments) if "Tensor" in str(argument.type)]
    keys_of = torch._C._dispatch_keys
    # Function.apply's own first half is about transforms, which an eager call is known to be free of.
    attach = None if autograd is None else super(Function, autograd).apply  # type: ignore[misc]

    def dispatched(*args: Any) -> Any:
        refuse_nested(name, *args)
        return overload(*args)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not _undisturbed(args):
            return dispatched(*args)
        kernel, wanted = None, False
        for place in places:
            arg = args[place]
            if arg is None:
                continue
            found = kernels.get(keys_of(arg).raw_repr()) if isinstance(arg, Tensor) else None
            if found is None or found is not (kernel or found):
                return dispatched(*args)
            kernel, wanted = found, wanted or arg.requires_grad
        if kernel is None or not (wanted and torch.is_grad_enabled()):
            return (kernel or overload)(*args)
        return overload(*args) if attach is None else attach(kernel, *args)

    return call


def _undisturbed(args: tuple[Any, ...]) -> bool:
    """Whether no mode, subclass, transform, forward-mode derivative, trace or profiler takes part in a call;
    profilers are told the op's name by the dispatcher."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._has_torch_function(args)
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    )


def refuse_nested(op: str, *args: Any) -> None:
    """Raise for nested tensors, jagged and strided ones."""
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_nested:
            raise UnsupportedError(
                f"pyfast.{op} does not take nested tensors. Fix: a padded batch with its attention mask, or "
                "the packed rows, x.values() of a jagged one, with a mask that keeps sequences apart."
            )


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


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, for the calls that it matters to: its guards cost 4 us.

    torch's refuses a second derivative where an incoming gradient has one. Here that is also where two inputs
    want gradients, for each of theirs depends on the other input.
    """
    guarded = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def choose(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        if sum(ctx.needs_input_grad) > 1:
            grads = tuple([None if g is None else g.detach().requires_grad_() for g in grads])
        return guarded(ctx, *grads)

    return choose


_MOST_PLANS = 4096
_ABSENT: Any = object()


def planned(make: Callable[..., Any]) -> Callable[..., Any]:
    """Call `make`, which checks and plans a launch, once for each signature: the tensors' types, shapes,
    strides, devices and alignment, the other arguments' values. What raises is made again."""
    plans: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(make)
    def plan(*args: Any) -> Any:
        signature = tuple(
            [
                (arg.dtype, arg.shape, arg.stride(), arg.device, arg.data_ptr() % 16)
                if isinstance(arg, Tensor)
                else arg
                for arg in args
            ]
        )
        found = plans.get(signature, _ABSENT)
        if found is _ABSENT:
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            found = plans[signature] = make(*args)
        return found

    return plan


def shaped(y_mn: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y as [..., N], in place: of several outputs none that is a view may be changed by the caller."""
    return y_mn if x.dim() == 2 else y_mn.resize_(*x.shape[:-1], y_mn.shape[1])


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
        _recorders[:] = [other for other in _recorders if other is not recorder]


def fall_back(op: str, reason: str, *args: Any) -> Any:
    """Serve a call by the reference; on an accelerator say so once for each (op, reason)."""
    if (op, reason) not in _warned and any(
        isinstance(arg, torch.Tensor) and arg.device.type != "cpu" for arg in args
    ):
        _warned.add((op, reason))
        warnings.warn(f"pyfast.{op} runs its torch reference: {reason}", stacklevel=3)
    record(op, "reference")
    return OPS[op].reference(*args)
