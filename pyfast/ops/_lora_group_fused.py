# SPDX-License-Identifier: Apache-2.0
"""Launches behind `lora_group` where our GEMMs serve all members: csrc/lora/group.h, one call a direction."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pyfast import _extension
from pyfast.ops import _library
from pyfast.ops._alone import share_device
from pyfast.ops._lora_group_plan import MOST, Plan, Weights, contiguous, stacked
from pyfast.ops._lora_launch import (
    FEW_RANKS,
    MANY_ROWS,
    as_matrix,
    copied,
    factor_grad,
    low_rank,
    padded,
    room_for,
)
from pyfast.ops._scratch import raw_stream, scratch_lock, workspace


def _call(
    plan: Plan,
    stream: int,
    space: Tensor,
    x: Tensor | None,
    k: int,
    scale: float,
    z: Tensor,
    given: bool,
) -> tuple[Any, ...]:
    """What both entry points for whole groups begin with."""
    share_device()
    counters = space.data_ptr()
    return (
        plan.device, stream, *plan.types, plan.rows, k, _extension.ptr(x), plan.pitch_x, scale,
        z.data_ptr(), plan.columns[-1], given, counters + plan.counters, counters,
    )  # fmt: skip


def forward(
    plan: Plan, x: Tensor, z: Tensor, scale: float, weights: Weights,
    biases: Sequence[Tensor | None], a: Sequence[Tensor], b: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """All y_i; z is filled."""
    a, b = contiguous(a), contiguous(b)
    biases = [bias if bias is None or bias.is_contiguous() else copied(bias) for bias in biases]
    ys = [x.new_empty(*x.shape[:-1], b_nr.shape[0]) for b_nr in b]
    if plan.torch_low:
        low_rank(z, as_matrix(x), stacked(a, x.dtype).t(), scale)
    stream = raw_stream(plan.device)
    with scratch_lock:
        dense = weights.dense(x, x.shape[-1])
        call = [
            (*b_nr.shape, first, w_nk.data_ptr(), w_nk.stride(0), a_rk.data_ptr(), b_nr.data_ptr(),
             _extension.ptr(bias), 0, y.data_ptr(), 0, 0, 0)
            for first, w_nk, bias, a_rk, b_nr, y in zip(plan.columns, dense, biases, a, b, ys, strict=False)
        ]  # fmt: skip
        space = workspace(x, stream, plan.space, plan.counters)
        served = _extension.C.lora_group_forward(
            *_call(plan, stream, space, x, x.shape[-1], scale, z, plan.torch_low), call
        )
    _library.record("lora_group", served)
    return ys


def backward(
    plan: Plan, dys: dict[int, tuple[Tensor, int]], x: Tensor | None, z: Tensor | None, scale: float,
    weights: Weights, a: Sequence[Tensor], b: Sequence[Tensor], want_x: bool,
    want_a: Sequence[bool], want_b: Sequence[bool], room: Mapping[int, Tensor],
) -> list[Tensor]:  # fmt: skip
    """The wanted of dx, dA_i and dB_i; x, z and `room`: see `_lora_group_launch.backward`."""
    a = contiguous(a)
    ranks = [b[i].shape[1] for i in dys]
    lies = [0, *itertools.accumulate(map(padded, ranks))]
    many = plan.rows >= MANY_ROWS
    given = plan.torch_low or (many and not want_x and lies[-1] > FEW_RANKS)
    # A member's columns of dz; zeros between them where torch fills it.
    whole = not given or all(r % 8 == 0 for r in ranks)
    any_dy, k = next(iter(dys.values()))[0], a[0].shape[1]
    dz = (any_dy.new_empty if whole else any_dy.new_zeros)(plan.rows, lies[-1])
    low = {i: dz[:, at : at + r] for i, at, r in zip(dys, lies, ranks, strict=False)}
    if given and (want_x or any(want_a)):
        for i, (dy, _) in dys.items():
            low_rank(low[i], as_matrix(dy), b[i], scale)
    # By torch where our skinny products are bound by mma.sync.
    torch_a, torch_b = many and lies[-1] > FEW_RANKS, [many and r > FEW_RANKS for r in ranks]
    made_a = [] if torch_a else [i for i in dys if want_a[i]]
    grads_a = {i: room_for(a[i], room.get(i), True, plan.rows) for i in made_a}
    grads_b = {
        i: room_for(b[i], room.get(MOST + i), True, plan.rows)
        for i, by_torch in zip(dys, torch_b, strict=True)
        if want_b[i] and not by_torch
    }
    grad_x = [any_dy.new_empty((*any_dy.shape[:-1], k))] if want_x else []
    stream = raw_stream(plan.device)
    with scratch_lock:
        dense = weights.dense(dz, k) if want_x else weights.tensors
        call = [
            (*b[i].shape, plan.columns[i], dense[i].data_ptr(), dense[i].stride(0), a[i].data_ptr(),
             b[i].data_ptr(), dy.data_ptr(), pitch, _extension.ptr(grads_a.get(i)),
             _extension.ptr(grads_b.get(i)), i in room, MOST + i in room)
            for i, (dy, pitch) in dys.items()
        ]  # fmt: skip
        space = workspace(dz, stream, plan.space, plan.counters)
        some_z = dz if z is None else z  # which is not read where no dB_i is wanted
        served = _extension.C.lora_group_backward(
            *_call(plan, stream, space, x, k, scale, some_z, given), call, dz.data_ptr(),
            grad_x[0].data_ptr() if want_x else 0,
        )  # fmt: skip
    _library.record("lora_group_backward", served or "lora_group_skinny")
    if torch_a and any(want_a):
        all_a = factor_grad(dz.t(), as_matrix(x), a[0].dtype)  # type: ignore[arg-type]
        for i, at, r in zip(dys, lies, ranks, strict=False):
            if want_a[i]:
                part = all_a[at : at + r]
                grads_a[i] = room[i].add_(part) if i in room else part.clone()
    for i, (dy, _) in dys.items():
        if want_b[i] and i not in grads_b:
            first = plan.columns[i]
            z_mr = some_z[:, first : first + b[i].shape[1]]
            grads_b[i] = factor_grad(as_matrix(dy).t(), z_mr, b[i].dtype, room.get(MOST + i))
    return [
        *grad_x,
        *(grads_a[i] for i in sorted(grads_a)),
        *(grads_b[i] for i in sorted(grads_b)),
    ]
