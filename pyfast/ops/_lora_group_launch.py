# SPDX-License-Identifier: Apache-2.0
"""Launches behind `lora_group`. Where torch's GEMM is the better one for a member, or ours cannot run, torch
makes the products with the W_i, around the skinny ones of csrc/lora/lora.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyfast import _extension
from pyfast.ops import _library, _lora_group_fused
from pyfast.ops._lora_group_plan import MOST, Plan, Weights, contiguous, members, stacked
from pyfast.ops._lora_launch import as_matrix, copied
from pyfast.ops._scratch import raw_stream, scratch_lock, workspace


def _problem(
    plan: Plan, stream: int, space: Tensor, n: int, r: int, x: Tensor | None, a: Tensor, b: Tensor,
    scale: float,
) -> tuple[Any, ...]:  # fmt: skip
    """What both entry points begin with; no W, so that only products with the factors are made."""
    counters, k = space.data_ptr(), a.shape[1]
    return (
        plan.device, stream, *plan.types, plan.rows, n, k, r, _extension.ptr(x), plan.pitch_x, 0, k,
        True, a.data_ptr(), b.data_ptr(), scale, plan.columns[-1], 0, 0, counters + plan.counters, counters,
    )  # fmt: skip


def forward(plan: Plan, *args: Any) -> tuple[list[Tensor], Tensor]:
    """All y_i and z, see `ops.lora_group`."""
    x, scales = args[0], args[-2]
    weights, biases, a, b, *nf4 = members(args[1:-2])
    w = Weights(weights, [b_nr.shape[0] for b_nr in b], nf4, args[-1])
    z = x.new_empty(plan.rows, plan.columns[-1])
    if plan.rows == 0:
        return [x.new_empty(*x.shape[:-1], b_nr.shape[0]) for b_nr in b], z
    if not plan.x_in_place:
        x = copied(x)
    if plan.gemm:
        return _lora_group_fused.forward(plan, x, z, scales[0], w, biases, a, b), z
    a_all, stream = stacked(a, a[0].dtype), raw_stream(plan.device)
    with scratch_lock:
        space = workspace(x, stream, plan.space, plan.counters)
        # Without W nothing reads B; it must only not be null.
        _extension.C.lora_forward(
            *_problem(plan, stream, space, x.shape[-1], z.shape[1], x, a_all, a_all, scales[0]),
            0, 0, 0, z.data_ptr(),
        )  # fmt: skip
    _library.record("lora_group", plan.beside)
    ys = []
    with scratch_lock:
        products = w.products(as_matrix(x), biases, plan.few_rows)
        for first, y_mn, b_nr in zip(plan.columns, products, b, strict=False):
            y_mn.addmm_(z[:, first : first + b_nr.shape[1]], b_nr.to(x.dtype).t())
            ys.append(_library.shaped(y_mn, x))
    return ys, z


def backward(plan: Plan, *args: Any) -> list[Tensor]:
    """The wanted of dx, dW_i, dA_i and dB_i in this order; the last argument: what some of the dA_i and dB_i
    are added to, by their place among both. Without x no dW_i or dA_i may be wanted, without z no dB_i."""
    x, z, scales, blocksize, wanted, room = args[MOST], args[MOST + 1], *args[-4:]
    weights, a, b, *nf4 = members(args[MOST + 2 : -4])
    w = Weights(weights, [b_nr.shape[0] for b_nr in b], nf4, blocksize)
    want_x, (want_w, want_a, want_b) = wanted[0], members(wanted[1:], len(weights))
    b = contiguous(b)
    if x is not None and not plan.x_in_place:
        x = copied(x)
    dys = {
        i: (dy if fits else copied(dy), pitch)
        for i, (dy, (fits, pitch)) in enumerate(zip(args, plan.dy_in_place, strict=False))
        if dy is not None
    }
    grads_w = [as_matrix(dys[i][0]).t() @ as_matrix(x) for i, want in enumerate(want_w) if want]
    if plan.gemm:
        made = _lora_group_fused.backward(
            plan, dys, x, z, scales[0], w, a, b, want_x, want_a, want_b, room
        )
        return [*made[:want_x], *grads_w, *made[want_x:]]
    make = torch.empty if plan.rows else torch.zeros
    grads_b = {
        i: make(b[i].shape, dtype=b[i].dtype, device=b[i].device)
        for i, want in enumerate(want_b) if want
    }  # fmt: skip
    # dA^T of all members; an absent one has columns of zeros in dz, and so adds nothing to dx.
    a_all, at = stacked(a, a[0].dtype), plan.columns
    grad_a_kr = make(a_all.t().shape, dtype=a_all.dtype, device=a_all.device)
    dy, _ = next(iter(dys.values()))
    dz = (dy.new_empty if len(dys) == len(weights) else dy.new_zeros)(plan.rows, at[-1])
    if plan.rows:
        _products(
            plan,
            dys,
            x,
            z,
            dz,
            a_all,
            b,
            scales,
            want_x,
            any(want_a),
            grad_a_kr,
            grads_b,
        )
    _library.record("lora_group_backward", plan.beside)
    grads_a = {
        i: grad_a_kr[:, at[i] : at[i] + a[i].shape[0]].t()
        for i, want in enumerate(want_a) if want
    }  # fmt: skip
    grads = [
        *grads_w,
        *(room[i].add_(grad) if i in room else grad.contiguous() for i, grad in grads_a.items()),
        *(room[MOST + i].add_(grad) if MOST + i in room else grad for i, grad in grads_b.items()),
    ]
    if not want_x:
        return grads
    grad_x = torch.mm(dz, a_all.to(dz.dtype))
    with scratch_lock:
        dense = w.dense(dz, a_all.shape[1])
        for i, (dy, _) in dys.items():
            grad_x.addmm_(as_matrix(dy), dense[i])
    return [grad_x.view(*dy.shape[:-1], a_all.shape[1]), *grads]


def _products(
    plan: Plan, dys: dict[int, tuple[Tensor, int]], x: Tensor | None, z: Tensor | None, dz: Tensor,
    a_all: Tensor, b: Sequence[Tensor], scales: Sequence[float], want_x: bool, want_a: bool,
    grad_a_kr: Tensor, grads_b: dict[int, Tensor],
) -> None:  # fmt: skip
    """dz, dA^T and the dB_i, where wanted."""
    stream, k, step = raw_stream(plan.device), a_all.shape[1], dz.element_size()
    with scratch_lock:
        space = workspace(dz, stream, plan.space, plan.counters)
        for i, (dy, pitch) in dys.items():
            (n, r), first, grad_b = b[i].shape, plan.columns[i] * step, grads_b.get(i)
            # Without W, a dx that is not null asks for dz alone.
            _extension.C.lora_backward(
                *_problem(plan, stream, space, n, r, x, a_all, b[i], scales[i]),
                dy.data_ptr(), pitch, 0 if z is None else z.data_ptr() + first,
                dz.data_ptr() + first,
                dz.data_ptr() if want_x or want_a else 0, 0, _extension.ptr(grad_b), False, False,
            )  # fmt: skip
        if want_a:
            # x^T dz is the product that makes dB = dy^T z, with x for dy and dz for z.
            _extension.C.lora_backward(
                *_problem(plan, stream, space, k, dz.shape[1], x, a_all, a_all, 1.0),
                _extension.ptr(x), plan.pitch_x, dz.data_ptr(), dz.data_ptr(), 0, 0, grad_a_kr.data_ptr(),
                False, False,
            )  # fmt: skip
