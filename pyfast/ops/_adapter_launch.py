# SPDX-License-Identifier: Apache-2.0
"""Launches of the CUDA kernels behind `adapter_bottleneck` and `adapter_scale`;
csrc/adapter/adapter.h and scale.h say what they compute.

One call into C++ a direction. Of many rows and more than `FUSED_RANKS` ranks torch makes dU = dy^T act(h):
our kernels have no registers left for it beside D's gradient, and would read dy once more for it, too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfast import _extension
from pyfast.ops import _library
from pyfast.ops._lora_launch import as_matrix, copied, in_place
from pyfast.ops._scratch import raw_stream, scratch_lock, workspace

_HALVES = (torch.float16, torch.bfloat16)
_MOST_RANK = 256
_ACTIVATIONS = ("silu", "gelu", "relu")
FUSED_RANKS, MANY_ROWS = 128, 1024
"""Up to so many ranks, or below so many rows, our kernels make dU."""


def missing(x: Tensor, down: Tensor) -> str:
    """Why the kernels cannot serve a call; empty when they can."""
    if reason := _extension.missing_cuda():
        return reason
    if x.dtype not in _HALVES:
        return f"there are kernels for float16 and bfloat16, not {x.dtype}"
    r, k = down.shape
    if k % 8 or k == 0:
        return f"the features must be a multiple of 8, got {k}"
    if r % 8 or not 0 < r <= _MOST_RANK:
        return f"the bottleneck's size must be a multiple of 8 up to {_MOST_RANK}, got {r}"
    if x.numel() == 0:
        return "there are no rows"
    return _extension.C.adapter_missing(x.device.index, r)  # type: ignore[no-any-return]


class Plan(NamedTuple):
    """What every launch of one direction for one signature shares."""

    reason: str
    """Why the kernels cannot serve; the rest is then unset."""
    device: int = 0
    sizes: tuple[int, ...] = ()
    """Codes of the dtype and the activation, M, K and R."""
    x_in_place: bool = True
    """Whether the kernels can read x as it lies; else they get a copy. So for dy, and for all others."""
    pitch_x: int = 0
    dy_in_place: bool = True
    pitch_dy: int = 0
    others_in_place: bool = True
    counters: int = 0
    """Bytes of zeros ahead of the workspace, as all kernels of a stream have them, and of both."""
    space: int = 0


def plan(
    x: Tensor, down: Tensor, others: tuple[Tensor | None, ...], activation: str,
    grad_y: Tensor | None = None,
) -> Plan:  # fmt: skip
    """The plan of a forward, or with `grad_y` of a backward; `others` must be contiguous on 16 bytes."""
    if reason := missing(x, down):
        return Plan(reason)
    (r, k), device = down.shape, x.device.index
    m = x.numel() // k
    x_in_place, pitch_x = in_place(x, k)
    dy_in_place, pitch_dy = (True, k) if grad_y is None else in_place(grad_y, k)
    counters = 4 * _extension.C.lora_counters
    return Plan(
        "",
        device,
        (_extension.DTYPES[x.dtype], _ACTIVATIONS.index(activation), m, k, r),
        x_in_place,
        pitch_x,
        dy_in_place,
        pitch_dy,
        all(_fits(other) for other in (down, *others)),
        counters,
        counters + _extension.C.adapter_workspace(device, m, k, r),
    )


def _fits(tensor: Tensor | None) -> bool:
    return tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0)


def _fitting(*tensors: Tensor | None) -> list[Tensor | None]:
    """Those that do not fit as copies."""
    return [tensor if tensor is None or _fits(tensor) else copied(tensor) for tensor in tensors]


def stats_shape(m: int, r: int, norm_weight: Tensor | None) -> tuple[int, int]:
    """Of the statistics that the norm's backward needs, float32: a row's mean and 1 / deviation, and a rank's
    sum of D w, and d with the sum of D b."""
    return (0 if norm_weight is None else m + r, 2)


def forward(
    plan: Plan, x: Tensor, down: Tensor, up: Tensor, down_bias: Tensor | None,
    up_bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, h and the statistics, see `ops.adapter_bottleneck`."""
    _, _, m, _, r = plan.sizes
    if not plan.x_in_place:
        x = copied(x)
    others: Any = (down, up, down_bias, up_bias, norm_weight, norm_bias)
    if not plan.others_in_place:
        others = _fitting(*others)
    down, up, down_bias, up_bias, norm_weight, norm_bias = others
    y, h = x.new_empty(x.shape), x.new_empty(m, r)
    stats = x.new_empty(stats_shape(m, r, norm_weight), dtype=torch.float32)
    ptr, stream = _extension.ptr, raw_stream(plan.device)
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        name = _extension.C.adapter_forward(
            plan.device, stream, *plan.sizes, x.data_ptr(), plan.pitch_x, down.data_ptr(),
            up.data_ptr(), ptr(norm_weight), ptr(norm_bias), h.data_ptr(), stats.data_ptr(),
            space.data_ptr() + plan.counters, eps, ptr(down_bias), ptr(up_bias),
            y.data_ptr(),
        )  # fmt: skip
    _library.record("adapter_bottleneck", name)
    return y, h, stats


def backward(
    plan: Plan, grad_y: Tensor, h: Tensor, x: Tensor, down: Tensor, up: Tensor,
    norm_weight: Tensor | None, norm_bias: Tensor | None, activation: str, eps: float,
    wanted: list[bool], stats: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of x, D, U, d, u and the norm's weight and bias, empty where not wanted."""
    k, r = up.shape
    shapes = (x.shape, (r, k), (k, r), (r,), (k,), (k,), (k,))
    grads = [
        x.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    ]
    if not any(wanted):
        return tuple(grads)
    if not plan.x_in_place:
        x = copied(x)
    if not plan.dy_in_place:
        grad_y = copied(grad_y)
    others: Any = (h, down, up, norm_weight, norm_bias, stats)
    if not plan.others_in_place:
        others = _fitting(*others)
    h, down, up, norm_weight, norm_bias, stats = others
    composed = wanted[2] and r > FUSED_RANKS and h.shape[0] >= MANY_ROWS
    active = torch.empty_like(h) if composed else None
    made = [want and not (composed and i == 2) for i, want in enumerate(wanted)]
    ptr, stream = _extension.ptr, raw_stream(plan.device)
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        name = _extension.C.adapter_backward(
            plan.device, stream, *plan.sizes, x.data_ptr(), plan.pitch_x, down.data_ptr(),
            up.data_ptr(), ptr(norm_weight), ptr(norm_bias), h.data_ptr(), ptr(stats),
            space.data_ptr() + plan.counters, grad_y.data_ptr(), plan.pitch_dy,
            ptr(active), *(grad.data_ptr() if ours else 0 for grad, ours in zip(grads, made, strict=True)),
        )  # fmt: skip
    if active is not None:
        torch.mm(as_matrix(grad_y).t(), active, out=grads[2])
    _library.record("adapter_bottleneck_backward", name)
    return tuple(grads)


class ScalePlan(NamedTuple):
    """What every call of `adapter_scale` for one signature shares; `reason` as in `Plan`."""

    reason: str
    device: int = 0
    sizes: tuple[int, ...] = ()
    """Codes of the dtypes of x and of the scale, M and K."""
    pitch_dy: int = 0
    """0 where dy needs a copy, as x does by its own."""
    pitch_x: int = 0
    scale_in_place: bool = True
    counters: int = 0
    space: int = 0


@_library.planned
def scale_plan(grad_y: Tensor, x: Tensor, scale: Tensor) -> ScalePlan:
    """The plan of a backward; of a forward with x for dy."""
    if reason := _extension.missing_cuda():
        return ScalePlan(reason)
    for tensor in (x, scale):
        if tensor.dtype not in _extension.DTYPES:
            return ScalePlan(f"there are kernels for halves and float32, not {tensor.dtype}")
    k, device = x.shape[-1], x.device.index
    if x.numel() == 0 or k % 8:
        return ScalePlan(f"the features must be a multiple of 8 and there must be rows, got {k}")
    m = x.numel() // k
    (dy_fits, pitch_dy), (x_fits, pitch_x) = in_place(grad_y, k), in_place(x, k)
    counters = 4 * _extension.C.lora_counters
    return ScalePlan(
        "",
        device,
        (_extension.DTYPES[x.dtype], _extension.DTYPES[scale.dtype], m, k),
        pitch_dy if dy_fits else 0,
        pitch_x if x_fits else 0,
        scale.is_contiguous(),
        counters,
        counters + _extension.C.adapter_scale_workspace(device, m, k),
    )


def scale_into(out: Tensor, x: Tensor, scale: Tensor) -> str:
    """Write x * scale to contiguous `out`; the kernel's name, or that torch multiplies and why."""
    plan = scale_plan(x, x, scale)
    if plan.reason:
        torch.mul(x, scale, out=out)  # in float32 or wider, rounded once
        return f"adapter_scale_torch ({plan.reason})"
    x = x if plan.pitch_x else copied(x)
    scale = scale if plan.scale_in_place else scale.contiguous()
    source = (x.data_ptr(), plan.pitch_x or x.shape[-1])
    # The forward is the backward's dx.
    _extension.C.adapter_scale_backward(
        plan.device, raw_stream(plan.device), *plan.sizes, *source, *source, scale.data_ptr(), 0,
        out.data_ptr(), 0,
    )  # fmt: skip
    return "adapter_scale_cuda"


def scale_backward(
    plan: ScalePlan, grad_y: Tensor, x: Tensor, scale: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """dx and dscale, empty where not wanted."""
    want_x, want_scale = wanted
    k = x.shape[-1]
    grad_x = x.new_empty(x.shape if want_x else (0,))
    grad_scale = scale.new_empty(k if want_scale else 0)
    if not (want_x or want_scale):
        return grad_x, grad_scale
    grad_y = grad_y if plan.pitch_dy else copied(grad_y)
    x = x if plan.pitch_x else copied(x)
    scale = scale if plan.scale_in_place else scale.contiguous()
    stream = raw_stream(plan.device)
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        name = _extension.C.adapter_scale_backward(
            plan.device, stream, *plan.sizes, grad_y.data_ptr(), plan.pitch_dy or k, x.data_ptr(),
            plan.pitch_x or k, scale.data_ptr(), space.data_ptr() + plan.counters,
            grad_x.data_ptr() if want_x else 0, grad_scale.data_ptr() if want_scale else 0,
        )  # fmt: skip
    _library.record("adapter_scale_backward", name)
    return grad_x, grad_scale


def stats_by_torch(
    mean: Tensor, rstd: Tensor, down: Tensor, down_bias: Tensor | None, norm_weight: Tensor,
    norm_bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The statistics, from those that torch's norm returns."""
    wide = down.float()
    sums = wide @ norm_weight.float()
    offsets = torch.zeros_like(sums) if norm_bias is None else wide @ norm_bias.float()
    offsets = offsets if down_bias is None else offsets + down_bias.float()
    rows = torch.cat([mean, rstd], 1).float()
    return torch.cat([rows, torch.stack([sums, offsets], 1)])
